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

#define DIRECT_ROWS 8 /* up to here values are not widened into a panel */
#define LOG2E 1.4426950408889634

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

/* Asks for elements of a row of the next chunk (row -1: somewhere harmless) while this one is computed.  The processor's
 * own prefetcher does not follow one head's stride through the cache, and waiting for memory was two thirds of a decode
 * step's attention.  Spread thinly over the work: a burst would fill the few line buffers and stall. */
INLINE void ask(const void *cache, long element, const int is_bf16) {
    _mm_prefetch((const char *)cache + element * (is_bf16 ? 2 : 4), _MM_HINT_T1);
}

/* Sixteen rows of the cache become columns of a key panel; `words` 32-bit lanes of each, absent rows are NULL. */
INLINE void transpose_keys(const char *const row[16], long offset, int words, float *to, const int is_bf16,
                           const int whole) {
    v16 r[16];
    for (int i = 0; i < 16; i++) {
        const float *p = (const float *)(row[i] + offset);
        if (whole) r[i] = v_load(p);
        else r[i] = row[i] ? v_load_n(p, words) : v_zero();
    }
    v_transpose16(r);
    for (int i = 0; i < 16; i++, to += is_bf16 ? 2 * PANEL : PANEL) {
        if (!whole && i == words) break;
        if (is_bf16) {
            v_store(to, v_pair_even(r[i]));
            v_store(to + PANEL, v_pair_odd(r[i]));
        } else {
            v_store(to, r[i]);
        }
    }
}

/* keys[panel][dim][32] from 64 rows of the cache; rows that are not there become zero.  Meanwhile the keys at `next`
 * are asked for. */
INLINE void load_keys(const attention_args *a, workspace *w, const long *at, const long *next, long n,
                      const int is_bf16) {
    const long bytes = w->dim * (is_bf16 ? 2 : 4), step = is_bf16 ? 32 : 16; /* dims in sixteen 32-bit lanes */
    for (long t = 0; t < n; t += 16) {
        float *panel = w->keys + t / PANEL * w->dim * PANEL + t % PANEL;
        const char *row[16];
        int present = 1;
        for (long i = 0; i < 16; i++) {
            row[i] = t + i < n && at[t + i] >= 0 ? (const char *)a->k_cache + at[t + i] * (is_bf16 ? 2 : 4) : NULL;
            present &= row[i] != NULL;
        }
        for (long d = 0; d < w->dim; d += step) {
            long left = (bytes - d * (is_bf16 ? 2 : 4)) / 4, offset = d * (is_bf16 ? 2 : 4);
            for (long i = 0; i < 16; i++) ask(a->k_cache, next[t + i] + d, is_bf16);
            if (present && left >= 16) transpose_keys(row, offset, 16, panel + d * PANEL, is_bf16, 1);
            else transpose_keys(row, offset, left < 16 ? (int)left : 16, panel + d * PANEL, is_bf16, 0);
        }
    }
}

/* values[dim / 32][64][32] from n rows of the cache; rows that are not there and padding become zero. */
INLINE void load_values(const attention_args *a, workspace *w, const long *at, const long *next, long n,
                        const int is_bf16) {
    for (long t = 0; t < n; t++) {
        float *to = w->values + t * PANEL;
        long d = 0, dim = at[t] < 0 ? 0 : w->dim;
        for (; d + PANEL <= dim; d += PANEL, to += CHUNK * PANEL) {
            ask(a->v_cache, next[t] + d, is_bf16);
            if (!is_bf16) ask(a->v_cache, next[t] + d + 16, is_bf16);
            v_store(to, v_load_any(a->v_cache, at[t] + d, is_bf16));
            v_store(to + 16, v_load_any(a->v_cache, at[t] + d + 16, is_bf16));
        }
        for (; d < w->width; d += PANEL, to += CHUNK * PANEL) {
            v_store(to, v_load_any_n(a->v_cache, at[t] + d, lanes(dim - d), is_bf16));
            v_store(to + 16, v_load_any_n(a->v_cache, at[t] + d + 16, lanes(dim - d - 16), is_bf16));
        }
    }
}

/* out[rows][dim] += scores x values, straight from the cache: for the few rows of a decode step widening the values into
 * a panel first would cost more than it saves.  The same sums in the same order as by way of the panel. */
