/* Attention for the few rows of a decode step: keys are turned but not widened, values used straight from the cache.
 *
 * The same sums in the same order as by way of the panels of attention_cache.h, so that a row's result does not depend on
 * which of the two ways it goes.  A decode step is bound by memory if the arithmetic leaves it the time: products run in
 * as many independent chains as the registers hold, and every phase asks for what the next one reads.
 * Included by attention_core.c alone.
 */
#ifndef QUARTET_ATTENTION_FEW_H
#define QUARTET_ATTENTION_FEW_H

#include "attention_cache.h"

#define FEW_ROWS 8   /* most rows that do without a panel of values */
#define FEW_SCORED 4 /* and of keys, where beyond that the panel's tiles win */
#if defined(__AVX512F__)
#define FEW_AT_ONCE 4   /* rows to which values are added at a time */
#define GROUPS_AT_ONCE 4 /* groups of 16 tokens that are scored side by side */
#define LINES_AT_ONCE 2 /* cache lines of a value's dims that are added side by side */
/* lines that are asked for with each turn of 16 x 16 words and with each word's products: together those of the values */
#define ASK_TURNING 8
#define ASK_SCORING 2
#else
#define FEW_AT_ONCE 2
#define GROUPS_AT_ONCE 1
#define LINES_AT_ONCE 1
#define ASK_TURNING 16
#define ASK_SCORING 0
#endif

/* keys[word][64 tokens] from n rows of the cache, a word being a pair of bfloat16 or a float; rows that are not there
 * become zero, up to a multiple of 16. */
INLINE void turn_keys(const attention_args *a, workspace *w, const long *at, upcoming *next, long n,
                      const int is_bf16) {
    const long size = is_bf16 ? 2 : 4, step = 64 / size;
    for (long t = 0; t < n; t += 16) {
        const char *row[16];
        int present = locate16(a->k_cache, at + t, n - t, row, is_bf16);
        for (long d = 0; d < w->dim; d += step) {
            int words = lanes((w->dim - d) * size / 4), pad = !present || words < 16;
            float *to = w->keys + d * size / 4 * CHUNK + t;
            ask(next, ASK_TURNING);
            _Alignas(64) float padded[16 * 16];
            const char *whole[16];
            v16 r[16];
            if (pad) {
                memcpy(whole, row, sizeof whole);
                pad_rows(whole, d * size, words, padded);
            }
            load_columns(pad ? whole : row, pad ? 0 : d * size, r);
            UNROLL for (int i = 0; i < 16; i++) {
                if (i < words) v_store(to + i * CHUNK, r[i]);
            }
        }
    }
}

