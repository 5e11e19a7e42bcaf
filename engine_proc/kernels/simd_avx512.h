/* The AVX-512 (F, BW, VL, DQ) side of simd.h: one register is one v16; partial loads and stores are masked. */
typedef __m512 v16;

/* Keeps a loaded value in a register: without it the compiler may load it again for each of its uses. */
INLINE v16 v_pin(v16 v) {
    __asm__("" : "+v"(v));
    return v;
}
INLINE v16 v_zero(void) { return _mm512_setzero_ps(); }
INLINE v16 v_set1(float x) { return _mm512_set1_ps(x); }
INLINE v16 v_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void v_store(float *p, v16 v) { _mm512_storeu_ps(p, v); }
INLINE v16 v_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
INLINE v16 v_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
INLINE v16 v_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
INLINE v16 v_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
INLINE v16 v_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE v16 v_max(v16 a, v16 b) { return _mm512_max_ps(a, b); }
INLINE v16 v_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
INLINE v16 v_round(v16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* a * 2^n where both a and the result are normal numbers (a NaN stays: its n converts to a multiple of 2^9).  Added to
 * the exponent field; vscalefps takes more than a hundred cycles near the smallest exponents. */
INLINE v16 v_ldexp(v16 a, v16 n) {
    __m512i shift = _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), shift));
}
INLINE float v_sum(v16 a) { return _mm512_reduce_add_ps(a); }
INLINE float v_hmax(v16 a) { return _mm512_reduce_max_ps(a); }

INLINE float v_lane0(v16 a) { return _mm512_cvtss_f32(a); }

INLINE __mmask16 v_first(int n) { return (__mmask16)((1u << n) - 1); } /* 0 <= n <= 16 */
INLINE v16 v_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(v_first(n), p); }
INLINE void v_store_n(float *p, v16 v, int n) { _mm512_mask_storeu_ps(p, v_first(n), v); }
/* Lanes [from, to) of v, `other` elsewhere. */
INLINE v16 v_keep(v16 v, int from, int to, v16 other) {
    __mmask16 m = from >= to ? 0 : (__mmask16)(v_first(to) & ~v_first(from));
    return _mm512_mask_mov_ps(other, m, v);
}
/* Zero in the lanes where x < limit. */
INLINE v16 v_zero_below(v16 v, v16 x, v16 limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, limit, _CMP_NLT_UQ), v);
}
/* Stores the lanes whose bits are set. */
INLINE void v_store_bits(float *p, v16 v, unsigned bits) { _mm512_mask_storeu_ps(p, (__mmask16)bits, v); }
INLINE int v_any_nan(v16 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
/* Bit i is set where a[i] > b[i]. */
INLINE unsigned v_gt_bits(v16 a, v16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }

INLINE v16 v_widen(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
INLINE v16 v_load_bf16(const bf16 *p) { return v_widen(_mm256_loadu_si256((const __m256i *)p)); }
INLINE v16 v_load_bf16_n(const bf16 *p, int n) { return v_widen(_mm256_maskz_loadu_epi16(v_first(n), p)); }

INLINE __m256i v_narrow(v16 v) {
    __m512i bits = _mm512_castps_si512(v);
    __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i even = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), lsb);
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    __m512i out = _mm512_mask_mov_epi32(even, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
}
INLINE void v_store_bf16(bf16 *p, v16 v) { _mm256_storeu_si256((__m256i *)p, v_narrow(v)); }
INLINE void v_store_bf16_n(bf16 *p, v16 v, int n) { _mm256_mask_storeu_epi16(p, v_first(n), v_narrow(v)); }

/* Of values that are whole numbers. */
INLINE void v_store_int8(int8_t *p, v16 v) {
    _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}

/* Of 16 bfloat16 pairs (32 values): the even or the odd members as floats. */
INLINE v16 v_pair_even(v16 pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
INLINE v16 v_pair_odd(v16 pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32((int)0xffff0000)));
}

/* lo, hi <- lo[0], hi[0], lo[1], hi[1] ... */
INLINE void v_zip(v16 *lo, v16 *hi) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    v16 a = *lo;
    *lo = _mm512_permutex2var_ps(a, first, *hi);
    *hi = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), *hi);
}

/* r[i][j] <- r[j][i], any 32-bit lanes. */
INLINE void v_transpose16(v16 r[16]) {
    v16 t[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        UNROLL for (int h = 0; h < 2; h++) {
            __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + 2 + h]);
            r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
    }
}
