/* How attention reads the cache: keys and values of one chunk as panels for many rows, or used directly for a few.
 *
 * Owns: the workspace of a work item and everything that touches cache memory.  Included by attention_core.c alone.
 */
#ifndef QUARTET_ATTENTION_CACHE_H
#define QUARTET_ATTENTION_CACHE_H

#include "attention.h"
#include "tile.h"

#define FEW_ROWS 8     /* most rows that do without a panel of values */
#define FEW_AT_ONCE 4  /* and of keys, where beyond that the panel's tiles win; values are added for so many at a time */

typedef struct {
    long group, rows, dim, width; /* query heads of a token; rows = tokens * group; width = dim rounded up to 32 */
    long first;                   /* the first of those query heads */
    float *q, *keys, *values, *scores, *out, *total;
    float *max, *sum;             /* of the current part, [rows] */
    float *total_max, *total_sum; /* of all parts so far */
} workspace;

INLINE int lanes(long left) { return left <= 0 ? 0 : left < 16 ? (int)left : 16; }

/* What is asked of memory while a chunk is computed: the next one.  The processor's own prefetcher does not follow one
 * head's stride through the cache, and waiting for memory was two thirds of a decode step's attention.  Spread thinly over
 * the work: a burst would fill the few line buffers and stall. */
typedef struct {
    const long *at;     /* element offsets of the tokens of the next chunk, -1: none */
    const void *k, *v;  /* the caches */
    long dim, row;      /* of a head and of all heads of a token, elements */
    long head, lines;   /* the head at work; cache lines of a token where all heads are asked for as one stream, else 0 */
} upcoming;

/* Sixteen lines of the next chunk to ask for: the share of 16 tokens and one line of dims.  With `lines` they are taken
 * in the order of memory, whatever the share: the processor's prefetcher follows that. */
typedef struct {
    const char *from;
    long stride;
} sixteen;

INLINE sixteen share_of(const upcoming *next, const void *cache, long t, long d, const int is_bf16) {
    const long size = is_bf16 ? 2 : 4, step = 64 / size; /* dims of a line */
    if (next->lines) {
        long turn = (next->head * (next->dim / step) + d / step) * (CHUNK / 16) + t / 16;
        long run = next->at[turn / next->lines * 16];
        return (sixteen){(const char *)cache + run * size + turn % next->lines * 1024, run < 0 ? 0 : 64};
    }
    return (sixteen){(const char *)cache + (next->at[t] + next->head * next->dim + d) * size,
                     next->at[t] < 0 ? 0 : next->row * size};
}

INLINE void ask(const upcoming *next, const void *cache, long t, long d, const int is_bf16) {
    _mm_prefetch(share_of(next, cache, t, d, is_bf16).from, _MM_HINT_T0);
}

INLINE void ask_one(sixteen *share) {
    _mm_prefetch(share->from, _MM_HINT_T0);
    share->from += share->stride;
}

/* Where 16 tokens' rows lie: pointers, NULL for a token that is not there; returns whether all are. */
INLINE int locate16(const void *cache, const long *at, long n, const char *row[16], const int is_bf16) {
    int present = 1;
    for (long i = 0; i < 16; i++) {
        row[i] = i < n && at[i] >= 0 ? (const char *)cache + at[i] * (is_bf16 ? 2 : 4) : NULL;
        present &= row[i] != NULL;
    }
    return present;
}

/* Sixteen rows of `words` 32-bit lanes from `offset` bytes on, absent ones and the rest zero, are copied to `lanes` and
 * `row` made to point there: so that there is one kind of code for whole and for partial rows. */
static __attribute__((noinline)) void pad_rows(const char *row[16], long offset, int words, float lanes[16 * 16]) {
    for (int i = 0; i < 16; i++, lanes += 16) {
        v_store(lanes, row[i] ? v_load_n((const float *)(const void *)(row[i] + offset), words) : v_zero());
        row[i] = (const char *)lanes;
    }
}

