/* int8 linear layers: weights int8 with a scale per output and 64 of k, activations int8 with a scale per row and 32 of k.
 *
 * Owns: the quantised operand, the int8 register tile and the quantisation of weights.
 * The groups are small because small models have outlier channels: one scale a row (or an output) would push all other
 * values into a few levels (measured on SmolLM2-135M: perplexity +1.2 % with 64 / whole outputs, +0.5 % with 32 / 64).
 * Weights are stored plus 128 as unsigned bytes, the operand order vpdpbusd wants; every group's integer sum then holds
 * 128 * sum(x) too much, which depends on the row only and is taken off by starting the accumulator at its negative.
 *
 * Panel: for each 64 of k (padded with zeros) uint8 [16][32 columns][4], then bfloat16 scale[32]: still one stream.
 * Operand: for each row int8 [k], then for all rows float scale [k / 32], then int32 start [k / 32].
 */
#include "linear.h"

#define X_GROUP 32
#define W_GROUP 64
#define INT8_ROWS 6 /* 6 rows x 2 registers x (integer + float accumulators) = 24 of 32 */
#define GROUP_BYTES (W_GROUP * PANEL + 2 * PANEL)

long int8_stride(long k) { return (k + W_GROUP - 1) / W_GROUP * W_GROUP; }

size_t int8_operand_bytes(long k, long rows) { return (size_t)(rows * int8_stride(k) / X_GROUP * (X_GROUP + 8)); }

size_t int8_panel_bytes(long k) { return (size_t)(int8_stride(k) / W_GROUP * GROUP_BYTES); }

/* One group of x: bytes, scale and the accumulator's start.  A NaN or infinity makes the scale NaN, and so the row. */
INLINE void quantize_group(const void *x, long at, long k, const int x_bf16, int8_t *out, float *scale, int32_t *start) {
    v16 v[2];
    for (int j = 0; j < 2; j++) {
        long left = k - at - 16 * j;
        v[j] = left <= 0 ? v_zero() : v_load_any_n(x, at + 16 * j, left < 16 ? (int)left : 16, x_bf16);
    }
    v16 largest = v_max(v_max(v[0], v_sub(v_zero(), v[0])), v_max(v[1], v_sub(v_zero(), v[1])));
    int bad = v_any_nan(v[0]) | v_any_nan(v[1]);
    float unit = bad ? NAN : v_hmax(largest) / 127.0f;
    float inverse = unit > 0 && unit < INFINITY ? 1.0f / unit : 0.0f;
    if (inverse > 0 && inverse < INFINITY) {
        for (int j = 0; j < 2; j++) {
            v[j] = v_round(v_mul(v[j], v_set1(inverse)));
            v_store_int8(out + 16 * j, v[j]);
        }
        *start = -128 * (int32_t)v_sum(v_add(v[0], v[1])); /* of small integers: exact */
    } else { /* a denormal group counts as zero */
        memset(out, 0, X_GROUP);
        *start = 0;
    }
    *scale = unit < INFINITY ? unit : NAN;
}

void int8_make_operand(const linear_weight *w, const void *x, int x_bf16, long ldx, void *a, long from, long to,
                       long rows) {
    long stride = int8_stride(w->k), groups = stride / X_GROUP;
    int8_t *q = a;
    float *scales = (float *)(q + rows * stride);
    int32_t *starts = (int32_t *)(scales + rows * groups);
    for (long r = from; r < to; r++)
        for (long g = 0; g < groups; g++) {
            const void *row = (const char *)x + r * ldx * (x_bf16 ? 2 : 4);
            int8_t *out = q + r * stride + g * X_GROUP;
            if (x_bf16) quantize_group(row, g * X_GROUP, w->k, 1, out, scales + r * groups + g, starts + r * groups + g);
            else quantize_group(row, g * X_GROUP, w->k, 0, out, scales + r * groups + g, starts + r * groups + g);
        }
}

void int8_values(const void *a, long k, long row, long rows, float *values) {
    long stride = int8_stride(k);
    const int8_t *q = (const int8_t *)a + row * stride;
    const float *scales = (const float *)((const int8_t *)a + rows * stride) + row * (stride / X_GROUP);
    for (long i = 0; i < k; i++) values[i] = (float)q[i] * scales[i / X_GROUP];
}

