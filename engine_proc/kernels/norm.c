/* RMSNorm kernels: plain, fused with the residual addition, and per head (qk-norm); LayerNorm, plain and fused. */
#include "pool.h"
#include "rows.h"

typedef struct {
    char *x;
    const char *add;
    const void *w;
    char *out;
    long rows, inner, dim; /* `inner` vectors of `dim` side by side in each row */
    long ldx, lda, ldo;
    float eps, offset;
    int is_bf16, w_bf16;
} norm_call;

INLINE void norm_rows(const norm_call *c, long from, long to, const int is_bf16, const int w_bf16) {
    long bytes = is_bf16 ? 2 : 4;
    for (long r = from; r < to; r++)
        for (long i = 0; i < c->inner; i++) {
            long at = i * c->dim;
            rms_norm_row(c->x + (r * c->ldx + at) * bytes, c->add ? c->add + (r * c->lda + at) * bytes : NULL, c->w,
                         c->out + (r * c->ldo + at) * bytes, c->dim, c->eps, c->offset, is_bf16, w_bf16, is_bf16);
        }
}

static void norm_team(int tid, int size, void *arg) {
    (void)tid;
    norm_call *c = arg;
    long end;
    for (long row; (row = team_take(c->rows, team_chunk(c->rows, size), &end)) >= 0;) {
        if (c->is_bf16 && c->w_bf16) norm_rows(c, row, end, 1, 1);
        else if (c->is_bf16) norm_rows(c, row, end, 1, 0);
        else if (c->w_bf16) norm_rows(c, row, end, 0, 1);
        else norm_rows(c, row, end, 0, 0);
    }
    team_barrier(size);
}

/* Entry point for Python.  x[rows][inner * dim] with rows ldx apart; `add` (may be NULL) and `out` likewise, of x's
 * type; w[dim].  out may be x. */
void q_rms_norm(void *x, const void *add, const void *w, void *out, long rows, long inner, long dim, long ldx, long lda,
                long ldo, float eps, float offset, int is_bf16, int w_bf16) {
    norm_call c = {x, add, w, out, rows, inner, dim, ldx, lda, ldo, eps, offset, is_bf16, w_bf16};
    pool_call(norm_team, &c, rows * inner * dim);
}

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

/* Entry point for Python.  As q_rms_norm; w[dim] and b[dim] (may be NULL) are float. */
void q_layer_norm(void *x, const void *add, const float *w, const float *b, void *out, long rows, long dim, long ldx,
                  long lda, long ldo, float eps, int is_bf16) {
    layer_norm_call c = {x, add, w, b, out, rows, dim, ldx, lda, ldo, eps, is_bf16};
    pool_call(layer_norm_team, &c, rows * dim);
}
