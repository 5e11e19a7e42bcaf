/* int8 linear layers: weights int8 with one scale per output, activations int8 with one scale per row and group of k.
 *
 * Owns: the quantised operand, the int8 register tile and the quantisation of weights.
 * Weights are stored plus 128 as unsigned bytes, the operand order vpdpbusd wants; every group's integer sum then holds
 * 128 * sum(x) too much, which depends on the row only and is taken off by starting the accumulator at its negative.
 * Activations have a scale per GROUP values of k rather than per row: small models have outlier channels, and one scale
 * a row would push every other value of it into a few levels.
 */
#include "linear.h"

#define GROUP 64      /* values of k that share an activation scale */
#define INT8_ROWS 6   /* 6 rows x 2 registers x (integer + float accumulators) = 24 of 32 */

/* Operand: for each row int8[stride], then for all rows float scale[groups], then int32 start[groups]. */
long int8_stride(long k) { return (k + GROUP - 1) / GROUP * GROUP; }

static long groups_of(long k) { return (k + GROUP - 1) / GROUP; }

size_t int8_operand_bytes(long k, long rows) { return (size_t)(rows * (int8_stride(k) + 8 * groups_of(k))); }

void int8_make_operand(const linear_weight *w, const void *x, int x_bf16, long ldx, void *a, long from, long to,
                       long rows) {
    long stride = int8_stride(w->k), groups = groups_of(w->k);
    int8_t *q = a;
    float *scales = (float *)(q + rows * stride);
    int32_t *starts = (int32_t *)(scales + rows * groups);
    for (long r = from; r < to; r++) {
        for (long g = 0; g < groups; g++) {
            _Alignas(64) float v[GROUP];
            v16 most = v_zero();
            int bad = 0;
            for (int j = 0; j < GROUP; j += 16) {
                long at = g * GROUP + j, n = w->k - at < 16 ? w->k - at : 16;
                v16 t = n <= 0 ? v_zero() : v_load_any_n(x, r * ldx + at, (int)n, x_bf16);
                v_store(v + j, t);
                most = v_max(v_max(most, v_sub(v_zero(), t)), t);
                bad |= v_any_nan(t);
            }
            float scale = bad ? NAN : v_hmax(most) / 127.0f;
            float inverse = scale > 0 && scale < INFINITY ? 1.0f / scale : 0.0f;
            int8_t *out = q + r * stride + g * GROUP;
            for (int j = 0; j < GROUP; j += 16)
                v_store(v + j, inverse > 0 ? v_round(v_mul(v_load(v + j), v_set1(inverse))) : v_zero());
            int32_t sum = 0;
            for (int j = 0; j < GROUP; j++) {
                int32_t i = (int32_t)v[j];
                out[j] = (int8_t)i;
                sum += i;
            }
            scales[r * groups + g] = scale;
            starts[r * groups + g] = -128 * sum;
        }
    }
}

#if defined(__AVX512VNNI__)

INLINE void tile_body(const int rows, const int8_t *a, long stride, const float *scales, const int32_t *starts,
                      long groups, const uint8_t *w, long k, const float *column_scales, float *c) {
    __m512 acc[INT8_ROWS][2];
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i sum[INT8_ROWS][2];
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++)
            sum[r][0] = sum[r][1] = _mm512_set1_epi32(starts[r * groups + g]);
        long end = (g + 1) * GROUP < k ? (g + 1) * GROUP : k;
        for (long i = g * GROUP; i < end; i += 4, w += 4 * PANEL) {
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, a + r * stride + i, 4);
                __m512i x = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, x);
            }
        }
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
            __m512 s = _mm512_set1_ps(scales[r * groups + g]);
            acc[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), s, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), s, acc[r][1]);
        }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(c + r * PANEL, _mm512_mul_ps(acc[r][0], _mm512_loadu_ps(column_scales)));
        _mm512_storeu_ps(c + r * PANEL + 16, _mm512_mul_ps(acc[r][1], _mm512_loadu_ps(column_scales + 16)));
    }
}

#else

/* Without VNNI: bytes widened to 16 bits and multiplied in pairs (exact; vpmaddubsw would saturate). */
INLINE __m256i dot4(__m256i sum, __m256i w, int32_t four) {
    __m256i x = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
    __m256i lo = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(w)), x);
    __m256i hi = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(w, 1)), x);
    __m256i pairs = _mm256_hadd_epi32(lo, hi); /* columns 0 1 4 5 | 2 3 6 7 */
    return _mm256_add_epi32(sum, _mm256_permute4x64_epi64(pairs, 0xd8));
}