INLINE void add_values(const attention_args *a, workspace *w, const long *at, const long *next, long n, const int rows,
                       const int is_bf16, const int whole) {
    for (long d = 0; d < w->dim; d += 16 * TILE_VECS) {
        v16 acc[DIRECT_ROWS][TILE_VECS];
        const float *scores = w->scores;
        float *out = w->out + d;
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_load(out + r * w->width + 16 * j);
        for (long t = 0; t < n; t++) {
            if (TILE_VECS == 2 || d % 32 == 0) ask(a->v_cache, next[t] + d, is_bf16);
            if (!is_bf16 && TILE_VECS == 2) ask(a->v_cache, next[t] + d + 16, is_bf16);
            if (at[t] < 0) continue;
            long from = at[t] + d;
            v16 v[TILE_VECS];
            for (int j = 0; j < TILE_VECS; j++)
                v[j] = v_pin(whole ? v_load_any(a->v_cache, from + 16 * j, is_bf16)
                                   : v_load_any_n(a->v_cache, from + 16 * j, lanes(w->dim - d - 16 * j), is_bf16));
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
                v16 s = v_set1(scores[r * CHUNK + t]);
                for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_fma(s, v[j], acc[r][j]);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < TILE_VECS; j++) v_store(out + r * w->width + 16 * j, acc[r][j]);
    }
}

static void add_values_of(const attention_args *a, workspace *w, const long *at, const long *next, long n) {
    int whole = w->dim % (16 * TILE_VECS) == 0;
#define CASE(m)                                                            \
    case m:                                                                \
        if (a->cache_bf16 && whole) add_values(a, w, at, next, n, m, 1, 1);      \
        else if (a->cache_bf16) add_values(a, w, at, next, n, m, 1, 0);          \
        else if (whole) add_values(a, w, at, next, n, m, 0, 1);                  \
        else add_values(a, w, at, next, n, m, 0, 0);                             \
        break
    switch (w->rows) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
        CASE(5);
        CASE(6);
        CASE(7);
        CASE(8);
    }
}

static void scale_row(float *x, long n, v16 factor) {
    for (long i = 0; i < n; i += 16) v_store(x + i, v_mul(v_load(x + i), factor));
}

/* Scores of one row for tokens [0, n) of a chunk become weights; lanes outside [lo, hi) become zero.  `whole`: nothing is
 * masked and n is CHUNK.  Maxima and weights are in base 2. */
INLINE void softmax_body(const attention_args *a, workspace *w, long row, long lo, long hi, long n, const int whole,
                         const int capped) {
    float *s = w->scores + row * CHUNK;
    v16 scale = v_set1((float)(a->scale * (capped ? 1.0 / a->softcap : LOG2E))), total = v_zero();
    v16 cap = v_set1((float)(a->softcap * LOG2E)), most = v_set1(-INFINITY), v[CHUNK / 16];
    for (long i = 0; i < CHUNK / 16; i++) {
        if (!whole && 16 * i >= n) break;
        v[i] = v_mul(v_load(s + 16 * i), scale);
        if (capped) v[i] = v_mul(cap, v_tanh(v[i]));
        if (!whole) v[i] = v_keep(v[i], lanes(lo - 16 * i), lanes(hi - 16 * i), v_set1(-INFINITY));
        most = v_max(most, v[i]);
    }
    float old = w->max[row], now = v_hmax(most);
    now = now > old ? now : old;
    v16 shift = v_set1(now);
    for (long i = 0; i < CHUNK / 16; i++) {
        if (!whole && 16 * i >= n) break;
        v16 p = v_exp2(v_sub(v[i], shift));
        if (!whole) p = v_keep(p, lanes(lo - 16 * i), lanes(hi - 16 * i), v_zero());
        v_store(s + 16 * i, p);
        total = v_add(total, p);
    }
    float sum = w->sum[row];
    if (now > old) {
        v16 alpha = v_exp2(v_set1(old - now)); /* 0 for the first chunk */
        sum *= v_lane0(alpha);
        scale_row(w->out + row * w->width, w->width, alpha);
        w->max[row] = now;
    }
    w->sum[row] = sum + v_sum(total);
}

static void softmax_row(const attention_args *a, workspace *w, long row, long lo, long hi, long n) {
    int capped = a->softcap > 0;
    if (hi <= lo) {
        for (long i = 0; i < n; i += 16) v_store(w->scores + row * CHUNK + i, v_zero());
    } else if (lo <= 0 && hi == CHUNK) {
        if (capped) softmax_body(a, w, row, lo, hi, n, 1, 1);
        else softmax_body(a, w, row, lo, hi, n, 1, 0);
    } else {
        if (capped) softmax_body(a, w, row, lo, hi, n, 0, 1);
        else softmax_body(a, w, row, lo, hi, n, 0, 0);
    }
}

