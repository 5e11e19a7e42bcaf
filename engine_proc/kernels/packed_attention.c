/* Attention of whole sequences that lie one behind another, with every token seeing both sides; see packed_attention.h.
 *
 * A work item is (sequence, head, run of query tokens).  Its keys are transposed into [head_dim][32 tokens] panels and
 * its values laid into [tokens][32 dims] panels once; then the scores of up to TILE_ROWS tokens over all the keys that
 * they see fit the cache, so that softmax is two plain passes.  A row's result depends on its own sequence only: panels
 * are aligned to positions of the sequence and masked lanes add exact zeros.
 */
#include "packed_attention.h"

#include "pool.h"
#include "tile.h"

#define ITEM_TOKENS (20 * TILE_ROWS) /* query tokens of an item */
#define LOG2E 1.4426950408889634

typedef struct {
    int32_t sequence, head, from, to; /* query tokens of the sequence */
} item;

typedef struct {
    const packed_attention_args *a;
    item *items;
    long count, longest;
    float *work;       /* per thread */
    long work_floats;
} plan;

static long least(long a, long b) { return a < b ? a : b; }
static long round_up(long n, long to) { return (n + to - 1) / to * to; }
INLINE int lanes(long n) { return n < 0 ? 0 : n > 16 ? 16 : (int)n; }
static long width_of(const packed_attention_args *a) { return round_up(a->head_dim, PANEL); }

/* Keys that tokens [from, to) of a sequence of n see: the first, rounded down to a panel, and the end. */
static long first_key(const packed_attention_args *a, long from) {
    return a->window && from > a->window ? (from - a->window) / PANEL * PANEL : 0;
}
static long end_key(const packed_attention_args *a, long to, long n) { return a->window ? least(n, to + a->window) : n; }

/* Most keys of any item, in whole panels. */
static long most_keys(const packed_attention_args *a, long longest) {
    long keys = a->window ? least(longest, ITEM_TOKENS + 2 * a->window + PANEL) : longest;
    return round_up(keys, PANEL);
}

static long work_floats(const packed_attention_args *a, long longest) {
    long keys = most_keys(a, longest);
    return round_up(keys * a->head_dim + keys * width_of(a) + TILE_ROWS * (keys + PANEL), 16);
}

/* keys[panel][head_dim][32] of `count` tokens (zeros behind them). */
static void load_keys(const packed_attention_args *a, const float *k, long count, float *keys) {
    for (long t = 0; t < round_up(count, PANEL); t += 16)
        for (long d = 0; d < a->head_dim; d += 16) {
            v16 r[16];
            int n = lanes(a->head_dim - d);
            for (long i = 0; i < 16; i++) r[i] = t + i < count ? v_load_any_n(k, (t + i) * a->ldk + d, n, 0) : v_zero();
            v_transpose16(r);
            float *to = keys + t / PANEL * PANEL * a->head_dim + d * PANEL + t % PANEL;
            for (int i = 0; i < n; i++) v_store(to + i * PANEL, r[i]);
        }
}

/* values[panel of dims][rows of `ld` tokens][32]. */
static void load_values(const packed_attention_args *a, const float *v, long count, long ld, float *values) {
    for (long d = 0; d < width_of(a); d += 16) {
        float *to = values + d / PANEL * PANEL * ld + d % PANEL;
        int n = lanes(a->head_dim - d);
        for (long t = 0; t < count; t++) v_store(to + t * PANEL, v_load_any_n(v, t * a->ldv + d, n, 0));
    }
}

/* Scores s[0, count) become weights, zero outside [lo, hi); returns their sum.  scale > 0; bias: of key 0, or NULL. */
static float softmax(float *s, long lo, long hi, long count, float scale, const float *bias) {
    v16 factor = v_set1(scale * (float)LOG2E), most = v_set1(-INFINITY), total = v_zero(), out = v_set1(-INFINITY);
    v16 unscaled = v_set1(1.0f / scale);
    long start = lo & ~15L, end = round_up(hi, 16);
    for (long j = start; j < end; j += 16) {
        v16 v = v_load(s + j);
        if (bias) v_store(s + j, v = v_fma(v_load(bias + j), unscaled, v));
        if (j < lo || j + 16 > hi) v_store(s + j, v = v_keep(v, lanes(lo - j), lanes(hi - j), out));
        most = v_max(most, v);
    }
    v16 shift = v_set1(-v_hmax(most) * scale * (float)LOG2E);
    for (long j = 0; j < start; j += 16) v_store(s + j, v_zero());
    for (long j = start; j < end; j += 16) {
        v16 p = v_exp2(v_fma(v_load(s + j), factor, shift)); /* 0 where it is masked */
        v_store(s + j, p);
        total = v_add(total, p);
    }
    for (long j = end; j < count; j += 16) v_store(s + j, v_zero());
    return v_sum(total);
}

