/* Attention of one sequence to all of itself in 16-bit integers; see int16_attention.h.
 *
 * Owns: the quantised operands and their tile.  For encoders whose products are int8 already: twice the multiplications
 * an instruction that float32 has, and far more exact than eight bits would be.  Queries and keys have 12 bits and a sign
 * each and a scale per row, so that a sum over 128 dims cannot overflow; values 13 bits, a sign and a scale per dim;
 * probabilities 15 bits, scaled per row so that their sum stays below 2^17.
 * Runs on the calling thread alone, with memory of its own: callers compute heads, or whole sequences, side by side.
 */
#include "int16_attention.h"

#include <stdlib.h>

#include "tile.h"

#define KEY_MOST 4095.0f
#define VALUE_MOST 8191.0f
#define WEIGHT_MOST 32767.0f
#define WEIGHT_SUM 131072.0f
#define LOG2E 1.4426950408889634

#if defined(__AVX512F__)
#define ROWS 12
#else
#define ROWS 3
#endif

typedef struct {
    int16_t *keys;     /* [panel of 32 keys][head_dim / 2][32][2] */
    int16_t *values;   /* [panel of 32 dims][keys / 2][32][2] */
    float *key_units;  /* [keys] */
    float *value_units;/* [width] */
    int16_t *q;        /* [ROWS][head_dim] */
    int32_t *sums;     /* [ROWS][keys], then the bits of floats */
    int16_t *weights;  /* [ROWS][keys] */
    int32_t *out;      /* [ROWS][PANEL] */
} room;

#if defined(__AVX512F__)
INLINE v16 to_float(const int32_t *p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
/* Rounded to the nearest. */
INLINE void store_int16(int16_t *p, v16 v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v)));
}
#else
INLINE v16 to_float(const int32_t *p) {
    _Alignas(32) float f[16];
    for (int i = 0; i < 16; i++) f[i] = (float)p[i];
    return v_load(f);
}
INLINE void store_int16(int16_t *p, v16 v) {
    _Alignas(32) float f[16];
    v_store(f, v_round(v));
    for (int i = 0; i < 16; i++) p[i] = (int16_t)(int32_t)f[i];
}
#endif

static long round_up(long n, long to) { return (n + to - 1) / to * to; }

/* c[rows][32] (ldc apart) = a[rows][2 * pairs] x b[pairs][32][2]. */
#if defined(__AVX512F__)
INLINE __m512i dot2(__m512i sum, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

INLINE void tile_body(const int rows, const int16_t *a, long lda, const int16_t *b, long pairs, int32_t *c, long ldc) {
    __m512i sum[ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
    for (long i = 0; i < pairs; i++, b += 2 * PANEL) {
        __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + PANEL);
        UNROLL for (int r = 0; r < rows; r++) {
            int32_t two;
            memcpy(&two, a + r * lda + 2 * i, 4);
            __m512i x = _mm512_set1_epi32(two);
            sum[r][0] = dot2(sum[r][0], b0, x);
            sum[r][1] = dot2(sum[r][1], b1, x);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        _mm512_storeu_si512(c + r * ldc, sum[r][0]);
        _mm512_storeu_si512(c + r * ldc + 16, sum[r][1]);
    }
}
#else
INLINE void tile_body(const int rows, const int16_t *a, long lda, const int16_t *b, long pairs, int32_t *c, long ldc) {
    for (int half = 0; half < 2; half++) {
        __m256i sum[ROWS][2];
        UNROLL for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
        const int16_t *p = b + half * PANEL;
        for (long i = 0; i < pairs; i++, p += 2 * PANEL) {
            __m256i b0 = _mm256_loadu_si256((const __m256i *)p), b1 = _mm256_loadu_si256((const __m256i *)(p + 16));
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t two;
                memcpy(&two, a + r * lda + 2 * i, 4);
                __m256i x = _mm256_set1_epi32(two);
                sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(b0, x));
                sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(b1, x));
            }
        }
        UNROLL for (int r = 0; r < rows; r++) {
            _mm256_storeu_si256((__m256i *)(c + r * ldc + half * 16), sum[r][0]);
            _mm256_storeu_si256((__m256i *)(c + r * ldc + half * 16 + 8), sum[r][1]);
        }
    }
}
#endif