#if defined(__AVX512VNNI__)

INLINE void tile_body(const int rows, const int8_t *a, long stride, const float *scales, const int32_t *starts,
                      const uint8_t *w, float *c, ahead next) {
    const long groups = stride / X_GROUP;
    __m512 acc[INT8_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
    for (long g = 0; g < groups; g++) {
        __m512i sum[INT8_ROWS][2];
        UNROLL for (int r = 0; r < rows; r++)
            sum[r][0] = sum[r][1] = _mm512_set1_epi32(starts[r * groups + g]);
        const bf16 *unit = (const bf16 *)(w + (g & 1 ? X_GROUP : W_GROUP) * PANEL);
        for (int i = 0; i < X_GROUP; i += 4, w += 4 * PANEL) {
            ask_ahead(&next);
            __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
            UNROLL for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, a + r * stride + g * X_GROUP + i, 4);
                __m512i x = _mm512_set1_epi32(four);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], w0, x);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], w1, x);
            }
        }
        w += g & 1 ? 2 * PANEL : 0; /* over the scales of a finished weight group */
        v16 unit0 = v_load_bf16(unit), unit1 = v_load_bf16(unit + 16);
        UNROLL for (int r = 0; r < rows; r++) {
            __m512 s = _mm512_set1_ps(scales[r * groups + g]);
            acc[r][0] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), s), unit0, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), s), unit1, acc[r][1]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(c + r * PANEL, acc[r][0]);
        _mm512_storeu_ps(c + r * PANEL + 16, acc[r][1]);
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
                      const uint8_t *w, float *c, ahead next) {
    const long groups = stride / X_GROUP;
    (void)next; /* bound by arithmetic here */
    for (int r = 0; r < rows; r++) {
        __m256 acc[4]; /* eight columns each */
        for (int q = 0; q < 4; q++) acc[q] = _mm256_setzero_ps();
        const uint8_t *p = w;
        for (long g = 0; g < groups; g++) {
            __m256i sum[4];
            for (int q = 0; q < 4; q++) sum[q] = _mm256_set1_epi32(starts[r * groups + g]);
            const bf16 *unit = (const bf16 *)(p + (g & 1 ? X_GROUP : W_GROUP) * PANEL);
            for (int i = 0; i < X_GROUP; i += 4, p += 4 * PANEL) {
                int32_t four;
                memcpy(&four, a + r * stride + g * X_GROUP + i, 4);
                for (int q = 0; q < 4; q++)
                    sum[q] = dot4(sum[q], _mm256_loadu_si256((const __m256i *)(p + 32 * q)), four);
            }
            p += g & 1 ? 2 * PANEL : 0;
            _Alignas(64) float units[PANEL];
            for (int q = 0; q < PANEL; q += 16) v_store(units + q, v_load_bf16(unit + q));
            __m256 s = _mm256_set1_ps(scales[r * groups + g]);
            for (int q = 0; q < 4; q++)
                acc[q] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum[q]), s), _mm256_load_ps(units + 8 * q),
                                         acc[q]);
        }
        for (int q = 0; q < 4; q++) _mm256_storeu_ps(c + r * PANEL + 8 * q, acc[q]);
    }
}

#endif

