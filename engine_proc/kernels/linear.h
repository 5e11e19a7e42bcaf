/* Products of activations with weights that were packed once.
 *
 * Owns: the packed layout, its description `linear_weight`, and linear_team(), the product as one phase of a team.
 *
 * A weight [n][k] is cut into panels of 32 outputs, each one sequential stream that a thread reads from end to end:
 *   WEIGHT_F32   float    [panel][k][32]
 *   WEIGHT_BF16  bfloat16 [panel][k/2][32][2]            (k padded to even with a zero)
 *   WEIGHT_INT8  groups of 64 of k: uint8 [16][32][4], bfloat16 scale [32]; see linear_int8.c
 * A gated weight [2n][k] (rows: n gates, then n ups) puts 16 gates and their 16 ups into one panel, so that the product
 * ends with act(gate) * up in registers and only n columns are ever written.
 */
#ifndef QUARTET_LINEAR_H
#define QUARTET_LINEAR_H

#include "pool.h"
#include "tile.h"

#ifndef STREAM_AHEAD
#define STREAM_AHEAD 4096 /* bytes a thread asks for ahead of its stream of weights; isa.py knows better */
#endif

enum { WEIGHT_F32 = 0, WEIGHT_BF16 = 1, WEIGHT_INT8 = 2 };
enum { ACT_NONE = 0, ACT_SILU = 1, ACT_GELU_TANH = 2, ACT_GELU = 3, ACT_RELU = 4, ACT_TANH = 5 };
enum { OUT_F32 = 0, OUT_BF16 = 1, OUT_ADD_F32 = 2, OUT_BEST = 3 }; /* OUT_ADD_F32: out += scale * result */

/* OUT_BEST: nothing is stored; out is best_token [rows] of the calling thread, kept up to date (see best.c). */
typedef struct {
    float value;          /* the largest result of the row so far; minus infinity before the first */
    int32_t id;           /* its column, the lowest if there are several */
    int64_t nan;          /* the row holds a NaN */
} best_token;

/* Mirrored field for field by native.py; all 8 bytes wide. */
typedef struct {
    const void *panels;
    const float *bias;    /* [n] (gated: [2n]) or NULL */
    int64_t n, k;         /* outputs (gated: of each half) and inputs */
    int64_t kind, act;    /* act != ACT_NONE: gated */
    int64_t post;         /* of a layer without a gate: the activation of its outputs */
    const char *light;    /* bfloat16: the same panels in fewer bytes (light.c), or NULL */
    const int64_t *light_at; /* where each begins */
} linear_weight;

typedef struct {
    const linear_weight *weight;
    const void *a;        /* rows in the operand type of the weight's kind, see linear_operand_bytes */
    long lda;             /* elements between rows of `a` */
    long rows;
    void *out;
    long ldo;
    int out_kind;
    float scale;
} linear_args;

INLINE v16 v_activate(v16 v, long act) {
    switch (act) {
    case ACT_SILU: return v_silu(v);
    case ACT_GELU_TANH: return v_gelu_tanh(v);
    case ACT_GELU: return v_gelu(v);
    case ACT_RELU: return v_max(v_zero(), v);
    case ACT_TANH: return v_tanh(v);
    default: return v;
    }
}

INLINE long linear_panels(const linear_weight *w) { return w->act ? (w->n + 15) / 16 : (w->n + PANEL - 1) / PANEL; }

/* The product as one phase; ends with a barrier. */
void linear_team(const linear_args *args, int tid, int size);

/* The same for rows [row, stop) and one panel, in the calling thread. */
void linear_panel(const linear_args *args, long row, long stop, long panel);

/* Bytes of a panel. */
size_t linear_panel_bytes(const linear_weight *w);

/* Elements of one operand row (padded), the bytes of `rows` such rows, and the conversion of rows [from, to). */
long linear_operand_stride(const linear_weight *w);
size_t linear_operand_bytes(const linear_weight *w, long rows);
void linear_make_operand(const linear_weight *w, const void *x, int x_bf16, long ldx, void *a, long from, long to,
                         long rows);

/* Rows of x [rows][k] on their way to be the operand of a weight: each thread makes a few for itself, which saves a
 * barrier, more are made together. */
typedef struct {
    const linear_weight *weight;
    const void *x;
    long ldx, rows;
    int x_bf16;
    char *made;           /* linear_input_bytes of memory; NULL where x is an operand as it is */
} linear_input;

size_t linear_input_bytes(const linear_input *in, int size);
/* Sets `a` and `lda` of the product; called by the whole team. */
void linear_take_input(const linear_input *in, linear_args *g, int tid, int size);

/* Row of the unpacked weight that fills column `c` of a panel, or -1 for padding. */
long linear_source_row(const linear_weight *w, long panel, long c);

/* light.c */
#if defined(__AVX512BW__)
#define LIGHT_ROWS 4 /* more are bound by arithmetic */
void panel_light(const linear_weight *w, const bf16_operand *a, long lda, long rows, long panel, float *c);
#else
#define LIGHT_ROWS 0
#endif

/* linear_int8.c */
void panel_int8(const linear_weight *w, const void *a, long rows_total, long row, long rows, const void *panel, float *c,
                ahead next);
void int8_make_operand(const linear_weight *w, const void *x, int x_bf16, long ldx, void *a, long from, long to,
                       long rows);
long int8_stride(long k);
size_t int8_operand_bytes(long k, long rows);
size_t int8_panel_bytes(long k);
/* What an operand row stands for: values[k]. */
void int8_values(const void *a, long k, long row, long rows, float *values);

#endif
