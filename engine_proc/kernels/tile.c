/* Register tiles for float32 and bfloat16 panels; see tile.h.  One function per number of rows, made by macro. */
#include "tile.h"

/* Twelve row pointers do not fit the integer registers.  Every third row has a pointer, its neighbours are reached by
 * scaled indexing with the row length; hiding that length from the optimiser in each turn keeps it from undoing this
 * (worth 25 % at 12 rows). */
#define ROW_GROUPS 4
#define ROWS_START(type, x, a) \
    const type *x[ROW_GROUPS] = {(const type *)(a), (const type *)(a) + 3 * lda, (const type *)(a) + 6 * lda, \
                                 (const type *)(a) + 9 * lda}
#define ROWS_HIDE(step) \
    long step = lda;    \
    __asm__("" : "+r"(step))
#define ROW(x, r) (x[(r) / 3] + (r) % 3 * step)
#define ROWS_ADVANCE(x, by) UNROLL for (int g = 0; g < ROW_GROUPS; g++) x[g] += (by)

INLINE void tile_f32_body(const int rows, const float *a, long lda, const float *panel, long k, float *c, long ldc,
                          int accumulate, const int weights, ahead next) {
    for (int half = 0; half < PANEL / 16; half += TILE_VECS) {
        v16 acc[TILE_ROWS][TILE_VECS];
        const float *w = panel + 16 * half;
        float *out = c + 16 * half;
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = accumulate ? v_load(out + r * ldc + 16 * j) : v_zero();
        ROWS_START(float, x, a);
#define TILE_STEP(u)                                                                                                   \
    do {                                                                                                               \
        if (weights && half == 0) ask_ahead(&next);                                                                    \
        v16 wj[TILE_VECS];                                                                                             \
        UNROLL for (int j = 0; j < TILE_VECS; j++) wj[j] = v_pin(v_load(w + (u) * PANEL + 16 * j));                    \
        UNROLL for (int r = 0; r < rows; r++) {                                                                        \
            v16 xr = v_set1(ROW(x, r)[u]);                                                                             \
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_fma(xr, wj[j], acc[r][j]);                        \
        }                                                                                                              \
    } while (0)
        long i = 0;
        for (; i + 4 <= k; i += 4, w += 4 * PANEL) {
            ROWS_HIDE(step);
            UNROLL for (int u = 0; u < 4; u++) TILE_STEP(u);
            ROWS_ADVANCE(x, 4);
        }
        for (; i < k; i++, w += PANEL) {
            ROWS_HIDE(step);
            TILE_STEP(0);
            ROWS_ADVANCE(x, 1);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) v_store(out + r * ldc + 16 * j, acc[r][j]);
    }
}

#if WIDE_ROWS
/* Four of k at a time: with a neighbour on the same core it is the number of instructions that counts. */
INLINE void wide_f32_body(const int rows, const float *a, long lda, const float *panel, long apart, long k, float *c,
                          long ldc, ahead next) {
    v16 acc[WIDE_ROWS][4];
    const float *w = panel, *v = panel + apart, *x[WIDE_ROWS];
    UNROLL for (int r = 0; r < rows; r++) {
        x[r] = a + r * lda;
        UNROLL for (int j = 0; j < 4; j++) acc[r][j] = v_zero();
    }
#define WIDE_STEP(i, w, v)                                                                                             \
    do {                                                                                                               \
        v16 wj[4] = {v_pin(v_load(w)), v_pin(v_load((w) + 16)), v_pin(v_load(v)), v_pin(v_load((v) + 16))};            \
        UNROLL for (int r = 0; r < rows; r++) {                                                                        \
            v16 xr = v_set1(x[r][i]);                                                                                  \
            UNROLL for (int j = 0; j < 4; j++) acc[r][j] = v_fma(xr, wj[j], acc[r][j]);                                \
        }                                                                                                              \
    } while (0)
    long i = 0;
    for (; i + 4 <= k; i += 4, w += 4 * PANEL, v += 4 * PANEL) {
        ask_ahead(&next);
        UNROLL for (int u = 0; u < 4; u++) WIDE_STEP(i + u, w + u * PANEL, v + u * PANEL);
    }
    for (; i < k; i++, w += PANEL, v += PANEL) WIDE_STEP(i, w, v);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < 4; j++) v_store(c + r * ldc + 16 * j, acc[r][j]);
}

