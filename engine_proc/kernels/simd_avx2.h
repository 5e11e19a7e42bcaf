/* The AVX2+FMA side of simd.h: a v16 is two registers; partial loads and stores go through a small buffer. */
typedef struct {
    __m256 lo, hi;
} v16;

#define V_EACH1(name, op) \
    INLINE v16 name(v16 a) { return (v16){op(a.lo), op(a.hi)}; }
#define V_EACH2(name, op) \
    INLINE v16 name(v16 a, v16 b) { return (v16){op(a.lo, b.lo), op(a.hi, b.hi)}; }

/* Keeps a loaded value in registers: without it the compiler may load it again for each of its uses. */
INLINE v16 v_pin(v16 v) {
    __asm__("" : "+x"(v.lo), "+x"(v.hi));
    return v;
}
INLINE v16 v_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE v16 v_set1(float x) { return (v16){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16 v_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void v_store(float *p, v16 v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}
V_EACH2(v_add, _mm256_add_ps)
V_EACH2(v_sub, _mm256_sub_ps)
V_EACH2(v_mul, _mm256_mul_ps)
V_EACH2(v_div, _mm256_div_ps)
V_EACH2(v_max, _mm256_max_ps)
V_EACH2(v_min, _mm256_min_ps)
INLINE v16 v_fma(v16 a, v16 b, v16 c) {
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
#define V_ROUND8(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
V_EACH1(v_round, V_ROUND8)

/* a * 2^n where both a and the result are normal numbers (a NaN stays: its n converts to a multiple of 2^9). */
INLINE __m256 v_ldexp8(__m256 a, __m256 n) {
    __m256i shift = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), shift));
}
V_EACH2(v_ldexp, v_ldexp8)

INLINE float v_sum(v16 v) {
    __m256 a = _mm256_add_ps(v.lo, v.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
INLINE float v_hmax(v16 v) {
    __m256 a = _mm256_max_ps(v.lo, v.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_shuffle_ps(b, b, 1)));
}

INLINE float v_lane0(v16 v) { return _mm256_cvtss_f32(v.lo); }

INLINE v16 v_load_n(const float *p, int n) {
    float t[16] = {0};
    memcpy(t, p, 4 * (size_t)n);
    return v_load(t);
}
INLINE void v_store_n(float *p, v16 v, int n) {
    float t[16];
    v_store(t, v);
    memcpy(p, t, 4 * (size_t)n);
}
/* Lanes [from, to) of v, `other` elsewhere. */
INLINE v16 v_keep(v16 v, int from, int to, v16 other) {
    float a[16], b[16];
    v_store(a, v);
    v_store(b, other);
    for (int i = from; i < to; i++) b[i] = a[i];
    return v_load(b);
}
/* Zero in the lanes where x < limit. */
INLINE v16 v_zero_below(v16 v, v16 x, v16 limit) {
    return (v16){_mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_NLT_UQ), v.lo),
                 _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_NLT_UQ), v.hi)};
}
INLINE __m256i v_spread8(unsigned bits) {
    __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), each), each);
}
/* Stores the lanes whose bits are set. */
INLINE void v_store_bits(float *p, v16 v, unsigned bits) {
    _mm256_maskstore_ps(p, v_spread8(bits), v.lo);
    _mm256_maskstore_ps(p + 8, v_spread8(bits >> 8), v.hi);
}
INLINE int v_any_nan(v16 v) {
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v.lo, v.lo, _CMP_UNORD_Q),
                                           _mm256_cmp_ps(v.hi, v.hi, _CMP_UNORD_Q))) != 0;
}
/* Bit i is set where a[i] > b[i]. */
INLINE unsigned v_gt_bits(v16 a, v16 b) {
    return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)) |
           (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)) << 8;
}

INLINE __m256 v_widen8(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
INLINE v16 v_load_bf16(const bf16 *p) {
    return (v16){v_widen8(_mm_loadu_si128((const __m128i *)p)), v_widen8(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE v16 v_load_bf16_n(const bf16 *p, int n) {
    bf16 t[16] = {0};
    memcpy(t, p, 2 * (size_t)n);
    return v_load_bf16(t);
}
INLINE __m256i v_round_bf16(__m256 v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), lsb);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
}
INLINE void v_store_bf16(bf16 *p, v16 v) {
    __m256i packed = _mm256_packus_epi32(v_round_bf16(v.lo), v_round_bf16(v.hi));
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
INLINE void v_store_bf16_n(bf16 *p, v16 v, int n) {
    bf16 t[16];
    v_store_bf16(t, v);
    memcpy(p, t, 2 * (size_t)n);
}

/* Of values that are whole numbers. */
INLINE void v_store_int8(int8_t *p, v16 v) {
    __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));
    words = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

/* Of 16 bfloat16 pairs (32 values): the even or the odd members as floats. */
#define V_EVEN8(x) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16))
#define V_ODD8(x) _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32((int)0xffff0000)))
V_EACH1(v_pair_even, V_EVEN8)
V_EACH1(v_pair_odd, V_ODD8)

INLINE v16 v_zip8(__m256 a, __m256 b) {
    __m256 lo = _mm256_unpacklo_ps(a, b), hi = _mm256_unpackhi_ps(a, b);
    return (v16){_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31)};
}
/* lo, hi <- lo[0], hi[0], lo[1], hi[1] ... */
INLINE void v_zip(v16 *lo, v16 *hi) {
    v16 a = *lo, b = *hi;
    *lo = v_zip8(a.lo, b.lo);
    *hi = v_zip8(a.hi, b.hi);
}

INLINE void v_transpose8(__m256 r[8]) {
    __m256 t[8], s[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        UNROLL for (int h = 0; h < 2; h++) {
            s[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
            s[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
        r[i + 4] = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
    }
}

/* r[i][j] <- r[j][i], any 32-bit lanes: four 8x8 quarters, the off-diagonal two swapped. */
INLINE void v_transpose16(v16 r[16]) {
    __m256 q[4][8];
    UNROLL for (int i = 0; i < 8; i++) {
        q[0][i] = r[i].lo;
        q[1][i] = r[i].hi;
        q[2][i] = r[i + 8].lo;
        q[3][i] = r[i + 8].hi;
    }
    UNROLL for (int i = 0; i < 4; i++) v_transpose8(q[i]);
    UNROLL for (int i = 0; i < 8; i++) {
        r[i] = (v16){q[0][i], q[2][i]};
        r[i + 8] = (v16){q[1][i], q[3][i]};
    }
}