static void tile(long rows, const int16_t *a, long lda, const int16_t *b, long pairs, int32_t *c, long ldc) {
    if (rows == ROWS) tile_body(ROWS, a, lda, b, pairs, c, ldc);
    else for (long r = 0; r < rows; r++) tile_body(1, a + r * lda, lda, b, pairs, c + r * ldc, ldc);
}

/* A row of `dim` floats as integers of at most `most`; returns the unit, NaN when the row holds no number. */
INLINE float quantize(const float *x, long dim, float most, int16_t *out) {
    v16 size = v_zero();
    int bad = 0;
    for (long i = 0; i < dim; i += 16) {
        v16 v = v_load(x + i);
        bad |= v_any_nan(v_sub(v, v));           /* infinities too */
        size = v_max(size, v_max(v, v_sub(v_zero(), v)));
    }
    float unit = v_hmax(size) / most, inverse = !bad && unit > 1e-30f ? 1.0f / unit : 0.0f;
    for (long i = 0; i < dim; i += 16) store_int16(out + i, bad ? v_zero() : v_mul(v_load(x + i), v_set1(inverse)));
    return bad ? NAN : unit;
}

static void load_keys(const int16_attention_args *a, const float *k, long keys, const room *w) {
    long dim = a->head_dim, pairs = dim / 2;
    int16_t *rows = (int16_t *)w->sums;          /* sixteen rows of a panel, before they are transposed */
    for (long t = 0; t < keys; t += 16) {
        for (long i = 0; i < 16; i++) {
            if (t + i < a->rows) w->key_units[t + i] = quantize(k + (t + i) * a->ldk, dim, KEY_MOST, rows + i * dim);
            else memset(rows + i * dim, 0, (size_t)dim * 2), w->key_units[t + i] = 0.0f;
        }
        for (long d = 0; d < pairs; d += 16) {
            v16 r[16];
            long n = pairs - d < 16 ? pairs - d : 16;
            for (int i = 0; i < 16; i++) r[i] = v_load_n((const float *)(rows + i * dim) + d, (int)n);
            v_transpose16(r);
            float *to = (float *)w->keys + t / PANEL * PANEL * pairs + d * PANEL + t % PANEL;
            for (long i = 0; i < n; i++) v_store(to + i * PANEL, r[i]);
        }
    }
}

static void load_values(const int16_attention_args *a, const float *v, long keys, const room *w) {
    long dim = a->head_dim, width = round_up(dim, PANEL);
    float *units = w->value_units;
    for (long d = 0; d < width; d += 16) {
        v16 size = v_zero(), nan = v_zero();
        for (long t = 0; t < a->rows && d < dim; t++) {
            v16 x = v_load(v + t * a->ldv + d);
            size = v_max(size, v_max(x, v_sub(v_zero(), x)));
            nan = v_add(nan, v_sub(x, x));       /* NaN where any value is no number */
        }
        size = v_mul(size, v_set1(1.0f / VALUE_MOST));
        v_store(units + d, v_add(size, nan));
        v16 inverse = v_zero_below(v_div(v_set1(1.0f), size), size, v_set1(1e-30f));
        int16_t *to = w->values + d / PANEL * PANEL * keys + 2 * (d % PANEL), line[2][16];
        for (long t = 0; t < keys; t += 2, to += 2 * PANEL) {
            for (long j = 0; j < 2; j++)
                store_int16(line[j], t + j < a->rows && d < dim ? v_mul(v_load(v + (t + j) * a->ldv + d), inverse) : v_zero());
            for (long i = 0; i < 16; i++) to[2 * i] = line[0][i], to[2 * i + 1] = line[1][i];
        }
    }
}

/* 2^x for x <= 0, 4e-6 of relative error: what is rounded to 15 bits next. */
INLINE v16 exp2_short(v16 given) {
    v16 x = v_max(v_set1(-40.0f), given);
    v16 n = v_round(x), r = v_sub(x, n);
    v16 p = v_set1(1.33335581e-3f);
    p = v_fma(p, r, v_set1(9.61812911e-3f));
    p = v_fma(p, r, v_set1(5.55041087e-2f));
    p = v_fma(p, r, v_set1(2.40226507e-1f));
    p = v_fma(p, r, v_set1(6.93147181e-1f));
    return v_ldexp(v_fma(p, r, v_set1(1.0f)), n);
}

