/* act(gate) * up over rows that hold the gates first and the ups behind them. */
#include "linear.h"

typedef struct {
    const char *x;
    char *out;
    long rows, dim, ldx, ldo;
    int act, is_bf16;
} gate_call;

INLINE void gate_row(const void *x, void *out, long dim, const int act, const int is_bf16) {
    for (long i = 0; i < dim; i += 16) {
        int n = dim - i < 16 ? (int)(dim - i) : 16;
        v16 gate = v_load_any_n(x, i, n, is_bf16), up = v_load_any_n(x, dim + i, n, is_bf16);
        gate = v_activate(gate, act);
        v_store_any_n(out, i, v_mul(gate, up), n, is_bf16);
    }
}

static void gate_team(int tid, int size, void *arg) {
    (void)tid;
    gate_call *c = arg;
    long bytes = c->is_bf16 ? 2 : 4, end;
    for (long row; (row = team_take(c->rows, team_chunk(c->rows, size), &end)) >= 0;) {
        for (; row < end; row++) {
            const void *x = c->x + row * c->ldx * bytes;
            void *out = c->out + row * c->ldo * bytes;
            if (c->act == ACT_SILU) {
                if (c->is_bf16) gate_row(x, out, c->dim, ACT_SILU, 1);
                else gate_row(x, out, c->dim, ACT_SILU, 0);
            } else if (c->act == ACT_GELU) {
                if (c->is_bf16) gate_row(x, out, c->dim, ACT_GELU, 1);
                else gate_row(x, out, c->dim, ACT_GELU, 0);
            } else {
                if (c->is_bf16) gate_row(x, out, c->dim, ACT_GELU_TANH, 1);
                else gate_row(x, out, c->dim, ACT_GELU_TANH, 0);
            }
        }
    }
    team_barrier(size);
}

/* Entry point for Python: x[rows][2 * dim] -> out[rows][dim]. */
void q_act_mul(const void *x, void *out, long rows, long dim, long ldx, long ldo, int act, int is_bf16) {
    gate_call c = {x, out, rows, dim, ldx, ldo, act, is_bf16};
    pool_call(gate_team, &c, 4 * rows * dim);
}
