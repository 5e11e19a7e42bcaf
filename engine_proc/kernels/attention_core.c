/* One work item of paged attention: online softmax in float32 over chunks of 64 tokens.
 *
 * Keys are transposed into [head_dim][32 tokens] panels and values widened into [64 tokens][32 dims] panels, after which
 * scores and outputs are register tiles (tile.h), for one decode row as for 48 prefill rows.
 * A row's result depends on its own context only: chunks and parts are aligned to positions, masked lanes add exact
 * zeros, and parts are merged in order.  Tokens beyond the context are never read (their slots may hold NaN).
 * Softmax over blocks: Milakov & Gimelshein 2018; split contexts: Dao et al., Flash-Decoding, 2023.
 */
#include "attention.h"

#include "tile.h"

typedef struct {
    long group, rows, dim, width; /* query heads per kv head; rows = tokens * group; width = dim rounded up to 32 */
    float *q, *keys, *values, *scores, *out, *total;
    float *max, *sum;             /* of the current part, [rows] */
    float *total_max, *total_sum; /* of all parts so far */
} workspace;

static long row_limit(const attention_args *a) {
    long group = a->q_heads / a->kv_heads;
    return group > ITEM_ROWS ? group : ITEM_ROWS;
}

static long width_of(const attention_args *a) { return (a->head_dim + PANEL - 1) / PANEL * PANEL; }

long attention_work_floats(const attention_args *a) {
    long rows = row_limit(a), width = width_of(a);
    return (rows * (3 * width + CHUNK + 4) + 2 * CHUNK * width + 15) & ~15L;
}

long attention_partial_floats(const attention_args *a, const attention_item *item) {
    return (item->to - item->from) * (a->q_heads / a->kv_heads) * (width_of(a) + 2);
}

static workspace carve(const attention_args *a, const attention_item *item, float *work) {
    workspace w = {.group = a->q_heads / a->kv_heads, .dim = a->head_dim, .width = width_of(a)};
    long limit = row_limit(a);
    w.rows = (item->to - item->from) * w.group;
    w.keys = work;
    w.values = w.keys + CHUNK * w.width;
    w.q = w.values + CHUNK * w.width;
    w.out = w.q + limit * w.width;
    w.total = w.out + limit * w.width;
    w.scores = w.total + limit * w.width;
    w.max = w.scores + limit * CHUNK;
    w.sum = w.max + limit;
    w.total_max = w.sum + limit;
    w.total_sum = w.total_max + limit;
    return w;
}

INLINE int lanes(long left) { return left <= 0 ? 0 : left < 16 ? (int)left : 16; }

static void load_queries(const attention_args *a, const attention_item *item, workspace *w) {
    long row0 = a->query_starts[item->sequence] + item->from;
    for (long r = 0; r < w->rows; r++) {
        long at = (row0 + r / w->group) * a->ldq + (item->kv_head * w->group + r % w->group) * w->dim;
        for (long d = 0; d < w->dim; d += 16)
            v_store(w->q + r * w->width + d, v_load_any_n(a->q, at + d, lanes(w->dim - d), (int)a->is_bf16));
    }
}

/* Element offsets in the cache of tokens [start, start + n) for one kv head; -1 below `seen`, where the window of every
 * row has passed and the block may be another request's by now. */
static void locate(const attention_args *a, const attention_item *item, long start, long n, long seen, long *at) {
    const int32_t *table = a->block_tables + item->sequence * a->ld_table;
    long stride = a->kv_heads * a->head_dim, t = 0;
    for (; t < n && start + t < seen; t++) at[t] = -1;
    long block = (start + t) / a->block_size, offset = (start + t) % a->block_size;
    for (; t < n; t++) {
        at[t] = ((long)table[block] * a->block_size + offset) * stride + item->kv_head * a->head_dim;
        if (++offset == a->block_size) {
            offset = 0;
            block++;
        }
    }
}

