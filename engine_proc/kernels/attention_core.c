/* One work item of paged attention: online softmax in float32 over chunks of 64 tokens.
 *
 * Keys are transposed into [head_dim][32 tokens] panels and values widened into [64 tokens][32 dims] panels, after which
 * scores and outputs are register tiles (tile.h), for one decode row as for 96 prefill rows.
 * A row's result depends on its own context only: chunks and parts are aligned to positions, masked lanes add exact
 * zeros, and parts are merged in order.  Tokens beyond the context are never read (their slots may hold NaN).
 * Softmax over blocks: Milakov & Gimelshein 2018; split contexts: Dao et al., Flash-Decoding, 2023.
 */
#include "attention_few.h"

#define LOG2E 1.4426950408889634
#define RISE 8.0f

static long row_limit(const attention_args *a) {
    long group = a->q_heads / a->kv_heads;
    return group > ITEM_ROWS ? group : ITEM_ROWS;
}

static long width_of(const attention_args *a) { return (a->head_dim + PANEL - 1) / PANEL * PANEL; }

long attention_work_floats(const attention_args *a) {
    long rows = row_limit(a), width = width_of(a);
    return (rows * (3 * width + CHUNK + 19) + 2 * CHUNK * width + 15) & ~15L;
}

long attention_partial_floats(const attention_args *a, const attention_item *item) {
    return (item->to - item->from) * item->heads * (a->q_heads / a->kv_heads) * (width_of(a) + 2);
}

static workspace carve(const attention_args *a, const attention_item *item, float *work) {
    long limit = row_limit(a), group = a->q_heads / a->kv_heads;
    workspace w = {.group = group * item->heads, .first = item->kv_head * group, .dim = a->head_dim, .width = width_of(a)};
    w.rows = (item->to - item->from) * w.group;
    w.keys = work;
    w.values = w.keys + CHUNK * w.width;
    w.q = w.values + CHUNK * w.width;
    w.out = w.q + limit * w.width;
    w.total = w.out + limit * w.width;
    w.scores = w.total + limit * w.width;
    w.max = w.scores + limit * CHUNK;
    w.sum = w.max + limit;
    w.total_max = w.sum + 16 * limit;
    w.total_sum = w.total_max + limit;
    return w;
}

