/* bfloat16 weights in three quarters of their bytes, exactly: for few rows a product is nothing but reading them.
 *
 * Owns: a second copy of a weight's panels, `light`, and the products of up to LIGHT_ROWS rows with it.  The weights of a
 * panel have few exponents: the 16 most frequent are written in 4 bits.  A group, which is a pair of k for 32 columns, that
 * needs another one is kept as it is.  Decoding takes two byte shuffles and gives the bits of panel_bf16, in its order.
 *
 * Panel: uint8 [16] high and [16] low bytes of the exponents; uint64 [(k / 2 + 63) / 64], a bit for each whole group; then
 * for each pair of k either bfloat16 [32][2], or uint8 [64] signs and fractions and uint8 [32] of exponents.  Sign and
 * fraction of word i of the group are byte PLACE(i), its exponent is that half byte: what unpacking bytes puts back.
 */
#include "linear.h"

#define WHOLE_GROUP 128
#define LIGHT_GROUP 96
#define PLACE(i) ((i) % 32 / 8 * 16 + (i) / 32 * 8 + (i) % 8)

static long pairs_of(const linear_weight *w) { return (w->k + 1) / 2; }
static size_t head_bytes(const linear_weight *w) { return 32 + (size_t)(pairs_of(w) + 63) / 64 * 8; }
static const uint16_t *plain_panel(const linear_weight *w, long panel) {
    return (const uint16_t *)((const char *)w->panels + (size_t)panel * linear_panel_bytes(w));
}

/* code[exponent]: its place among the most frequent ones of a panel, or 16. */
static void choose_exponents(const uint16_t *words, long count, uint8_t chosen[16], uint8_t code[256]) {
    uint32_t seen[256] = {0};
    for (long i = 0; i < count; i++) seen[words[i] >> 7 & 0xff]++;
    memset(code, 16, 256);
    for (int c = 0; c < 16; c++) {
        int best = -1;
        for (int e = 0; e < 256; e++)
            if (code[e] == 16 && (best < 0 || seen[e] > seen[best])) best = e;
        chosen[c] = (uint8_t)best;
        code[best] = (uint8_t)c;
    }
}

static int is_whole(const uint16_t *group, const uint8_t code[256]) {
    int other = 0;
    for (int i = 0; i < 2 * PANEL; i++) other |= code[group[i] >> 7 & 0xff] & 16;
    return other;
}

typedef struct {
    const linear_weight *w;
    int64_t *bytes;   /* of each panel, to be counted; or NULL */
    char *light;      /* to be filled */
} light_call;

static void write_panel(const linear_weight *w, long panel, char *to) {
    const uint16_t *words = plain_panel(w, panel);
    uint8_t chosen[16], code[256];
    choose_exponents(words, pairs_of(w) * 2 * PANEL, chosen, code);
    for (int c = 0; c < 16; c++) {
        to[c] = (char)(chosen[c] >> 1);
        to[16 + c] = (char)(chosen[c] << 7);
    }
    memset(to + 32, 0, head_bytes(w) - 32);
    char *at = to + head_bytes(w);
    for (long p = 0; p < pairs_of(w); p++, words += 2 * PANEL) {
        if (is_whole(words, code)) {
            to[32 + p / 8] = (char)(to[32 + p / 8] | 1 << p % 8);
            memcpy(at, words, WHOLE_GROUP);
            at += WHOLE_GROUP;
            continue;
        }
        memset(at, 0, LIGHT_GROUP);
        for (int i = 0; i < 2 * PANEL; i++) {
            int place = PLACE(i);
            at[place] = (char)((words[i] >> 8 & 0x80) | (words[i] & 0x7f));
            at[64 + place / 2] = (char)(at[64 + place / 2] | code[words[i] >> 7 & 0xff] << place % 2 * 4);
        }
        at += LIGHT_GROUP;
    }
}

static int64_t count_panel(const linear_weight *w, long panel) {
    const uint16_t *words = plain_panel(w, panel);
    uint8_t chosen[16], code[256];
    choose_exponents(words, pairs_of(w) * 2 * PANEL, chosen, code);
    int64_t bytes = (int64_t)head_bytes(w);
    for (long p = 0; p < pairs_of(w); p++, words += 2 * PANEL) bytes += is_whole(words, code) ? WHOLE_GROUP : LIGHT_GROUP;
    return bytes;
}