/* keys[panel][dim][32] from 64 rows of the cache; rows that are not there become zero. */
INLINE void load_keys(const attention_args *a, workspace *w, const long *at, long n, const int is_bf16) {
    const long per_vector = is_bf16 ? 32 : 16; /* elements in sixteen 32-bit lanes */
    for (long t = 0; t < n; t += 16) {
        float *panel = w->keys + t / PANEL * w->dim * PANEL + t % PANEL;
        for (long d = 0; d < w->dim; d += per_vector) {
            v16 r[16];
            int left = (int)(w->dim - d < per_vector ? w->dim - d : per_vector), words = is_bf16 ? left / 2 : left;
            for (long i = 0; i < 16; i++) {
                if (t + i >= n || at[t + i] < 0) {
                    r[i] = v_zero();
                    continue;
                }
                const char *p = (const char *)a->k_cache + (at[t + i] + d) * (is_bf16 ? 2 : 4);
                r[i] = words == 16 ? v_load((const float *)p) : v_load_n((const float *)p, words);
            }
            v_transpose16(r);
            for (int i = 0; i < words; i++) {
                float *to = panel + (d + (is_bf16 ? 2 * i : i)) * PANEL;
                if (is_bf16) {
                    v_store(to, v_pair_even(r[i]));
                    v_store(to + PANEL, v_pair_odd(r[i]));
                } else {
                    v_store(to, r[i]);
                }
            }
        }
    }
}

/* values[dim / 32][64][32] from n rows of the cache; the padding of the last panel becomes zero. */
INLINE void load_values(const attention_args *a, workspace *w, const long *at, long n, const int is_bf16) {
    for (long t = 0; t < n; t++)
        for (long d = 0; d < w->width; d += 16) {
            int left = lanes(w->dim - d);
            v16 v = left && at[t] >= 0 ? v_load_any_n(a->v_cache, at[t] + d, left, is_bf16) : v_zero();
            v_store(w->values + d / PANEL * CHUNK * PANEL + t * PANEL + d % PANEL, v);
        }
}

static void scale_row(float *x, long n, float factor) {
    v16 f = v_set1(factor);
    for (long i = 0; i < n; i += 16) v_store(x + i, v_mul(v_load(x + i), f));
}

/* Scores of one row for tokens [0, n) of a chunk become weights; lanes outside [lo, hi) become zero. */
static void softmax_row(const attention_args *a, workspace *w, long row, long lo, long hi, long n) {
    float *s = w->scores + row * CHUNK;
    v16 minus_inf = v_set1(-INFINITY), scale = v_set1((float)a->scale), most = minus_inf, total = v_zero();
    if (hi <= lo) {
        for (long i = 0; i < n; i += 16) v_store(s + i, v_zero());
        return;
    }
    for (long i = 0; i < n; i += 16) {
        v16 v = v_mul(v_load(s + i), scale);
        if (a->softcap > 0) {
            v16 cap = v_set1((float)a->softcap);
            v = v_mul(cap, v_tanh(v_div(v, cap)));
        }
        int from = lanes(lo - i), to = lanes(hi - i);
        if (from > 0 || to < 16) v = v_keep(v, from, to, minus_inf);
        v_store(s + i, v);
        most = v_max(most, v);
    }
    float old = w->max[row], now = v_hmax(most);
    now = now > old ? now : old;
    v16 shift = v_set1(now);
    for (long i = 0; i < n; i += 16) {
        v16 p = v_exp(v_sub(v_load(s + i), shift));
        int from = lanes(lo - i), to = lanes(hi - i);
        if (from > 0 || to < 16) p = v_keep(p, from, to, v_zero());
        v_store(s + i, p);
        total = v_add(total, p);
    }
    if (now > old) {
        float alpha = expf(old - now); /* 0 for the first chunk */
        w->sum[row] *= alpha;
        scale_row(w->out + row * w->width, w->width, alpha);
        w->max[row] = now;
    }
    w->sum[row] += v_sum(total);
}

static void chunk_run(const attention_args *a, const attention_item *item, workspace *w, long start, long n, long seen) {
    long at[CHUNK];
    locate(a, item, start, n, seen, at);
    if (a->cache_bf16) load_keys(a, w, at, n, 1);
    else load_keys(a, w, at, n, 0);
    if (a->cache_bf16) load_values(a, w, at, n, 1);
    else load_values(a, w, at, n, 0);
    long position = a->context_lens[item->sequence] -
                    (a->query_starts[item->sequence + 1] - a->query_starts[item->sequence]) + item->from;
    for (long row = 0, rows; row < w->rows; row += rows) {
        rows = tile_rows(w->rows - row);
        for (long p = 0; p * PANEL < n; p++)
            tile_f32[rows](w->q + row * w->width, w->width, w->keys + p * w->dim * PANEL, w->dim,
                           w->scores + row * CHUNK + p * PANEL, CHUNK, 0);
        for (long r = row; r < row + rows; r++) {
            long me = position + r / w->group, lo = a->window ? me - a->window + 1 - start : 0;
            long hi = a->causal && me + 1 - start < n ? me + 1 - start : n;
            softmax_row(a, w, r, lo > 0 ? lo : 0, hi, n);
        }
        for (long d = 0; d < w->width; d += PANEL)
            tile_f32[rows](w->scores + row * CHUNK, CHUNK, w->values + d * CHUNK, n, w->out + row * w->width + d,
                           w->width, 1);
    }
}