/* Integer scores of a row -> integer weights; returns what a weight counts, so that they add up to 1. */
static float softmax(int32_t *sums, const float *units, long rows, long keys, float factor, int16_t *weights) {
    float *scores = (float *)sums;
    v16 most = v_set1(-INFINITY), total = v_zero();
    for (long j = 0; j < keys; j += 16) {
        v16 s = v_mul(to_float(sums + j), v_load(units + j));
        if (j + 16 > rows) s = v_keep(s, 0, rows > j ? (int)(rows - j) : 0, v_set1(-INFINITY));
        v_store(scores + j, s);
        most = v_max(most, s);
    }
    v16 shift = v_set1(v_hmax(most)), by = v_set1(factor);
    for (long j = 0; j < keys; j += 16) {
        v16 p = exp2_short(v_mul(v_sub(v_load(scores + j), shift), by));
        v_store(scores + j, p);
        total = v_add(total, p);
    }
    float sum = v_sum(total), scale = WEIGHT_SUM / sum;
    if (!(scale < WEIGHT_MOST)) scale = WEIGHT_MOST;
    int32_t count = 0;
    for (long j = 0; j < keys; j += 16) store_int16(weights + j, v_mul(v_load(scores + j), v_set1(scale)));
    for (long j = 0; j < keys; j++) count += weights[j];
    return sum == sum ? 1.0f / (float)count : NAN;
}

static void run_head(const int16_attention_args *a, long head, long keys, const room *w) {
    long dim = a->head_dim, at = head * dim;
    float unit[ROWS];
    load_keys(a, a->k + at, keys, w);
    load_values(a, a->v + at, keys, w);
    for (long row = 0, rows; row < a->rows; row += rows) {
        rows = a->rows - row < ROWS ? a->rows - row : ROWS;
        for (long r = 0; r < rows; r++)
            unit[r] = quantize(a->q + (row + r) * a->ldq + at, dim, KEY_MOST, w->q + r * dim) * (float)(a->scale * LOG2E);
        for (long t = 0; t < keys; t += PANEL) tile(rows, w->q, dim, w->keys + t * dim, dim / 2, w->sums + t, keys);
        for (long r = 0; r < rows; r++)
            unit[r] = softmax(w->sums + r * keys, w->key_units, a->rows, keys, unit[r], w->weights + r * keys);
        for (long d = 0; d < dim; d += PANEL) {
            tile(rows, w->weights, keys, w->values + d * keys, keys / 2, w->out, PANEL);
            for (long r = 0; r < rows; r++)
                for (long i = 0; i < PANEL && d + i < dim; i += 16)
                    v_store(a->out + (row + r) * a->ldo + at + d + i,
                            v_mul(v_mul(to_float(w->out + r * PANEL + i), v_load(w->value_units + d + i)), v_set1(unit[r])));
        }
    }
}

/* Entry point for Python.  0; -1 without memory. */
int q_int16_attention(const int16_attention_args *a) {
    long keys = round_up(a->rows, PANEL), dim = a->head_dim, width = round_up(dim, PANEL);
    long sums = ROWS * keys > 8 * dim ? ROWS * keys : 8 * dim;
    size_t bytes = (size_t)(2 * keys * (dim + width + ROWS) + 4 * (keys + width + sums + ROWS * PANEL) + 2 * ROWS * dim);
    char *at = aligned_alloc(64, (bytes + 8 * 64 + 63) / 64 * 64), *whole = at;
    if (!at) return -1;
    room w;
#define TAKE(field, count) (w.field = (void *)at, at += ((size_t)(count) * sizeof *w.field + 63) / 64 * 64)
    TAKE(keys, keys * dim);
    TAKE(values, keys * width);
    TAKE(key_units, keys);
    TAKE(value_units, width);
    TAKE(q, ROWS * dim);
    TAKE(sums, sums);
    TAKE(weights, ROWS * keys);
    TAKE(out, ROWS * PANEL);
    for (long head = a->first; head < a->end; head++) run_head(a, head, keys, &w);
    free(whole);
    return 0;
}