/* scores[rows] of `groups` x 16 tokens from turned keys. */
INLINE void score_groups(const workspace *w, upcoming *next, long t, const int groups, const int rows, const int is_bf16) {
    const long words = is_bf16 ? w->dim / 2 : w->dim;
    const float *keys = w->keys + t, *q = w->q;
    v16 acc[FEW_SCORED][GROUPS_AT_ONCE], even[GROUPS_AT_ONCE], odd[GROUPS_AT_ONCE];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int g = 0; g < groups; g++) acc[r][g] = v_zero();
    for (long i = 0; i < words; i++, keys += CHUNK, q += is_bf16 ? 2 : 1) {
        if (ASK_SCORING && groups == GROUPS_AT_ONCE) ask(next, ASK_SCORING);
        UNROLL for (int g = 0; g < groups; g++) {
            even[g] = v_load(keys + 16 * g);
            if (!is_bf16) continue;
            odd[g] = v_pair_odd(even[g]);
            even[g] = v_pair_even(even[g]);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            v16 x = v_set1(q[r * w->width]);
            UNROLL for (int g = 0; g < groups; g++) acc[r][g] = v_fma(x, even[g], acc[r][g]);
        }
        if (!is_bf16) continue;
        UNROLL for (int r = 0; r < rows; r++) {
            v16 x = v_set1(q[r * w->width + 1]);
            UNROLL for (int g = 0; g < groups; g++) acc[r][g] = v_fma(x, odd[g], acc[r][g]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int g = 0; g < groups; g++) v_store(w->scores + r * CHUNK + t + 16 * g, acc[r][g]);
}

INLINE void score_turned(const workspace *w, upcoming *next, long n, const int rows, const int is_bf16) {
    long t = 0;
    for (; t + 16 * GROUPS_AT_ONCE <= n; t += 16 * GROUPS_AT_ONCE) score_groups(w, next, t, GROUPS_AT_ONCE, rows, is_bf16);
    for (; t < n; t += 16) score_groups(w, next, t, 1, rows, is_bf16);
}

/* scores[rows][n] where the rows are few enough; 0 where they are not. */
static int score_few(const attention_args *a, workspace *w, const long *at, upcoming *next, long n) {
    if (w->rows > FEW_SCORED || w->dim % 2) return 0;
    if (a->cache_bf16) turn_keys(a, w, at, next, n, 1);
    else turn_keys(a, w, at, next, n, 0);
#define CASE(m)                                     \
    case m:                                         \
        if (a->cache_bf16) score_turned(w, next, n, m, 1); \
        else score_turned(w, next, n, m, 0);              \
        break
    switch (w->rows) {
        CASE(1);
        CASE(2);
        CASE(3);
        CASE(4);
    }
#undef CASE
    return 1;
}

/* Whether rows' outputs hold, of each 32 dims, first the even ones and then the odd ones: as pairs of bfloat16 come apart. */
INLINE int outputs_apart(const attention_args *a, long rows) { return a->cache_bf16 && rows <= FEW_ROWS; }

/* out[rows][dim] += scores x values, straight from the cache: for the few rows of a decode step widening the values into
 * a panel first would cost more than it saves.  Dims from d on, `lines` cache lines of them. */
INLINE void add_lines(const attention_args *a, const workspace *w, long row, const long *at, upcoming *next, long n,
                      long d, const int lines_of, const int rows, const int is_bf16, const int whole) {
    enum { VECS = 2 }; /* of a line of bfloat16, apart */
    const int vecs = is_bf16 ? VECS * lines_of : lines_of;
    v16 acc[FEW_AT_ONCE][VECS * LINES_AT_ONCE], v[VECS * LINES_AT_ONCE];
    const float *scores = w->scores + row * CHUNK;
    float *out = w->out + row * w->width + d;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vecs; j++) acc[r][j] = v_load(out + r * w->width + 16 * j);
    for (long t = 0; t < n; t++) {
        ask(next, lines_of);
        if (at[t] < 0) continue;
        const float *from = (const float *)((const char *)a->v_cache + (at[t] + d) * (is_bf16 ? 2 : 4));
        UNROLL for (int l = 0; l < lines_of; l++) {
            v16 line = whole ? v_load(from + 16 * l)
                             : v_load_n(from + 16 * l, lanes((w->dim - d) * (is_bf16 ? 2 : 4) / 4 - 16 * l));
            v[is_bf16 ? VECS * l : l] = v_pin(is_bf16 ? v_pair_even(line) : line);
            if (is_bf16) v[VECS * l + 1] = v_pin(v_pair_odd(line));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            v16 s = v_set1(scores[r * CHUNK + t]);
            UNROLL for (int j = 0; j < vecs; j++) acc[r][j] = v_fma(s, v[j], acc[r][j]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < vecs; j++) v_store(out + r * w->width + 16 * j, acc[r][j]);
}

INLINE void add_values(const attention_args *a, const workspace *w, long row, const long *at, upcoming *next, long n,
                       const int rows, const int is_bf16) {
    const long step = is_bf16 ? 32 : 16;
    long d = 0;
    for (; d + LINES_AT_ONCE * step <= w->dim; d += LINES_AT_ONCE * step)
        add_lines(a, w, row, at, next, n, d, LINES_AT_ONCE, rows, is_bf16, 1);
    for (; d < w->dim; d += step) add_lines(a, w, row, at, next, n, d, 1, rows, is_bf16, 0);
}

/* add_values, some rows at a time: those after the first find the values in the first cache. */
static void add_few(const attention_args *a, const workspace *w, const long *at, upcoming *next, long n) {
    for (long row = 0; row < w->rows; row += FEW_AT_ONCE) {
#define CASE(m)                                                       \
    case m:                                                           \
        if (a->cache_bf16) add_values(a, w, row, at, next, n, m, 1);  \
        else add_values(a, w, row, at, next, n, m, 0);                \
        break
        switch (w->rows - row < FEW_AT_ONCE ? w->rows - row : FEW_AT_ONCE) {
            CASE(1);
            CASE(2);
#if FEW_AT_ONCE == 4
            CASE(3);
            CASE(4);
#endif
        }
#undef CASE
    }
}

#endif
