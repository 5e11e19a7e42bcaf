/* LayerNorm, plain and fused with the addition of a residual. */
#include "pool.h"
#include "rows.h"

typedef struct {
    char *x;
    const char *add;
    const float *w, *b;
    char *out;
    long rows, dim, ldx, lda, ldo;
    float eps;
    int is_bf16;
} layer_norm_call;

static void layer_norm_team(int tid, int size, void *arg) {
    (void)tid;
    layer_norm_call *c = arg;
    long bytes = c->is_bf16 ? 2 : 4, end;
    for (long r; (r = team_take(c->rows, team_chunk(c->rows, size), &end)) >= 0;)
        for (; r < end; r++) {
            char *x = c->x + r * c->ldx * bytes, *out = c->out + r * c->ldo * bytes;
            const char *add = c->add ? c->add + r * c->lda * bytes : NULL;
            if (c->is_bf16) layer_norm_row(x, add, c->w, c->b, out, c->dim, c->eps, 1);
            else layer_norm_row(x, add, c->w, c->b, out, c->dim, c->eps, 0);
        }
    team_barrier(size);
}

/* Entry point for Python.  x[rows][dim] with rows ldx apart; `add` (may be NULL) and `out` likewise, of x's type; w[dim]
 * and b[dim] (may be NULL) are float.  out may be x. */
void q_layer_norm(void *x, const void *add, const float *w, const float *b, void *out, long rows, long dim, long ldx,
                  long lda, long ldo, float eps, int is_bf16) {
    layer_norm_call c = {x, add, w, b, out, rows, dim, ldx, lda, ldo, eps, is_bf16};
    pool_call(layer_norm_team, &c, rows * dim);
}