/* total <- total merged with a part that has the given maximum, sum and unnormalised output. */
static void merge_row(workspace *w, long row, float max, float sum, const float *out) {
    float *total = w->total + row * w->width;
    if (sum == 0.0f) return; /* the part is masked for this row */
    float now = max > w->total_max[row] ? max : w->total_max[row];
    float a = expf(w->total_max[row] - now), b = expf(max - now);
    w->total_sum[row] = w->total_sum[row] * a + sum * b;
    w->total_max[row] = now;
    for (long d = 0; d < w->width; d += 16)
        v_store(total + d, v_fma(v_load(total + d), v_set1(a), v_mul(v_load(out + d), v_set1(b))));
}

static void reset(float *max, float *sum, float *out, long rows, long width) {
    for (long r = 0; r < rows; r++) {
        max[r] = -INFINITY;
        sum[r] = 0.0f;
    }
    memset(out, 0, (size_t)(rows * width) * 4);
}

static void finish(const attention_args *a, const attention_item *item, workspace *w) {
    long row0 = a->query_starts[item->sequence] + item->from;
    for (long r = 0; r < w->rows; r++) {
        long at = (row0 + r / w->group) * a->ldo + (item->kv_head * w->group + r % w->group) * w->dim;
        v16 inverse = v_set1(1.0f / w->total_sum[r]);
        for (long d = 0; d < w->dim; d += 16)
            v_store_any_n(a->out, at + d, v_mul(v_load(w->total + r * w->width + d), inverse), lanes(w->dim - d),
                          (int)a->out_bf16);
    }
}

void attention_item_run(const attention_plan *plan, const attention_item *item, float *work) {
    const attention_args *a = plan->args;
    workspace w = carve(a, item, work);
    long context = a->context_lens[item->sequence];
    long base = context - (a->query_starts[item->sequence + 1] - a->query_starts[item->sequence]);
    long lo = a->window ? base + item->from - a->window + 1 : 0, hi = a->causal ? base + item->to : context;
    long aligned = lo > 0 ? lo / CHUNK * CHUNK : 0;
    load_queries(a, item, &w);
    reset(w.total_max, w.total_sum, w.total, w.rows, w.width);
    for (long part = item->part; part < item->part_end; part++) {
        long start = part * PART > aligned ? part * PART : aligned, end = (part + 1) * PART < hi ? (part + 1) * PART : hi;
        reset(w.max, w.sum, w.out, w.rows, w.width);
        for (; start < end; start += CHUNK)
            chunk_run(a, item, &w, start, end - start < CHUNK ? end - start : CHUNK, lo);
        if (item->partial >= 0) {
            float *to = plan->partials + item->partial;
            memcpy(to, w.max, (size_t)w.rows * 4);
            memcpy(to + w.rows, w.sum, (size_t)w.rows * 4);
            memcpy(to + 2 * w.rows, w.out, (size_t)(w.rows * w.width) * 4);
            return;
        }
        for (long r = 0; r < w.rows; r++) merge_row(&w, r, w.max[r], w.sum[r], w.out + r * w.width);
    }
    finish(a, item, &w);
}

void attention_merge_run(const attention_plan *plan, const attention_item *item, float *work) {
    const attention_args *a = plan->args;
    workspace w = carve(a, item, work);
    reset(w.total_max, w.total_sum, w.total, w.rows, w.width);
    const float *from = plan->partials + item->partial;
    for (long part = item->part; part < item->part_end; part++, from += attention_partial_floats(a, item))
        for (long r = 0; r < w.rows; r++)
            merge_row(&w, r, from[r], from[w.rows + r], from + 2 * w.rows + r * w.width);
    finish(a, item, &w);
}