#define WIDE(rows)                                                                                                     \
    static void wide_f32_##rows(const float *a, long lda, const float *panel, long apart, long k, float *c,            \
                                long ldc, ahead next) {                                                                \
        wide_f32_body(rows, a, lda, panel, apart, k, c, ldc, next);                                                    \
    }
WIDE(1) WIDE(2) WIDE(3) WIDE(4) WIDE(5) WIDE(6)
const wide_f32_fn wide_f32[WIDE_ROWS + 1] = {0,          wide_f32_1, wide_f32_2, wide_f32_3,
                                             wide_f32_4, wide_f32_5, wide_f32_6};
#endif

#if BF16_DOT

INLINE void panel_bf16_body(const int rows, const void *a, long lda, const bf16 *panel, long k, float *c, ahead next) {
    v16 acc[TILE_ROWS][2];
    const float *w = (const float *)panel; /* pairs, as 32-bit lanes */
    UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = v_zero();
    ROWS_START(bf16, x, a);
    for (long i = 0; i < k; i += 2, w += PANEL) {
        ROWS_HIDE(step);
        ask_ahead(&next);
        v16 w0 = v_load(w), w1 = v_load(w + 16);
        UNROLL for (int r = 0; r < rows; r++) {
            float pair;
            memcpy(&pair, ROW(x, r), 4);
            v16 xr = v_set1(pair);
            acc[r][0] = dot_pairs(acc[r][0], xr, w0);
            acc[r][1] = dot_pairs(acc[r][1], xr, w1);
        }
        ROWS_ADVANCE(x, 2);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        v_store(c + r * PANEL, acc[r][0]);
        v_store(c + r * PANEL + 16, acc[r][1]);
    }
}

#else

INLINE void panel_bf16_body(const int rows, const void *a, long lda, const bf16 *panel, long k, float *c, ahead next) {
    for (int half = 0; half < PANEL / 16; half += TILE_VECS) {
        v16 acc[TILE_ROWS][TILE_VECS];
        const float *w = (const float *)panel + 16 * half; /* pairs, as 32-bit lanes */
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_zero();
        ROWS_START(float, x, a);
        for (long i = 0; i < k; i += 2, w += PANEL) {
            ROWS_HIDE(step);
            if (half == 0) ask_ahead(&next);
            v16 even[TILE_VECS], odd[TILE_VECS];
            UNROLL for (int j = 0; j < TILE_VECS; j++) {
                v16 pairs = v_load(w + 16 * j);
                even[j] = v_pair_even(pairs);
                odd[j] = v_pair_odd(pairs);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                v16 xr = v_set1(*ROW(x, r));
                UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_fma(xr, even[j], acc[r][j]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                v16 xr = v_set1(ROW(x, r)[1]);
                UNROLL for (int j = 0; j < TILE_VECS; j++) acc[r][j] = v_fma(xr, odd[j], acc[r][j]);
            }
            ROWS_ADVANCE(x, 2);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int j = 0; j < TILE_VECS; j++) v_store(c + r * PANEL + 16 * (half + j), acc[r][j]);
    }
}

#endif

#define TILE(rows)                                                                                                    \
    static void tile_f32_##rows(const float *a, long lda, const float *panel, long k, float *c, long ldc, int acc) {  \
        tile_f32_body(rows, a, lda, panel, k, c, ldc, acc, 0, (ahead){0});                                            \
    }                                                                                                                 \
    static void panel_f32_##rows(const float *a, long lda, const float *panel, long k, float *c, ahead next) {        \
        tile_f32_body(rows, a, lda, panel, k, c, PANEL, 0, 1, next);                                                  \
    }                                                                                                                 \
    static void panel_bf16_##rows(const void *a, long lda, const bf16 *panel, long k, float *c, ahead next) {         \
        panel_bf16_body(rows, a, lda, panel, k, c, next);                                                             \
    }
TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6)
#if TILE_ROWS == 12
TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#define TILES(p) {0, p##1, p##2, p##3, p##4, p##5, p##6, p##7, p##8, p##9, p##10, p##11, p##12}
#else
#define TILES(p) {0, p##1, p##2, p##3, p##4, p##5, p##6}
#endif

const tile_f32_fn tile_f32[TILE_ROWS + 1] = TILES(tile_f32_);
const panel_f32_fn panel_f32[TILE_ROWS + 1] = TILES(panel_f32_);
const panel_bf16_fn panel_bf16[TILE_ROWS + 1] = TILES(panel_bf16_);
