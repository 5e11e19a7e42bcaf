/* The innermost products: a few rows of activations times one 32-column panel of packed weights.
 *
 * Owns: the register tiles.  C[rows][32] (+)= A[rows][k] x panel, rows <= TILE_ROWS, everything accumulated in float32.
 * Every tile adds the products of one output in ascending k into one accumulator, whatever the number of rows: a row's
 * result is bit for bit the same alone, in a batch and in a prefill chunk.  Keep it so.
 *
 * Panel layouts (see linear.h): float [k][32]; bfloat16 [k/2][32][2].
 */
#ifndef QUARTET_TILE_H
#define QUARTET_TILE_H

#include "simd.h"

#define PANEL 32 /* columns of a panel */

#if defined(__AVX512F__)
#define TILE_ROWS 12 /* 12 rows x 2 registers of accumulators, 2 of weights, 1 broadcast: 27 of 32 */
#define TILE_VECS 2  /* v16 columns a tile holds at once */
#define WIDE_ROWS 6  /* of a tile over two panels: 24 accumulators, 4 of weights, 1 broadcast; 10 loads for 24 products */
#else
#define TILE_ROWS 6 /* 6 rows x 1 v16 (two registers): 12 of 16 */
#define TILE_VECS 1
#define WIDE_ROWS 0  /* too few registers */
#endif

/* What to ask memory for while a panel is multiplied: with each 128 bytes of it, the line at `at` and the next, and then
 * `step` bytes on.  Any address is fine. */
typedef struct {
    const char *at;
    long step;
} ahead;

INLINE void ask_ahead(ahead *next) {
    _mm_prefetch(next->at, _MM_HINT_T0);
    _mm_prefetch(next->at + 64, _MM_HINT_T0);
    next->at += next->step;
}

typedef void (*tile_f32_fn)(const float *a, long lda, const float *panel, long k, float *c, long ldc, int accumulate);
typedef void (*panel_f32_fn)(const float *a, long lda, const float *panel, long k, float *c, ahead next);
typedef void (*panel_bf16_fn)(const void *a, long lda, const bf16 *panel, long k, float *c, ahead next);

#if WIDE_ROWS
/* c[rows][2 * PANEL] (rows `ldc` floats apart) = a x two panels that lie `apart` floats from each other; index: number of rows.  The same sums in the
 * same order as panel_f32 gives, with fewer loads: a fifth faster where there are rows enough. */
typedef void (*wide_f32_fn)(const float *a, long lda, const float *panel, long apart, long k, float *c, long ldc,
                            ahead next);
extern const wide_f32_fn wide_f32[WIDE_ROWS + 1];
#endif

/* Index: number of rows.  The panel functions are for weights: c has PANEL columns and is overwritten; bf16: `a` is rows
 * of bf16_operand. */
extern const tile_f32_fn tile_f32[TILE_ROWS + 1];
extern const panel_f32_fn panel_f32[TILE_ROWS + 1];
extern const panel_bf16_fn panel_bf16[TILE_ROWS + 1];

/* What panel_bf16 multiplies the weights with: bfloat16 rows where the processor has a bfloat16 dot product, else
 * rows already widened to float. */
#if defined(__AVX512BF16__) || defined(QUARTET_EMULATE_BF16_DOT)
#define BF16_DOT 1
typedef bf16 bf16_operand;

#ifdef QUARTET_EMULATE_BF16_DOT
/* For tests on a processor without the instruction: the same data flow, products rounded as two fused steps. */
INLINE v16 dot_pairs(v16 acc, v16 x, v16 w) {
    acc = v_fma(v_pair_odd(x), v_pair_odd(w), acc);
    return v_fma(v_pair_even(x), v_pair_even(w), acc);
}
#else
INLINE v16 dot_pairs(v16 acc, v16 x, v16 w) {
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(w));
}
#endif

#else
#define BF16_DOT 0
typedef float bf16_operand;
#endif

/* Rows of the next tile of at most `most` when `left` remain: as even a split as possible, so that 13 go 7 + 6. */
INLINE long even_rows(long left, long most) {
    long tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}
INLINE long tile_rows(long left) { return even_rows(left, TILE_ROWS); }

#endif
