/* The best token of each row: the product with the vocabulary's matrix, of which only the largest logit is kept.
 *
 * Owns: the search in two rounds.  For a few rows the product is nothing but reading the matrix, so a copy of it in int8
 * is read first, half the bytes of bfloat16.  For each output it gives a logit and how far that can be from the one that
 * the matrix itself gives; only panels in which an output may be the best one are then multiplied as they always are.
 * What comes out is the largest of those, bit for bit what a search through all logits finds: the bound is proven, no
 * estimate.
 *
 * The bound.  With w a row of the matrix, v the same in int8, x the activations and y their int8 form, |x|, |w| lengths:
 *   |v.y - w.x| <= |v - w| |x| + |v| |y - x| + rounding.
 * y has two parts, x in int8 and what that leaves over in int8 again, so that |y - x| <= 9e-5 |x|: with a scale per group
 * of 32, an element is off by at most 1/254^2 of the group's largest.  Float32 sums of k products are off by at most
 * k 2^-24 of |w| |x| (twice that where the processor multiplies pairs of bfloat16).  All of this is linear in |x|, and
 * what |x| is multiplied with is known when the weights are packed (linear_int8.c): `bounds`.
 */
#include "linear.h"

#define ROUGH_ROWS 6 /* rows of a search in two rounds: more are bound by arithmetic and gain nothing */

typedef struct {
    linear_args exact;
    linear_input input;
    const linear_weight *rough;
    const float *bounds;          /* [n] */
    int search;                   /* in two rounds */
    size_t rough_bytes;
    float *halves;                /* [threads][2 rows][k]: the rows, then what their int8 form leaves over */
    char *rough_operand;          /* [threads][rough_bytes] */
    float *upper;                 /* [rows][panels]: the most that an exact logit of the panel can be */
    float *lower;                 /* [threads][16]: the least that the best exact logit of a row can be */
    best_token *found;            /* [threads][rows, padded to a cache line] */
    long found_stride;
} best_call;

/* Length of x[k], rounded up; 0 when it is not in a range where float32 keeps its promises. */
static float length_of(const float *x, long k) {
    v16 squares = v_zero();
    for (long i = 0; i < k; i += 16) {
        v16 v = v_load_n(x + i, k - i < 16 ? (int)(k - i) : 16);
        squares = v_fma(v, v, squares);
    }
    float length = sqrtf(v_sum(squares)) * 1.0001f;
    return length > 1e-15f && length < 1e15f ? length : 0.0f;
}

/* Both int8 parts of this thread's rows and the rows' lengths; returns whether all rows can be searched in two rounds. */
static int make_rough(const best_call *c, const void *a, long lda, int tid, float *lengths) {
    long k = c->rough->k, rows = c->exact.rows;
    float *halves = c->halves + 2 * rows * k * tid;
    int8_t *parts = (int8_t *)(c->rough_operand + c->rough_bytes * (size_t)tid);
    int is_bf16 = c->exact.weight->kind == WEIGHT_BF16 && BF16_DOT;
    for (long r = 0; r < rows; r++) {
        float *x = halves + r * k, *rest = halves + (rows + r) * k;
        for (long i = 0; i < k; i++) x[i] = load_scalar(a, r * lda + i, is_bf16);
        if ((lengths[r] = length_of(x, k)) == 0.0f) return 0;
        linear_make_operand(c->rough, halves, 0, k, parts, r, r + 1, 2 * rows);
        int8_values(parts, k, r, 2 * rows, rest);
        for (long i = 0; i < k; i++) rest[i] = x[i] - rest[i];
        linear_make_operand(c->rough, halves, 0, k, parts, rows + r, rows + r + 1, 2 * rows);
    }
    return 1;
}

/* The first round: every panel in int8, and where its exact logits can lie. */
static void search_rough(const best_call *c, const float *lengths, int tid, int size) {
    const linear_weight *w = c->rough;
    long panels = linear_panels(w), rows = c->exact.rows, end;
    size_t bytes = linear_panel_bytes(w);
    const void *parts = c->rough_operand + c->rough_bytes * (size_t)tid;
    v16 none = v_set1(-INFINITY), least[ROUGH_ROWS];
    for (long r = 0; r < rows; r++) least[r] = none;
    for (long panel; (panel = team_take(panels, team_chunk(panels, size), &end)) >= 0;)
        for (; panel < end; panel++) {
            _Alignas(64) float out[2 * ROUGH_ROWS * PANEL];
            const char *weights = (const char *)w->panels + (size_t)panel * bytes;
            panel_int8(w, parts, 2 * rows, 0, 2 * rows, weights, out, (ahead){weights + STREAM_AHEAD, 128});
            for (long r = 0; r < rows; r++) {
                v16 most = none, length = v_set1(lengths[r]);
                for (long j = 0, col = panel * PANEL; j < PANEL && col < w->n; j += 16, col += 16) {
                    int n = w->n - col < 16 ? (int)(w->n - col) : 16;
                    v16 v = v_add(v_load(out + r * PANEL + j), v_load(out + (rows + r) * PANEL + j));
                    v16 bound = v_mul(v_load_n(c->bounds + col, n), length);
                    most = v_max(most, v_keep(v_add(v, bound), 0, n, none));
                    least[r] = v_max(least[r], v_keep(v_sub(v, bound), 0, n, none));
                }
                c->upper[r * panels + panel] = v_hmax(most);
            }
        }
    for (long r = 0; r < rows; r++) c->lower[16 * tid + r] = v_hmax(least[r]);
    team_barrier(size);
}