/* Scores come out in base 2, or ready for the soft cap. */
static void load_queries(const attention_args *a, const attention_item *item, workspace *w) {
    long row0 = a->query_starts[item->sequence] + item->from;
    v16 scale = v_set1((float)(a->scale * (a->softcap > 0 ? 1.0 / a->softcap : LOG2E)));
    for (long r = 0; r < w->rows; r++) {
        long at = (row0 + r / w->group) * a->ldq + (w->first + r % w->group) * w->dim;
        for (long d = 0; d < w->width; d += 16) /* to the end: padding must be zero */
            v_store(w->q + r * w->width + d,
                    v_mul(v_load_any_n(a->q, at + d, lanes(w->dim - d), (int)a->is_bf16), scale));
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

static void scale_row(float *x, long n, v16 factor) {
    for (long i = 0; i < n; i += 16) v_store(x + i, v_mul(v_load(x + i), factor));
}

/* The largest of n scores of a row, in base 2; lanes outside [lo, hi) become minus infinity.  `whole`: nothing is masked
 * and n is CHUNK. */
INLINE float most_body(const attention_args *a, float *s, long lo, long hi, long n, const int whole, const int capped) {
    v16 most = v_set1(-INFINITY), cap = v_set1((float)(a->softcap * LOG2E));
    UNROLL for (long i = 0; i < CHUNK; i += 16) {
        if (!whole && i >= n) break;
        v16 v = v_load(s + i);
        if (capped) v = v_mul(cap, v_tanh(v));
        if (!whole) v = v_keep(v, lanes(lo - i), lanes(hi - i), v_set1(-INFINITY));
        if (capped || !whole) v_store(s + i, v);
        most = v_max(most, v);
    }
    return v_hmax(most);
}

static float most_of(const attention_args *a, float *s, long lo, long hi, long n) {
    if (lo <= 0 && hi == CHUNK) return a->softcap > 0 ? most_body(a, s, lo, hi, n, 1, 1) : most_body(a, s, lo, hi, n, 1, 0);
    return a->softcap > 0 ? most_body(a, s, lo, hi, n, 0, 1) : most_body(a, s, lo, hi, n, 0, 0);
}

/* Weights refer to a maximum of the row.  They follow it to a new one only when that is RISE larger, in base 2: until then
 * weights stay below 2^RISE, and what was summed is rarely scaled. */
static void raise(workspace *w, long row, float most) {
    float old = w->max[row];
    if (!(most > old + RISE)) return;
    v16 alpha = v_exp2(v_set1(old - most)); /* 0 for the first chunk */
    scale_row(w->sum + 16 * row, 16, alpha);
    scale_row(w->out + row * w->width, w->width, alpha);
    w->max[row] = most;
}

/* n scores of a row become weights, which are added up lane by lane. */
INLINE void weigh_row(workspace *w, long row, long n) {
    float *s = w->scores + row * CHUNK, most = w->max[row];
    v16 shift = v_set1(most > -INFINITY ? most : 0.0f), total = v_load(w->sum + 16 * row);
    UNROLL for (long i = 0; i < CHUNK; i += 16) {
        if (i >= n) break;
        v16 p = v_exp2(v_sub(v_load(s + i), shift));
        v_store(s + i, p);
        total = v_add(total, p);
    }
    v_store(w->sum + 16 * row, total);
}

/* Scores of the rows of one kv head become weights.  One loop after the other: a row's steps wait for each other, those of
 * several rows need not. */
static void weigh_rows(const attention_args *a, const attention_item *item, workspace *w, long start, long n, long from,
                       long to) {
    long position = a->context_lens[item->sequence] -
                    (a->query_starts[item->sequence + 1] - a->query_starts[item->sequence]) + item->from;
    float most[TILE_ROWS];
    for (long row = from, end; row < to; row = end) {
        end = to - row < TILE_ROWS ? to : row + TILE_ROWS;
        for (long r = row; r < end; r++) {
            long me = position + r / w->group, lo = a->window ? me - a->window + 1 - start : 0;
            long hi = a->causal && me + 1 - start < n ? me + 1 - start : n;
            most[r - row] = most_of(a, w->scores + r * CHUNK, lo > 0 ? lo : 0, hi, n);
        }
        for (long r = row; r < end; r++) raise(w, r, most[r - row]);
        if (n == CHUNK)
            for (long r = row; r < end; r++) weigh_row(w, r, CHUNK);
        else
            for (long r = row; r < end; r++) weigh_row(w, r, n);
    }
}

static void score_tiles(workspace *w, long row, long rows, long n) {
    for (long p = 0; p * PANEL < n; p++)
        tile_f32[rows](w->q + row * w->width, w->width, w->keys + p * w->dim * PANEL, w->dim,
                       w->scores + row * CHUNK + p * PANEL, CHUNK, 0);
}

static void load_panels(const attention_args *a, workspace *w, const long *at, upcoming *next, long n) {
    if (a->cache_bf16) load_keys(a, w, at, next, n, 1);
    else load_keys(a, w, at, next, n, 0);
}

/* One chunk of n tokens whose rows are at `at`, for many rows of one kv head. */
static void many_run(const attention_args *a, const attention_item *item, workspace *w, long start, long n,
                     const long *at, upcoming *next_keys, upcoming *next_values) {
    load_panels(a, w, at, next_keys, n);
    if (a->cache_bf16) load_values(a, w, at, next_values, n, 1);
    else load_values(a, w, at, next_values, n, 0);
    for (long row = 0, rows; row < w->rows; row += rows) {
        rows = tile_rows(w->rows - row);
        score_tiles(w, row, rows, n);
        weigh_rows(a, item, w, start, n, row, row + rows);
        for (long d = 0; d < w->width; d += PANEL)
            tile_f32[rows](w->scores + row * CHUNK, CHUNK, w->values + d * CHUNK, n, w->out + row * w->width + d,
                           w->width, 1);
    }
}

/* Scores of a chunk for few rows of one kv head. */
static void score_head(const attention_args *a, workspace *w, const long *at, upcoming *next, long n) {
    if (score_few(a, w, at, next, n)) return;
    load_panels(a, w, at, next, n);
    for (long row = 0, rows; row < w->rows; row += rows) {
        rows = tile_rows(w->rows - row);
        score_tiles(w, row, rows, n);
    }
}

/* The part of an item's workspace that belongs to one of its heads. */
static workspace space_of(const workspace *w, long head, long rows) {
    workspace mine = *w;
    mine.rows = rows;
    mine.q += head * rows * w->width;
    mine.out += head * rows * w->width;
    mine.scores += head * rows * CHUNK;
    mine.max += head * rows;
    mine.sum += 16 * head * rows;
    return mine;
}

/* One chunk of n tokens whose rows are at `at`; the rows at `next` come after it.  With few rows the keys of all heads come
 * first, meanwhile the values are asked for, and during those the next keys: so that what was asked for is still there. */
static void chunk_run(const attention_args *a, const attention_item *item, const workspace *w, long start, long n,
                      const long *at, const long *next) {
    long rows = w->rows / item->heads, bytes = w->dim * (a->cache_bf16 ? 2 : 4);
    int few = rows <= FEW_ROWS;
    attention_args shifted = *a;
    upcoming keys = {.at = next, .cache = a->k_cache, .size = a->cache_bf16 ? 2 : 4, .lines = (item->heads * bytes + 63) / 64,
                     .stream = item->heads == a->kv_heads && a->block_size % 16 == 0};
    keys.row = a->kv_heads * a->head_dim * keys.size;
    upcoming values = keys;
    values.at = few ? at : next;
    values.cache = a->v_cache;
    for (long head = 0; head < item->heads; head++) {
        workspace mine = space_of(w, head, rows);
        shifted.k_cache = (const char *)a->k_cache + head * bytes;
        shifted.v_cache = (const char *)a->v_cache + head * bytes;
        if (few) score_head(&shifted, &mine, at, &values, n);
        else many_run(&shifted, item, &mine, start, n, at, &keys, &values);
    }
    if (!few) return;
    workspace all = *w;
    weigh_rows(a, item, &all, start, n, 0, w->rows);
    for (long head = 0; head < item->heads; head++) {
        workspace mine = space_of(w, head, rows);
        shifted.v_cache = (const char *)a->v_cache + head * bytes;
        add_few(&shifted, &mine, at, &keys, n);
    }
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

static void reset(float *max, float *sum, long sums, float *out, long rows, long width) {
    for (long r = 0; r < rows; r++) max[r] = -INFINITY;
    memset(sum, 0, (size_t)sums * 4);
    memset(out, 0, (size_t)(rows * width) * 4);
}

static void finish(const attention_args *a, const attention_item *item, workspace *w) {
    long row0 = a->query_starts[item->sequence] + item->from;
    int apart = outputs_apart(a, w->rows / item->heads);
    for (long r = 0; r < w->rows; r++) {
        long at = (row0 + r / w->group) * a->ldo + (w->first + r % w->group) * w->dim;
        v16 inverse = v_set1(1.0f / w->total_sum[r]);
        for (long d = 0; d < w->dim; d += PANEL) {
            v16 lo = v_mul(v_load(w->total + r * w->width + d), inverse);
            v16 hi = v_mul(v_load(w->total + r * w->width + d + 16), inverse);
            if (apart) v_zip(&lo, &hi);
            v_store_any_n(a->out, at + d, lo, lanes(w->dim - d), (int)a->out_bf16);
            v_store_any_n(a->out, at + d + 16, hi, lanes(w->dim - d - 16), (int)a->out_bf16);
        }
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
    for (long r = 0; r < w->rows; r++) to[w->rows + r] = v_sum(v_load(w->sum + 16 * r));
    memcpy(to + 2 * w->rows, w->out, (size_t)(w->rows * w->width) * 4);
}

void attention_item_run(const attention_plan *plan, const attention_item *item, const attention_item *after,
                        float *work) {
    const attention_args *a = plan->args;
    workspace w = carve(a, item, work);
    span s = visible(a, item);
    long rows[2][CHUNK], *at = rows[0], *next = rows[1], n = chunk_at(a, item, &s, s.start, at);
    load_queries(a, item, &w);
    reset(w.total_max, w.total_sum, w.rows, w.total, w.rows, w.width);
    reset(w.max, w.sum, 16 * w.rows, w.out, w.rows, w.width);
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
        for (long r = 0; r < w.rows; r++) merge_row(&w, r, w.max[r], v_sum(v_load(w.sum + 16 * r)), w.out + r * w.width);
        reset(w.max, w.sum, 16 * w.rows, w.out, w.rows, w.width);
    }
    finish(a, item, &w);
}

void attention_merge_run(const attention_plan *plan, const attention_item *item, float *work) {
    const attention_args *a = plan->args;
    workspace w = carve(a, item, work);
    reset(w.total_max, w.total_sum, w.rows, w.total, w.rows, w.width);
    const float *from = plan->partials + item->partial;
    for (long part = item->part; part < item->part_end; part++, from += attention_partial_floats(a, item))
        for (long r = 0; r < w.rows; r++)
            merge_row(&w, r, from[r], from[w.rows + r], from + 2 * w.rows + r * w.width);
    finish(a, item, &w);
}
