/* What sampling needs from rows of logits: masks, the best token with its log-probability, a NaN flag. */
#include "pool.h"
#include "simd.h"

typedef struct {
    const char *logits;
    int32_t *ids;        /* [rows] */
    float *logprobs;     /* [rows], of the ids, or NULL */
    uint8_t *nan;        /* [rows] */
    long rows, vocab, ld;
    int is_bf16;
} logits_call;

INLINE v16 row_part(const logits_call *c, const void *row, long i, const int is_bf16) {
    long left = c->vocab - i;
    if (left >= 16) return v_load_any(row, i, is_bf16);
    return v_keep(v_load_any_n(row, i, (int)left, is_bf16), 0, (int)left, v_set1(-INFINITY));
}

/* Maximum of the row; *nan is set when it holds a NaN. */
INLINE float row_max(const logits_call *c, const void *row, int *nan, const int is_bf16) {
    v16 most = v_set1(-INFINITY);
    int bad = 0;
    for (long i = 0; i < c->vocab; i += 16) {
        v16 v = row_part(c, row, i, is_bf16);
        bad |= v_any_nan(v);
        most = v_max(most, v);
    }
    *nan = bad;
    return v_hmax(most);
}

INLINE float row_logsumexp(const logits_call *c, const void *row, float max, const int is_bf16) {
    v16 sum = v_zero(), shift = v_set1(max);
    for (long i = 0; i < c->vocab; i += 16) sum = v_add(sum, v_exp(v_sub(row_part(c, row, i, is_bf16), shift)));
    return max + logf(v_sum(sum));
}

INLINE void argmax_row(const logits_call *c, long r, const int is_bf16) {
    const void *row = c->logits + r * c->ld * (is_bf16 ? 2 : 4);
    int nan;
    float max = row_max(c, row, &nan, is_bf16);
    c->nan[r] = (uint8_t)nan;
    c->ids[r] = 0;
    v16 best = v_set1(max);
    for (long i = 0; !nan && i < c->vocab; i += 16) {
        unsigned equal = v_gt_bits(best, row_part(c, row, i, is_bf16)) ^ 0xffff;
        if (!equal) continue;
        c->ids[r] = (int32_t)(i + __builtin_ctz(equal));
        break;
    }
    if (c->logprobs) c->logprobs[r] = nan ? NAN : max - row_logsumexp(c, row, max, is_bf16);
}

typedef struct {
    float *logits;
    const int64_t *which;
    const uint32_t *allowed;
    long rows, vocab, ld, words;
} mask_call;

/* Whole words of ones are left alone, so that a row which may say nearly anything is hardly read. */
INLINE void mask_row(float *row, const uint32_t *allowed, long vocab) {
    v16 never = v_set1(-INFINITY);
    for (long i = 0; i < vocab; i += 32) {
        uint32_t bits = ~allowed[i / 32];
        if (vocab - i < 32) bits &= (1u << (vocab - i)) - 1;
        if (bits & 0xffff) v_store_bits(row + i, never, bits & 0xffff);
        if (bits >> 16) v_store_bits(row + i + 16, never, bits >> 16);
    }
}

static void mask_team(int tid, int size, void *arg) {
    (void)tid;
    mask_call *c = arg;
    long end;
    for (long r; (r = team_take(c->rows, 1, &end)) >= 0;)
        mask_row(c->logits + c->which[r] * c->ld, c->allowed + r * c->words, c->vocab);
    team_barrier(size);
}

static void argmax_team(int tid, int size, void *arg) {
    (void)tid;
    logits_call *c = arg;
    long end;
    for (long r; (r = team_take(c->rows, 1, &end)) >= 0;) {
        if (c->is_bf16) argmax_row(c, r, 1);
        else argmax_row(c, r, 0);
    }
    team_barrier(size);
}

/* Entry points for Python.  logits[which[r]][i] becomes minus infinity where bit i of allowed[r] is clear; a row of bits has `words` words. */
void q_mask(float *logits, const int64_t *which, const uint32_t *allowed, long rows, long vocab, long ld, long words) {
    mask_call c = {.logits = logits, .which = which, .allowed = allowed, .rows = rows, .vocab = vocab, .ld = ld,
                   .words = words};
    pool_call(mask_team, &c, rows > 1 ? rows * vocab : 0);
}

/* logits[rows][vocab], rows ld apart; ties go to the lowest id; a row with NaN gets id 0. */
void q_argmax(const void *logits, int is_bf16, long rows, long vocab, long ld, int32_t *ids, float *logprobs,
              uint8_t *nan) {
    logits_call c = {.logits = logits, .ids = ids, .logprobs = logprobs, .nan = nan,
                     .rows = rows, .vocab = vocab, .ld = ld, .is_bf16 = is_bf16};
    pool_call(argmax_team, &c, rows > 1 ? rows * vocab : 0);
}
