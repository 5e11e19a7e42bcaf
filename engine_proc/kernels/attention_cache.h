/* How attention reads the cache: keys and values of one chunk as panels for many rows, or used directly for a few.
 *
 * Owns: the workspace of a work item and everything that touches cache memory.  Included by attention_core.c alone.
 */
#ifndef QUARTET_ATTENTION_CACHE_H
#define QUARTET_ATTENTION_CACHE_H

#include "attention.h"
#include "tile.h"

typedef struct {
    long group, rows, dim, width; /* query heads of a token; rows = tokens * group; width = dim rounded up to 32 */
    long first;                   /* the first of those query heads */
    float *q, *keys, *values, *scores, *out, *total;
    float *max, *sum;             /* of the current part, [rows] and [rows][16 lanes] */
    float *total_max, *total_sum; /* of all parts so far */
} workspace;

INLINE int lanes(long left) { return left <= 0 ? 0 : left < 16 ? (int)left : 16; }

/* What is asked of memory while something else is computed: the keys or the values of a chunk.  The processor's own
 * prefetcher does not follow one head's stride through the cache, and waiting for memory was two thirds of a decode step's
 * attention.  Spread thinly over the work, for a burst fills the few line buffers and stalls; and into the second cache,
 * for two chunks and what is made of them are more than the first one holds. */
typedef struct {
    const char *from;  /* the next of the lines at work, */
    long stride, left; /* bytes from one to the next, and how many are left */
    const long *at;    /* element offsets of the chunk's tokens, -1: none */
    const char *cache;
    long size, row;    /* bytes of an element and of all heads of a token */
    long token, line;  /* what comes after those: of sixteen tokens' rows one line each, or all */
    long lines;        /* of a row that are wanted */
    int stream;        /* whole rows are wanted, and those of sixteen tokens lie one behind another */
} upcoming;

static __attribute__((noinline)) void ask_next(upcoming *next) {
    next->left = 16;
    next->stride = 0; /* at the end: the same line again and again */
    if (next->token >= CHUNK || next->at[next->token] < 0) return;
    next->from = next->cache + next->at[next->token] * next->size + next->line * 64;
    next->stride = next->row;
    if (next->stream) {
        next->stride = 64;
        next->left = 16 * next->lines;
    } else if (++next->line < next->lines) {
        return;
    }
    next->line = 0;
    next->token += 16;
}

/* Asks for `count` lines more; a few behind the last one do no harm. */
INLINE void ask(upcoming *next, const int count) {
    if (next->left <= 0) ask_next(next);
    UNROLL for (int i = 0; i < count; i++) {
        _mm_prefetch(next->from, _MM_HINT_T1);
        next->from += next->stride;
    }
    next->left -= count;
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

/* keys[panel][dim][32] from 64 rows of the cache; rows that are not there become zero.  Meanwhile what is at
 * `next` is asked for. */
INLINE void load_keys(const attention_args *a, workspace *w, const long *at, upcoming *next, long n,
                      const int is_bf16) {
    const long size = is_bf16 ? 2 : 4, step = 64 / size; /* dims in sixteen 32-bit lanes */
    for (long t = 0; t < n; t += 16) {
        float *panel = w->keys + t / PANEL * w->dim * PANEL + t % PANEL;
        const char *row[16];
        int present = locate16(a->k_cache, at + t, n - t, row, is_bf16);
        for (long d = 0; d < w->dim; d += step) {
            int words = lanes((w->dim - d) * size / 4);
            ask(next, 16);
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

/* values[dim / 32][64][32] from n rows of the cache; rows that are not there and padding become zero. */
INLINE void load_values(const attention_args *a, workspace *w, const long *at, upcoming *next, long n,
                        const int is_bf16) {
    for (long t = 0; t < n; t++) {
        float *to = w->values + t * PANEL;
        long d = 0, dim = at[t] < 0 ? 0 : w->dim;
        for (; d + PANEL <= dim; d += PANEL, to += CHUNK * PANEL) {
            ask(next, is_bf16 ? 1 : 2);
            v_store(to, v_load_any(a->v_cache, at[t] + d, is_bf16));
            v_store(to + 16, v_load_any(a->v_cache, at[t] + d + 16, is_bf16));
        }
        for (; d < w->width; d += PANEL, to += CHUNK * PANEL) {
            v_store(to, v_load_any_n(a->v_cache, at[t] + d, lanes(dim - d), is_bf16));
            v_store(to + 16, v_load_any_n(a->v_cache, at[t] + d + 16, lanes(dim - d - 16), is_bf16));
        }
    }
}

#endif
