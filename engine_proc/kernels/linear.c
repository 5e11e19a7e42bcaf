/* Packed linear layers; see linear.h for the layout and the contract. */
#define _GNU_SOURCE
#include "linear.h"

#include <sys/mman.h>

#define CHUNK_ROWS 96                /* rows that pass over the weights together: enough to hide reading them */
#define PRIVATE_OPERAND 8192         /* elements each thread converts for itself to save a barrier */

static long chunk_rows(long rows) {
    if (rows <= CHUNK_ROWS) return rows;
    long chunks = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    return ((rows + chunks - 1) / chunks + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

size_t linear_panel_bytes(const linear_weight *w) {
    if (w->kind == WEIGHT_INT8) return int8_panel_bytes(w->k);
    return (size_t)(w->kind == WEIGHT_F32 ? 4 * w->k : 2 * ((w->k + 1) & ~1L)) * PANEL;
}

/* c[rows][32] = a[row ...] x panel. */
static void panel_product(const linear_args *g, long row, long rows, const char *panel, float *c, ahead next) {
    const linear_weight *w = g->weight;
    if (w->kind == WEIGHT_F32) {
        panel_f32[rows]((const float *)g->a + row * g->lda, g->lda, (const float *)panel, w->k, c, next);
    } else if (w->kind == WEIGHT_BF16) {
        const bf16_operand *a = (const bf16_operand *)g->a + row * g->lda;
        panel_bf16[rows](a, g->lda, (const bf16 *)panel, (w->k + 1) & ~1L, c, next);
    } else {
        panel_int8(w, g->a, g->rows, row, rows, panel, c, next);
    }
}

INLINE void put(const linear_args *g, long at, v16 v, int n, const int kind) {
    if (kind == OUT_ADD_F32) v = v_fma(v, v_set1(g->scale), v_load_any_n(g->out, at, n, 0));
    v_store_any_n(g->out, at, v, n, kind == OUT_BF16);
}

/* Compares 16 results of a row with its best so far; a thread sees the columns in ascending order. */
INLINE void keep_best(best_token *best, v16 v, long col, int n) {
    best->nan |= v_any_nan(v);
    unsigned better = v_gt_bits(v, v_set1(best->value)) & ((1u << n) - 1);
    if (!better) return;
    _Alignas(64) float values[16];
    v_store(values, v);
    for (; better; better &= better - 1) {
        int i = __builtin_ctz(better);
        if (values[i] > best->value) *best = (best_token){values[i], (int32_t)(col + i), best->nan};
    }
}

/* 16 columns from `col` on of rows that have a gate. */
INLINE void finish_gated(const linear_args *g, long row, long rows, long col, int n, const float *c, long ldc, const int kind,
                         const int act) {
    const float *bias = g->weight->bias;
    v16 of_gate = bias ? v_load_n(bias + col, n) : v_zero(), of_up = bias ? v_load_n(bias + g->weight->n + col, n) : v_zero();
    for (long r = 0; r < rows; r++, c += ldc) {
        v16 gate = v_load(c), up = v_load(c + 16);
        if (bias) {
            gate = v_add(gate, of_gate);
            up = v_add(up, of_up);
        }
        put(g, (row + r) * g->ldo + col, v_mul(v_activate(gate, act), up), n, kind);
    }
}

/* The same without one. */
INLINE void finish_plain(const linear_args *g, long row, long rows, long col, int n, const float *c, long ldc,
                         const int kind) {
    const linear_weight *w = g->weight;
    for (long r = 0; r < rows; r++, c += ldc) {
        v16 v = v_load(c);
        if (w->bias) v = v_add(v, v_load_n(w->bias + col, n));
        if (w->post) v = v_activate(v, w->post);
        if (kind == OUT_BEST) keep_best((best_token *)g->out + row + r, v, col, n);
        else put(g, (row + r) * g->ldo + col, v, n, kind);
    }
}

INLINE void finish_as(const linear_args *g, long row, long rows, long panel, const float *c, long ldc, const int kind) {
    const linear_weight *w = g->weight;
    if (w->act) {
        long col = panel * 16;
        int n = w->n - col < 16 ? (int)(w->n - col) : 16;
        if (w->act == ACT_SILU && n == 16) finish_gated(g, row, rows, col, 16, c, ldc, kind, ACT_SILU);
        else finish_gated(g, row, rows, col, n, c, ldc, kind, (int)w->act);
        return;
    }
    for (long col = panel * PANEL, j = 0; j < 2 && col < w->n; j++, col += 16, c += 16) {
        if (w->n - col >= 16) finish_plain(g, row, rows, col, 16, c, ldc, kind);
        else finish_plain(g, row, rows, col, (int)(w->n - col), c, ldc, kind);
    }
}

/* Bias, gate and store of a finished tile, whose rows are `ldc` floats apart. */
static void finish(const linear_args *g, long row, long rows, long panel, const float *c, long ldc) {
    switch (g->out_kind) {
    case OUT_F32: finish_as(g, row, rows, panel, c, ldc, OUT_F32); break;
    case OUT_BF16: finish_as(g, row, rows, panel, c, ldc, OUT_BF16); break;
    case OUT_ADD_F32: finish_as(g, row, rows, panel, c, ldc, OUT_ADD_F32); break;
    default: finish_as(g, row, rows, panel, c, ldc, OUT_BEST);
    }
}

/* Rows [row, stop) times one panel.  A panel is read from memory by its first tile and from the cache by the others,
 * which ask for the panel `following` meanwhile, each for its share; a single tile asks for its own stream ahead. */
static void run_panel(const linear_args *g, long row, long stop, long panel, const char *following) {
    _Alignas(64) float c[TILE_ROWS * PANEL];
    size_t bytes = linear_panel_bytes(g->weight);
#if LIGHT_ROWS
    if (g->weight->light && stop - row <= LIGHT_ROWS) {
        panel_light(g->weight, (const bf16_operand *)g->a + row * g->lda, g->lda, stop - row, panel, c);
        finish(g, row, stop - row, panel, c, PANEL);
        return;
    }
#endif
    const char *weights = (const char *)g->weight->panels + (size_t)panel * bytes;
    long tiles = (stop - row + TILE_ROWS - 1) / TILE_ROWS;
    for (long rows, i = 0; row < stop; row += rows, i++) {
        ahead next = {weights + STREAM_AHEAD, 128};
        if (tiles > 1) next = (ahead){following + bytes / (size_t)tiles * (size_t)i, 128 / tiles};
        rows = tile_rows(stop - row);
        panel_product(g, row, rows, weights, c, next);
        finish(g, row, rows, panel, c, PANEL);
    }
}

/* Panels that are multiplied at once. */
static long panels_at_once(const linear_args *g) {
    return WIDE_ROWS && g->weight->kind == WEIGHT_F32 && g->rows > TILE_ROWS ? 2 : 1;
}

/* As run_panel, with two panels of floats. */
static void run_pair(const linear_args *g, long row, long stop, long panel, const char *following) {
#if WIDE_ROWS
    _Alignas(64) float c[WIDE_ROWS * 2 * PANEL];
    size_t bytes = linear_panel_bytes(g->weight);
    long k = g->weight->k, tiles = (stop - row + WIDE_ROWS - 1) / WIDE_ROWS;
    const float *weights = (const float *)((const char *)g->weight->panels + (size_t)panel * bytes);
    for (long rows, i = 0; row < stop; row += rows, i++) {
        ahead next = {following + 2 * bytes / (size_t)tiles * (size_t)i, 1024 / tiles};
        rows = even_rows(stop - row, WIDE_ROWS);
        wide_f32[rows]((const float *)g->a + row * g->lda, g->lda, weights, k * PANEL, k, c, 2 * PANEL, next);
        finish(g, row, rows, panel, c, 2 * PANEL);
        finish(g, row, rows, panel + 1, c + PANEL, 2 * PANEL);
    }
#else
    (void)g, (void)row, (void)stop, (void)panel, (void)following;
#endif
}

void linear_panel(const linear_args *g, long row, long stop, long panel) {
    const char *weights = (const char *)g->weight->panels + (size_t)panel * linear_panel_bytes(g->weight);
    run_panel(g, row, stop, panel, weights);
}

void linear_team(const linear_args *g, int tid, int size) {
    (void)tid;
    long panels = linear_panels(g->weight), per_chunk = chunk_rows(g->rows), wide = panels_at_once(g);
    long groups = (panels + wide - 1) / wide, chunks = (g->rows + per_chunk - 1) / per_chunk, total = groups * chunks;
    long step = g->rows <= 2 * TILE_ROWS ? team_chunk(total, size) : 1, end, then_end = 0;
    for (long task = team_take(total, step, &end), then = -1; task >= 0; task = then, end = then_end) {
        for (; task < end; task++) {
            /* what comes next is taken before the last panel begins, so that it can be asked for */
            if (task == end - 1) then = team_take(total, step, &then_end);
            long after = task < end - 1 ? task + 1 : then >= 0 ? then : task;
            long row = task / groups * per_chunk, stop = row + per_chunk < g->rows ? row + per_chunk : g->rows;
            long panel = task % groups * wide, then_panel = after % groups * wide;
            const char *following = (const char *)g->weight->panels + (size_t)then_panel * linear_panel_bytes(g->weight);
            if (wide == 2 && panel + 1 < panels) run_pair(g, row, stop, panel, following);
            else run_panel(g, row, stop, panel, following);
        }
    }
    team_barrier(size);
}

/* Operand rows. */

long linear_operand_stride(const linear_weight *w) {
    if (w->kind == WEIGHT_INT8) return int8_stride(w->k);
    return ((w->k + 15) & ~15L) + 16; /* off the power of two: rows must not share their cache sets */
}

size_t linear_operand_bytes(const linear_weight *w, long rows) {
    if (w->kind == WEIGHT_INT8) return int8_operand_bytes(w->k, rows);
    return (size_t)(linear_operand_stride(w) * rows) * sizeof(float);
}

void linear_make_operand(const linear_weight *w, const void *x, int x_bf16, long ldx, void *a, long from, long to,
                         long rows) {
    if (w->kind == WEIGHT_INT8) {
        int8_make_operand(w, x, x_bf16, ldx, a, from, to, rows);
        return;
    }
    int a_bf16 = w->kind == WEIGHT_BF16 && BF16_DOT;
    long lda = linear_operand_stride(w);
    for (long r = from; r < to; r++) {
        long k = 0;
        for (; k + 16 <= w->k; k += 16) v_store_any(a, r * lda + k, v_load_any(x, r * ldx + k, x_bf16), a_bf16);
        /* the tail brings zeros along, which pad an odd k to a whole pair */
        if (k < w->k) v_store_any(a, r * lda + k, v_load_any_n(x, r * ldx + k, (int)(w->k - k), x_bf16), a_bf16);
    }
}

static int usable_as_is(const linear_weight *w, int x_bf16) {
    if (w->kind == WEIGHT_F32) return !x_bf16;
    return w->kind == WEIGHT_BF16 && x_bf16 == BF16_DOT && w->k % 2 == 0;
}

/* Bytes of one operand, and how many there are. */
static size_t input_bytes(const linear_input *in) { return align64(linear_operand_bytes(in->weight, in->rows)); }
static int is_private(const linear_input *in) { return in->rows * in->weight->k <= PRIVATE_OPERAND; }

size_t linear_input_bytes(const linear_input *in, int size) {
    if (usable_as_is(in->weight, in->x_bf16)) return 0;
    return input_bytes(in) * (size_t)(is_private(in) ? size : 1);
}

void linear_take_input(const linear_input *in, linear_args *g, int tid, int size) {
    g->a = in->x;
    g->lda = in->ldx;
    if (usable_as_is(in->weight, in->x_bf16)) return;
    g->lda = linear_operand_stride(in->weight);
    if (is_private(in)) {
        char *mine = in->made + input_bytes(in) * (size_t)tid;
        linear_make_operand(in->weight, in->x, in->x_bf16, in->ldx, mine, 0, in->rows, in->rows);
        g->a = mine;
        return;
    }
    long end;
    for (long row; (row = team_take(in->rows, 4, &end)) >= 0;)
        linear_make_operand(in->weight, in->x, in->x_bf16, in->ldx, in->made, row, end, in->rows);
    team_barrier(size);
    g->a = in->made;
}

typedef struct {
    linear_args product;
    linear_input input;
} linear_call;

static void linear_call_team(int tid, int size, void *arg) {
    const linear_call *call = arg;
    linear_args g = call->product;
    linear_take_input(&call->input, &g, tid, size);
    linear_team(&g, tid, size);
}

/* Entry points for Python. */

/* out[rows][n] = x[rows][k] times the weight (+ bias, gate); strides in elements.  0, or -1 without memory. */
int q_linear(const linear_weight *w, const void *x, int x_bf16, long ldx, long rows, void *out, int out_bf16, long ldo) {
    linear_call call = {
        .product = {.weight = w, .rows = rows, .out = out, .ldo = ldo, .out_kind = out_bf16 ? OUT_BF16 : OUT_F32,
                    .scale = 1.0f},
        .input = {.weight = w, .x = x, .ldx = ldx, .rows = rows, .x_bf16 = x_bf16},
    };
    pool_enter();
    size_t bytes = linear_input_bytes(&call.input, pool_size());
    if (bytes) call.input.made = pool_scratch(bytes);
    int failed = bytes && !call.input.made;
    if (!failed) pool_run(linear_call_team, &call, rows * w->n * w->k);
    pool_leave();
    return -failed;
}

typedef struct {
    const void *src;
    int src_bf16;
    const linear_weight *w;
    void *panels;
} pack_call;

long linear_source_row(const linear_weight *w, long panel, long c) {
    if (!w->act) return panel * PANEL + c < w->n ? panel * PANEL + c : -1;
    long row = panel * 16 + c % 16;
    if (row >= w->n) return -1;
    return c < 16 ? row : w->n + row;
}

static void pack_team(int tid, int size, void *arg) {
    (void)tid;
    pack_call *p = arg;
    const linear_weight *w = p->w;
    long k = w->kind == WEIGHT_BF16 ? (w->k + 1) & ~1L : w->k, panels = linear_panels(w), end;
    int is_bf16 = w->kind == WEIGHT_BF16, group = is_bf16 ? 2 : 1;
    for (long panel; (panel = team_take(panels, 1, &end)) >= 0;) {
        long base = panel * k * PANEL;
        for (long c = 0; c < PANEL; c++) {
            long row = linear_source_row(w, panel, c);
            for (long i = 0; i < k; i++) {
                float v = row < 0 || i >= w->k ? 0.0f : load_scalar(p->src, row * w->k + i, p->src_bf16);
                store_scalar(p->panels, base + i / group * group * PANEL + c * group + i % group, v, is_bf16);
            }
        }
    }
    team_barrier(size);
}

/* Fills w->panels, of panels * (padded k) * 32 elements, from src[n][k] (gated: [2n][k]); float or bfloat16. */
void q_pack(const linear_weight *w, const void *src, int src_bf16) {
    pack_call p = {.src = src, .src_bf16 = src_bf16, .w = w, .panels = (void *)w->panels};
    pool_call(pack_team, &p, POOL_ALWAYS);
}

/* Asks for huge pages under a packed weight: a stream then needs 500 times fewer address translations. */
void q_advise_huge(void *p, size_t bytes) {
    uintptr_t page = 2 << 20, from = ((uintptr_t)p + page - 1) & ~(page - 1), to = ((uintptr_t)p + bytes) & ~(page - 1);
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}