/* scores[rows][count] (rows `keys` floats apart) = queries x panels of keys. */
static void products(const float *q, long ldq, long rows, const float *panels, long dim, long count, float *scores,
                     long keys) {
    long t = 0;
#if WIDE_ROWS
    ahead nothing = {(const char *)panels, 0};
    for (; t + 2 * PANEL <= count; t += 2 * PANEL)
        for (long r = 0, some; r < rows; r += some) {
            some = even_rows(rows - r, WIDE_ROWS);
            wide_f32[some](q + r * ldq, ldq, panels + t * dim, dim * PANEL, dim, scores + r * keys + t, keys, nothing);
        }
#endif
    for (; t < count; t += PANEL) tile_f32[rows](q, ldq, panels + t * dim, dim, scores + t, keys, 0);
}

static void run_item(const plan *p, const item *it, float *work) {
    const packed_attention_args *a = p->a;
    long base = a->starts[it->sequence], n = a->starts[it->sequence + 1] - base, dim = a->head_dim, width = width_of(a);
    long kv = it->head / (a->heads / a->kv_heads), origin = first_key(a, it->from), limit = end_key(a, it->to, n);
    long keys = round_up(limit - origin, PANEL);
    float *panels = work, *values = panels + keys * dim, *scores = values + keys * width, *out = scores + TILE_ROWS * keys;
    load_keys(a, a->k + (base + origin) * a->ldk + kv * dim, limit - origin, panels);
    load_values(a, a->v + (base + origin) * a->ldv + kv * dim, limit - origin, keys, values);
    for (long row = it->from, rows; row < it->to; row += rows) {
        rows = tile_rows(it->to - row);
        long skip = first_key(a, row) - origin, count = end_key(a, row + rows, n) - origin - skip;
        const float *q = a->q + (base + row) * a->ldq + it->head * dim;
        float inverse[TILE_ROWS];
        products(q, a->ldq, rows, panels + skip * dim, dim, count, scores, keys);
        for (long r = 0; r < rows; r++) {
            long me = row + r, seen = a->window && me > a->window ? me - a->window : 0;
            long shift = origin + skip; /* the key of scores[0] */
            const float *bias = a->bias ? a->bias + it->head * BIAS_STRIDE(a->span) + a->span - 1 - me + shift : NULL;
            inverse[r] = 1.0f / softmax(scores + r * keys, seen - shift,
                                        (a->window ? least(n, me + a->window + 1) : n) - shift, count, (float)a->scale,
                                        bias);
        }
        for (long d = 0; d < width; d += PANEL) {
            tile_f32[rows](scores, keys, values + d * keys + skip * PANEL, count, out, PANEL, 0);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < PANEL && d + i < dim; i += 16)
                    v_store_any_n(a->out, (base + row + r) * a->ldo + it->head * dim + d + i,
                                  v_mul(v_load(out + r * PANEL + i), v_set1(inverse[r])), lanes(dim - d - i), 0);
        }
    }
}

static void team(int tid, int size, void *arg) {
    plan *p = arg;
    long end;
    for (long i; (i = team_take(p->count, 1, &end)) >= 0;)
        for (; i < end; i++) run_item(p, p->items + i, p->work + p->work_floats * tid);
    team_barrier(size);
}

/* Counts the items, and writes them when there is room. */
static void make_items(plan *p) {
    const packed_attention_args *a = p->a;
    p->count = 0;
    for (long s = 0; s < a->sequences; s++)
        for (long from = 0, n = a->starts[s + 1] - a->starts[s]; from < n; from += ITEM_TOKENS)
            for (long h = 0; h < a->heads; h++, p->count++)
                if (p->items)
                    p->items[p->count] = (item){(int32_t)s, (int32_t)h, (int32_t)from,
                                                (int32_t)least(from + ITEM_TOKENS, n)};
}

/* Entry point for Python.  0; -1 without memory; -2 when an index is out of range. */
int q_packed_attention(const packed_attention_args *a) {
    plan p = {.a = a};
    if (a->starts[0] || a->starts[a->sequences] != a->rows) return -2;
    for (long s = 0; s < a->sequences; s++) {
        long n = a->starts[s + 1] - a->starts[s];
        if (n < 0 || (a->bias && n > a->span)) return -2;
        if (n > p.longest) p.longest = n;
    }
    make_items(&p);
    p.work_floats = work_floats(a, p.longest);
    pool_enter();
    size_t bytes = (size_t)(p.work_floats * pool_size()) * sizeof(float);
    p.work = pool_scratch(bytes + (size_t)p.count * sizeof(item));
    if (p.work) {
        p.items = (item *)((char *)p.work + bytes);
        make_items(&p);
        pool_run(team, &p, a->rows * p.longest * a->heads * a->head_dim);
    }
    pool_leave();
    return p.work ? 0 : -1;
}