/* The second round: panels that can hold a row's best logit. */
static void search_exact(const best_call *c, const linear_args *g, int size) {
    long panels = linear_panels(g->weight), end;
    float least[ROUGH_ROWS];
    for (long r = 0; r < g->rows; r++) {
        least[r] = c->lower[r];
        for (int t = 1; t < size; t++) least[r] = fmaxf(least[r], c->lower[16 * t + r]);
    }
    for (long panel; (panel = team_take(panels, 8, &end)) >= 0;)
        for (; panel < end; panel++)
            for (long r = 0; r < g->rows; r++)
                if (c->upper[r * panels + panel] >= least[r]) linear_panel(g, r, r + 1, panel);
    team_barrier(size);
}

static void best_team(int tid, int size, void *arg) {
    const best_call *c = arg;
    linear_args g = c->exact;
    best_token *found = c->found + c->found_stride * tid;
    float lengths[ROUGH_ROWS];
    for (long r = 0; r < g.rows; r++) found[r] = (best_token){-INFINITY, 0, 0};
    g.out = found;
    linear_take_input(&c->input, &g, tid, size);
    if (c->search && make_rough(c, g.a, g.lda, tid, lengths)) {
        search_rough(c, lengths, tid, size);
        search_exact(c, &g, size);
    } else {
        linear_team(&g, tid, size);
    }
}

/* Lays the scratch memory out; returns the bytes it takes. */
static size_t lay_out(best_call *c, char *base, int size) {
    arena a = {.base = base};
    size_t rows = (size_t)c->exact.rows, k = (size_t)c->exact.weight->k, threads = (size_t)size;
    size_t found = align64(rows * sizeof(best_token));
    c->found_stride = (long)(found / sizeof(best_token));
    c->found = arena_take(&a, found * threads);
    c->input.made = arena_take(&a, linear_input_bytes(&c->input, size));
    if (c->search) {
        c->rough_bytes = align64(linear_operand_bytes(c->rough, 2 * c->exact.rows));
        c->halves = arena_take(&a, 2 * rows * k * sizeof(float) * threads);
        c->rough_operand = arena_take(&a, c->rough_bytes * threads);
        c->upper = arena_take(&a, rows * (size_t)linear_panels(c->exact.weight) * sizeof(float));
        c->lower = arena_take(&a, 64 * threads);
    }
    return a.used;
}

static void merge(const best_call *c, int size, int32_t *ids, float *values) {
    for (long r = 0; r < c->exact.rows; r++) {
        best_token best = c->found[r];
        for (int t = 1; t < size; t++) {
            const best_token *other = c->found + c->found_stride * t + r;
            int64_t nan = best.nan | other->nan;
            if (other->value > best.value || (other->value == best.value && other->id < best.id)) best = *other;
            best.nan = nan;
        }
        ids[r] = best.nan ? 0 : best.id;
        values[r] = best.nan ? NAN : best.value;
    }
}

/* Entry point for Python: for each row of x[rows][k] the output of `weight` that is largest, the lowest if there are
 * several, and its value; 0 and NaN where one of the row's outputs is NaN.  `rough`: the same weight in int8, with its
 * bounds, or NULL.  0, or -1 without memory. */
int q_best(const linear_weight *weight, const linear_weight *rough, const float *bounds, const float *x, long rows,
           int32_t *ids, float *values) {
    best_call c = {
        .exact = {.weight = weight, .rows = rows, .out_kind = OUT_BEST, .scale = 1.0f},
        .input = {.weight = weight, .x = x, .ldx = weight->k, .rows = rows},
        .rough = rough, .bounds = bounds, .search = rough && rows <= ROUGH_ROWS,
    };
    pool_enter();
    int size = pool_size();
    char *base = pool_scratch(lay_out(&c, NULL, size));
    if (base) {
        lay_out(&c, base, size);
        pool_run(best_team, &c, POOL_ALWAYS);
        merge(&c, size, ids, values);
    }
    pool_leave();
    return base ? 0 : -1;
}