void panel_int8(const linear_weight *w, const void *a, long rows_total, long row, long rows, const void *panel, float *c,
                ahead next) {
    long stride = int8_stride(w->k), groups = stride / X_GROUP;
    const float *scales = (const float *)((const int8_t *)a + rows_total * stride);
    const int32_t *starts = (const int32_t *)(scales + rows_total * groups) + row * groups;
    const int8_t *x = (const int8_t *)a + row * stride;
    scales += row * groups;
    for (long done = 0, n; done < rows; done += n) {
        long tiles = (rows - done + INT8_ROWS - 1) / INT8_ROWS;
        n = (rows - done + tiles - 1) / tiles;
#define CASE(m)                                                                                            \
    case m:                                                                                                \
        tile_body(m, x + done * stride, stride, scales + done * groups, starts + done * groups, panel,     \
                  c + done * PANEL, next);                                                                 \
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
    float *bounds;
} pack_call;

/* How long a row of the weight is, and how far its int8 form is off; squares. */
typedef struct {
    double length, off;
} pack_error;

/* The next bfloat16 that is not smaller; of positive numbers. */
static float round_up(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xffff) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

static void pack_group(const pack_call *p, long row, long column, long at, uint8_t *out, pack_error *error) {
    const linear_weight *w = p->w;
    _Alignas(64) float v[W_GROUP], q[W_GROUP];
    v16 largest = v_zero();
    for (long i = 0; i < W_GROUP; i += 16) {
        long n = row < 0 ? 0 : w->k - at - i < 16 ? w->k - at - i : 16;
        v16 t = n <= 0 ? v_zero() : v_load_any_n(p->src, row * w->k + at + i, (int)n, p->src_bf16);
        v_store(v + i, t);
        largest = v_max(v_max(largest, t), v_sub(v_zero(), t));
    }
    float most = v_hmax(largest), unit = most > 1e-30f && most < INFINITY ? round_up(most / 127.0f) : 0.0f;
    float inverse = unit > 0 ? 1.0f / unit : 0.0f;
    for (long i = 0; i < W_GROUP; i += 16) v_store(q + i, v_round(v_mul(v_load(v + i), v_set1(inverse))));
    uint8_t bytes[W_GROUP];
    for (long i = 0; i < W_GROUP; i++) bytes[i] = (uint8_t)((int32_t)q[i] + 128);
    for (long i = 0; i < W_GROUP; i += 4) memcpy(out + i * PANEL + column * 4, bytes + i, 4);
    ((bf16 *)(out + W_GROUP * PANEL))[column] = float_to_bf16(unit);
    if (!error) return;
    if (unit > 0) { /* in units, or the squares would leave float32's range */
        v16 length = v_zero(), off = v_zero(), per_unit = v_set1(1.0f / unit);
        for (long i = 0; i < W_GROUP; i += 16) {
            v16 t = v_mul(v_load(v + i), per_unit), d = v_sub(t, v_load(q + i));
            length = v_fma(t, t, length);
            off = v_fma(d, d, off);
        }
        error->length += (double)v_sum(length) * unit * unit;
        error->off += (double)v_sum(off) * unit * unit;
    } else {
        error->length += W_GROUP * (double)most * most;
        error->off += W_GROUP * (double)most * most;
    }
}

static void pack_panel(const pack_call *p, long panel, pack_error *errors) {
    const linear_weight *w = p->w;
    long groups = int8_stride(w->k) / W_GROUP;
    uint8_t *out = (uint8_t *)w->panels + (size_t)panel * int8_panel_bytes(w->k);
    for (long g = 0; g < groups; g++, out += GROUP_BYTES)
        for (long c = 0; c < PANEL; c++)
            pack_group(p, linear_source_row(w, panel, c), c, g * W_GROUP, out, errors ? errors + c : NULL);
}

static void pack_team(int tid, int size, void *arg) {
    (void)tid;
    pack_call *p = arg;
    const linear_weight *w = p->w;
    double rounding = 1e-4 + (double)(3 * w->k + 64) / 16777216.0;
    long end;
    for (long panel; (panel = team_take(linear_panels(w), 1, &end)) >= 0;) {
        pack_error errors[PANEL] = {0};
        pack_panel(p, panel, p->bounds ? errors : NULL);
        for (long c = 0; p->bounds && c < PANEL && panel * PANEL + c < w->n; c++) {
            double length = sqrt(errors[c].length), off = sqrt(errors[c].off);
            p->bounds[panel * PANEL + c] = (float)(1.00001 * (off + rounding * (length + off)));
        }
    }
    team_barrier(size);
}

/* Entry point for Python: quantises src[n][k] (gated: [2n][k]; float or bfloat16, finite) into w->panels, of
 * panels * (k padded to 64) * 33 bytes.  bounds[n], or NULL: see best.c; not finite where src is not. */
void q_pack_int8(const linear_weight *w, const void *src, int src_bf16, float *bounds) {
    pack_call p = {.src = src, .src_bf16 = src_bf16, .w = w, .bounds = bounds};
    pool_call(pack_team, &p, POOL_ALWAYS);
}