INLINE void tile_body(const int rows, const int8_t *a, long stride, const float *scales, const int32_t *starts,
                      long groups, const uint8_t *w, long k, const float *column_scales, float *c) {
    for (int r = 0; r < rows; r++) {
        for (int q = 0; q < 4; q++) { /* eight columns at a time */
            __m256 acc = _mm256_setzero_ps();
            const uint8_t *p = w + 32 * q;
            for (long g = 0; g < groups; g++) {
                __m256i sum = _mm256_set1_epi32(starts[r * groups + g]);
                long end = (g + 1) * GROUP < k ? (g + 1) * GROUP : k;
                for (long i = g * GROUP; i < end; i += 4, p += 4 * PANEL) {
                    int32_t four;
                    memcpy(&four, a + r * stride + i, 4);
                    sum = dot4(sum, _mm256_loadu_si256((const __m256i *)p), four);
                }
                acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scales[r * groups + g]), acc);
            }
            _mm256_storeu_ps(c + r * PANEL + 8 * q, _mm256_mul_ps(acc, _mm256_loadu_ps(column_scales + 8 * q)));
        }
    }
}

#endif

void tile_int8(const linear_weight *w, const void *a, long rows_total, long row, long rows, long panel, float *c) {
    long k = (w->k + 3) & ~3L, stride = int8_stride(w->k), groups = groups_of(w->k);
    const float *scales = (const float *)((const int8_t *)a + rows_total * stride);
    const int32_t *starts = (const int32_t *)(scales + rows_total * groups) + row * groups;
    const int8_t *x = (const int8_t *)a + row * stride;
    const uint8_t *panels = (const uint8_t *)w->panels + panel * k * PANEL;
    scales += row * groups;
    for (long done = 0, n; done < rows; done += n) {
        n = rows - done < INT8_ROWS ? rows - done : INT8_ROWS;
        if (rows - done == INT8_ROWS + 1 || rows - done == INT8_ROWS + 2) n = (rows - done + 1) / 2;
#define CASE(m)                                                                                                        \
    case m:                                                                                                            \
        tile_body(m, x + done * stride, stride, scales + done * groups, starts + done * groups, groups, panels, k,     \
                  w->scales + panel * PANEL, c + done * PANEL);                                                        \
        break
        switch (n) {
            CASE(1);
            CASE(2);
            CASE(3);
            CASE(4);
            CASE(5);
            CASE(6);
        }
    }
}

typedef struct {
    const void *src;
    int src_bf16;
    const linear_weight *w;
    uint8_t *panels;
    float *scales;
} pack_call;

static void pack_team(int tid, int size, void *arg) {
    (void)tid;
    pack_call *p = arg;
    const linear_weight *w = p->w;
    long k = (w->k + 3) & ~3L, panels = linear_panels(w), end;
    for (long panel; (panel = team_take(panels, 1, &end)) >= 0;) {
        uint8_t *out = p->panels + panel * k * PANEL;
        for (long c = 0; c < PANEL; c++) {
            long row = linear_source_row(w, panel, c);
            float most = 0.0f;
            for (long i = 0; row >= 0 && i < w->k; i++) {
                float v = fabsf(load_scalar(p->src, row * w->k + i, p->src_bf16));
                most = v > most ? v : most;
            }
            float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
            p->scales[panel * PANEL + c] = scale;
            for (long i = 0; i < k; i++) {
                float v = row < 0 || i >= w->k ? 0.0f : load_scalar(p->src, row * w->k + i, p->src_bf16);
                out[i / 4 * 4 * PANEL + c * 4 + i % 4] = (uint8_t)(lrintf(v * inverse) + 128);
            }
        }
    }
    team_barrier(size);
}

/* Quantises src[n][k] (gated: [2n][k]; float or bfloat16, finite) into w->panels and w->scales. */
void q_pack_int8(const linear_weight *w, const void *src, int src_bf16) {
    pack_call p = {.src = src, .src_bf16 = src_bf16, .w = w, .panels = (uint8_t *)w->panels,
                   .scales = (float *)w->scales};
    pool_enter();
    pool_run(pack_team, &p);
    pool_leave();
}