static void light_team(int tid, int size, void *arg) {
    (void)tid;
    const light_call *c = arg;
    long end;
    for (long panel; (panel = team_take(linear_panels(c->w), 1, &end)) >= 0;) {
        if (c->bytes) c->bytes[panel] = count_panel(c->w, panel);
        else write_panel(c->w, panel, c->light + c->w->light_at[panel]);
    }
    team_barrier(size);
}

/* Entry points for Python.  Bytes of each light panel of a packed bfloat16 weight; 0 where this processor has no use for
 * them.  Then the panels themselves, where w->light_at says. */
int q_count_light(const linear_weight *w, int64_t *bytes) {
    light_call c = {.w = w, .bytes = bytes};
    if (LIGHT_ROWS) pool_call(light_team, &c, POOL_ALWAYS);
    return LIGHT_ROWS;
}

void q_pack_light(const linear_weight *w, char *light) {
    light_call c = {.w = w, .light = light};
    pool_call(light_team, &c, POOL_ALWAYS);
}

#if LIGHT_ROWS

/* One group as 2 x 32 words. */
INLINE void decode(const char *at, __m512i high, __m512i low, v16 words[2]) {
    __m512i signs = _mm512_loadu_si512(at), sign = _mm512_set1_epi8((char)0x80);
    __m512i packed = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(at + 64)));
    /* (packed | packed << 4) & 0x0f0f..: a code in each byte */
    __m512i codes = _mm512_ternarylogic_epi32(packed, _mm512_slli_epi16(packed, 4), _mm512_set1_epi8(0x0f), 0xa8);
    /* the sign from one, the rest from the other: sign ? signs : byte, and the other way round */
    __m512i upper = _mm512_ternarylogic_epi32(sign, signs, _mm512_shuffle_epi8(high, codes), 0xca);
    __m512i lower = _mm512_ternarylogic_epi32(sign, _mm512_shuffle_epi8(low, codes), signs, 0xca);
    words[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi8(lower, upper));
    words[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi8(lower, upper));
}

INLINE void light_body(const int rows, const bf16_operand *a, long lda, const char *panel, long pairs, float *c) {
    v16 acc[LIGHT_ROWS][2];
    UNROLL for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = v_zero();
    __m512i high = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)panel));
    __m512i low = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(panel + 16)));
    const char *at = panel + 32 + (pairs + 63) / 64 * 8;
    for (long begin = 0; begin < pairs; begin += 64) {
        uint64_t whole;
        memcpy(&whole, panel + 32 + begin / 8, 8);
        for (long p = begin; p < pairs && p < begin + 64; p++, whole >>= 1, a += 2) {
            _mm_prefetch(at + STREAM_AHEAD, _MM_HINT_T0);
            _mm_prefetch(at + STREAM_AHEAD + 64, _MM_HINT_T0);
            v16 words[2];
            if (__builtin_expect(whole & 1, 0)) {
                words[0] = v_load((const float *)at);
                words[1] = v_load((const float *)(at + 64));
                at += WHOLE_GROUP;
            } else {
                decode(at, high, low, words);
                at += LIGHT_GROUP;
            }
            UNROLL for (int j = 0; j < 2; j++) {
#if BF16_DOT
                UNROLL for (int r = 0; r < rows; r++) {
                    float pair;
                    memcpy(&pair, a + r * lda, 4);
                    acc[r][j] = dot_pairs(acc[r][j], v_set1(pair), words[j]);
                }
#else
                v16 even = v_pair_even(words[j]), odd = v_pair_odd(words[j]);
                UNROLL for (int r = 0; r < rows; r++) {
                    acc[r][j] = v_fma(v_set1(a[r * lda]), even, acc[r][j]);
                    acc[r][j] = v_fma(v_set1(a[r * lda + 1]), odd, acc[r][j]);
                }
#endif
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) {
        v_store(c + r * PANEL, acc[r][0]);
        v_store(c + r * PANEL + 16, acc[r][1]);
    }
}

void panel_light(const linear_weight *w, const bf16_operand *a, long lda, long rows, long panel, float *c) {
    const char *at = w->light + w->light_at[panel];
    long pairs = pairs_of(w);
    switch (rows) {
    case 1: light_body(1, a, lda, at, pairs, c); break;
    case 2: light_body(2, a, lda, at, pairs, c); break;
    case 3: light_body(3, a, lda, at, pairs, c); break;
    case 4: light_body(4, a, lda, at, pairs, c); break;
    }
}

#endif