/* One chunk of n tokens whose rows are at `at`; the rows at `next` come after it. */
static void chunk_run(const attention_args *a, const attention_item *item, workspace *w, long start, long n,
                      const long *at, const long *next) {
    if (a->cache_bf16) load_keys(a, w, at, next, n, 1);
    else load_keys(a, w, at, next, n, 0);
    int direct = w->rows <= DIRECT_ROWS;
    if (!direct && a->cache_bf16) load_values(a, w, at, next, n, 1);
    else if (!direct) load_values(a, w, at, next, n, 0);
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
        for (long d = 0; d < w->width && !direct; d += PANEL)
            tile_f32[rows](w->scores + row * CHUNK, CHUNK, w->values + d * CHUNK, n, w->out + row * w->width + d,
                           w->width, 1);
    }
    if (direct) add_values_of(a, w, at, next, n);
}

/* total <- total merged with a part that has the given maximum, sum and unnormalised output. */
static void merge_row(workspace *w, long row, float max, float sum, const float *out) {
    float *total = w->total + row * w->width;
    if (sum == 0.0f) return; /* the part is masked for this row */
    float now = max > w->total_max[row] ? max : w->total_max[row];
    v16 a = v_exp2(v_set1(w->total_max[row] - now)), b = v_exp2(v_set1(max - now));
    w->total_sum[row] = w->total_sum[row] * v_lane0(a) + sum * v_lane0(b);
    w->total_max[row] = now;
    for (long d = 0; d < w->width; d += 16)
        v_store(total + d, v_fma(v_load(total + d), a, v_mul(v_load(out + d), b)));
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

typedef struct {
    long start, end, seen; /* tokens: chunk-aligned start, end, and the first that any row may see */
} span;

/* What an item reads of the context. */
static span visible(const attention_args *a, const attention_item *item) {
    long context = a->context_lens[item->sequence];
    long base = context - (a->query_starts[item->sequence + 1] - a->query_starts[item->sequence]);
    long seen = a->window ? base + item->from - a->window + 1 : 0, end = a->causal ? base + item->to : context;
    seen = seen > 0 ? seen : 0;
    long start = seen / CHUNK * CHUNK, first = (long)item->part * PART, last = (long)item->part_end * PART;
    return (span){start > first ? start : first, end < last ? end : last, seen};
}

/* Rows of the chunk at `start` of an item's span, all CHUNK entries (-1: none); returns its length. */
static long chunk_at(const attention_args *a, const attention_item *item, const span *s, long start, long *at) {
    long n = s->end - start < CHUNK ? s->end - start : CHUNK;
    if (n > 0) locate(a, item, start, n, s->seen, at);
    for (long t = n > 0 ? n : 0; t < CHUNK; t++) at[t] = -1;
    return n;
}

static void write_partial(const attention_plan *plan, const attention_item *item, const workspace *w) {
    float *to = plan->partials + item->partial;
    memcpy(to, w->max, (size_t)w->rows * 4);
    memcpy(to + w->rows, w->sum, (size_t)w->rows * 4);
    memcpy(to + 2 * w->rows, w->out, (size_t)(w->rows * w->width) * 4);
}

void attention_item_run(const attention_plan *plan, const attention_item *item, const attention_item *after,
                        float *work) {
    const attention_args *a = plan->args;
    workspace w = carve(a, item, work);
    span s = visible(a, item);
    long rows[2][CHUNK], *at = rows[0], *next = rows[1], n = chunk_at(a, item, &s, s.start, at);
    load_queries(a, item, &w);
    reset(w.total_max, w.total_sum, w.total, w.rows, w.width);
    reset(w.max, w.sum, w.out, w.rows, w.width);
    for (long start = s.start, following; n > 0; start += CHUNK, n = following) {
        following = chunk_at(a, item, &s, start + CHUNK, next);
        if (following <= 0 && after) {
            span then = visible(a, after);
            chunk_at(a, after, &then, then.start, next);
        }
        chunk_run(a, item, &w, start, n, at, next);
        long *swap = at;
        at = next;
        next = swap;
        if (following > 0 && (start + CHUNK) % PART) continue;
        if (item->partial >= 0) {
            write_partial(plan, item, &w);
            return;
        }
        for (long r = 0; r < w.rows; r++) merge_row(&w, r, w.max[r], w.sum[r], w.out + r * w.width);
        reset(w.max, w.sum, w.out, w.rows, w.width);
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