/* Sixteen rows become columns: r[i] holds 32-bit word i of each from `offset` bytes on. */
INLINE void load_columns(const char *const row[16], long offset, v16 r[16]) {
    UNROLL for (int i = 0; i < 16; i++) r[i] = v_load((const float *)(const void *)(row[i] + offset));
    v_transpose16(r);
}

INLINE void store_columns(const char *const row[16], long offset, int words, float *to, const int is_bf16) {
    v16 r[16];
    load_columns(row, offset, r);
    UNROLL for (int i = 0; i < 16; i++, to += is_bf16 ? 2 * PANEL : PANEL) {
        if (i == words) break;
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
INLINE void load_keys(const attention_args *a, workspace *w, const long *at, const upcoming *next, long n,
                      const int is_bf16) {
    const long size = is_bf16 ? 2 : 4, step = 64 / size; /* dims in sixteen 32-bit lanes */
    for (long t = 0; t < n; t += 16) {
        float *panel = w->keys + t / PANEL * w->dim * PANEL + t % PANEL;
        const char *row[16];
        int present = locate16(a->k_cache, at + t, n - t, row, is_bf16);
        for (long d = 0; d < w->dim; d += step) {
            int words = lanes((w->dim - d) * size / 4);
            sixteen share = share_of(next, next->k, t, d, is_bf16);
            for (int i = 0; i < 16; i++) ask_one(&share);
            _Alignas(64) float padded[16 * 16];
            const char *whole[16];
            int pad = !present || words < 16;
            if (pad) {
                memcpy(whole, row, sizeof whole);
                pad_rows(whole, d * size, words, padded);
            }
            store_columns(pad ? whole : row, pad ? 0 : d * size, words, panel + d * PANEL, is_bf16);
        }
    }
}

/* scores[rows] of 16 tokens (+)= q x the columns of one block of dims; q points to its first dim, `first`: so do the
 * scores. */
INLINE void score_columns(const char *const row[16], long offset, const float *q, long ldq, float *scores, sixteen share,
                          const int first, const int rows, const int is_bf16) {
    v16 r[16], acc[FEW_AT_ONCE];
    load_columns(row, offset, r);
    UNROLL for (int j = 0; j < rows; j++) acc[j] = first ? v_zero() : v_load(scores + j * CHUNK);
    UNROLL for (int i = 0; i < 16; i++, q += is_bf16 ? 2 : 1) {
        ask_one(&share);
        v16 even = is_bf16 ? v_pair_even(r[i]) : r[i];
        UNROLL for (int j = 0; j < rows; j++) acc[j] = v_fma(v_set1(q[j * ldq]), even, acc[j]);
        if (!is_bf16) continue;
        v16 odd = v_pair_odd(r[i]);
        UNROLL for (int j = 0; j < rows; j++) acc[j] = v_fma(v_set1(q[j * ldq + 1]), odd, acc[j]);
    }
    UNROLL for (int j = 0; j < rows; j++) v_store(scores + j * CHUNK, acc[j]);
}

/* scores[rows][n] for a few rows, keys used as they are transposed: a panel in between would cost as much again.  The
 * same sums in the same order as by way of the panel.  Tokens are the inner loop: their sums do not wait for each other. */
INLINE void score_keys(const attention_args *a, workspace *w, const long *at, const upcoming *next, long n, const int rows,
                       const int is_bf16) {
    const long size = is_bf16 ? 2 : 4, step = 64 / size;
    const char *row[CHUNK];
    int present[CHUNK / 16];
    for (long t = 0; t < n; t += 16) present[t / 16] = locate16(a->k_cache, at + t, n - t, row + t, is_bf16);
    for (long d = 0; d < w->dim; d += step) {
        int words = lanes((w->dim - d) * size / 4);
        for (long t = 0; t < n; t += 16) {
            sixteen share = share_of(next, next->k, t, d, is_bf16);
            _Alignas(64) float padded[16 * 16];
            const char *whole[16];
            int pad = !present[t / 16] || words < 16;
            if (pad) {
                memcpy(whole, row + t, sizeof whole);
                pad_rows(whole, d * size, words, padded);
            }
            score_columns(pad ? whole : row + t, pad ? 0 : d * size, w->q + d, w->width, w->scores + t, share, d == 0,
                          rows, is_bf16);
        }
    }
}

/* score_keys where the rows are few enough; 0 where they are not. */
static int score_few(const attention_args *a, workspace *w, const long *at, const upcoming *next, long n) {
#define CASE(m)                                                    \
    case m:                                                        \
        if (a->cache_bf16) score_keys(a, w, at, next, n, m, 1);    \
        else score_keys(a, w, at, next, n, m, 0);                  \
        return 1
    switch (w->rows) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef CASE
    return 0;
}

/* values[dim / 32][64][32] from n rows of the cache; rows that are not there and padding become zero. */
INLINE void load_values(const attention_args *a, workspace *w, const long *at, const upcoming *next, long n,
                        const int is_bf16) {
    for (long t = 0; t < n; t++) {
        float *to = w->values + t * PANEL;
        long d = 0, dim = at[t] < 0 ? 0 : w->dim;
        for (; d + PANEL <= dim; d += PANEL, to += CHUNK * PANEL) {
            ask(next, next->v, t, d, is_bf16);
            if (!is_bf16) ask(next, next->v, t, d + 16, is_bf16);
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
INLINE void add_values(const attention_args *a, const workspace *w, long row, const long *at, const upcoming *next,
                       long n, const int rows, const int is_bf16, const int whole) {
    const long step = is_bf16 ? 32 : 16; /* dims of a cache line */
    for (long d = 0; d < w->dim; d += 16 * TILE_VECS) {
        v16 acc[FEW_AT_ONCE][TILE_VECS];
        const float *scores = w->scores + row * CHUNK;
        float *out = w->out + row * w->width + d;
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_load(out + r * w->width + 16 * j);
        sixteen share = {a->v_cache, 0}, other = share;
        for (long t = 0; t < n; t++) {
            if (t % 16 == 0 && d % step == 0) share = share_of(next, next->v, t, d, is_bf16);
            if (t % 16 == 0 && step < 16 * TILE_VECS) other = share_of(next, next->v, t, d + step, is_bf16);
            if (d % step == 0) ask_one(&share);
            if (step < 16 * TILE_VECS) ask_one(&other);
            if (at[t] < 0) continue;
            long from = at[t] + d;
            v16 v[TILE_VECS];
            UNROLL for (int j = 0; j < TILE_VECS; j++)
                v[j] = v_pin(whole ? v_load_any(a->v_cache, from + 16 * j, is_bf16)
                                   : v_load_any_n(a->v_cache, from + 16 * j, lanes(w->dim - d - 16 * j), is_bf16));
            UNROLL for (int r = 0; r < rows; r++) {
                v16 s = v_set1(scores[r * CHUNK + t]);
                UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_fma(s, v[j], acc[r][j]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) v_store(out + r * w->width + 16 * j, acc[r][j]);
    }
}

/* add_values, at most four rows at a time: the second four find the values in the first cache. */
static void add_few(const attention_args *a, const workspace *w, const long *at, const upcoming *next, long n) {
    int whole = w->dim % (16 * TILE_VECS) == 0;
    for (long row = 0; row < w->rows; row += FEW_AT_ONCE) {
#define CASE(m)                                                                    \
    case m:                                                                        \
        if (a->cache_bf16 && whole) add_values(a, w, row, at, next, n, m, 1, 1);   \
        else if (a->cache_bf16) add_values(a, w, row, at, next, n, m, 1, 0);       \
        else if (whole) add_values(a, w, row, at, next, n, m, 0, 1);               \
        else add_values(a, w, row, at, next, n, m, 0, 0);                          \
        break
        switch (w->rows - row) {
            CASE(1);
            CASE(2);
            CASE(3);
        default:
            CASE(4);
        }
#undef CASE
    }
}

#endif
