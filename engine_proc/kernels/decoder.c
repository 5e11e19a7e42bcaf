/* One step of a dense decoder on the thread team; see decoder.h.
 *
 * The residual stream is float32 and everything between two products stays float32 (or the operand type of the next
 * product), so a bfloat16 model is rounded less often here than layer by layer.  Each product is one phase; a row phase
 * (norms) is one more, except for a few rows, which every thread norms for itself: that costs less than a barrier.
 */
#define _GNU_SOURCE
#include "decoder.h"

#include <time.h>

#include "attention.h"
#include "rope.h"
#include "rows.h"

#define PRIVATE_ROWS 4096 /* elements of a row phase that every thread does for itself */

typedef struct {
    const decoder_model *m;
    const decoder_step *s;
    attention_args attention;     /* without caches and window */
    attention_plan plans[2];      /* without and with a window */
    int has_plan[2];
    int64_t window;
    float *residual, *normed;     /* [rows][hidden]; normed: scratch of post-norms */
    float *qkv;                   /* [rows][(q_heads + 2 kv_heads) * head_dim] */
    float *wide;                  /* results on their way to an int8 operand */
    char *operand, *private_operand;
    char *inner_operand;
    float *row;                   /* [threads][hidden] */
    size_t private_bytes;
} decoder_call;

typedef struct {
    decoder_call *c;
    int tid, size;
    double last;
} worker;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void lap(worker *w, int kind) {
    if (w->tid || !w->c->s->times) return;
    double now = seconds();
    w->c->s->times[kind] += now - w->last;
    w->last = now;
}

static int is_private(const decoder_call *c, long rows) { return rows * c->m->hidden <= PRIVATE_ROWS; }

/* Rows of the residual (`which` picks them, or NULL: all), normed, as the operand of `next`; with `copy` also as plain
 * floats.  Returns the operand. */
static void *norm_rows(worker *w, const float *norm, const linear_weight *next, const int32_t *which, long rows,
                       float *copy) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    int alone = is_private(c, rows) && !copy;
    char *operand = alone ? c->private_operand + c->private_bytes * (size_t)w->tid : c->operand;
    float *row = c->row + m->hidden * w->tid;
    long end, r = 0;
    for (;;) {
        if (alone) end = rows;
        else if ((r = team_take(rows, team_chunk(rows, w->size), &end)) < 0) break;
        for (; r < end; r++) {
            float *x = c->residual + (which ? which[r] : r) * m->hidden, *y = norm ? row : x;
            if (norm) rms_norm_row(x, NULL, norm, y, m->hidden, (float)m->eps, (float)m->norm_offset, 0, 0, 0);
            if (copy) memcpy(copy + r * m->hidden, y, (size_t)m->hidden * 4);
            if (next) linear_make_operand(next, y, 0, 0, operand, r, r + 1, rows);
        }
        if (alone) break;
    }
    if (!alone) team_barrier(w->size);
    lap(w, TIME_ROWS);
    return operand;
}

/* int8 operands need whole rows: made from plain floats [rows][k]. */
static void quantize_rows(worker *w, const linear_weight *next, void *operand) {
    long rows = w->c->s->rows, end;
    for (long r; (r = team_take(rows, team_chunk(rows, w->size), &end)) >= 0;)
        linear_make_operand(next, w->c->wide, 0, next->k, operand, r, end, rows);
    team_barrier(w->size);
    lap(w, TIME_ROWS);
}

static void product(worker *w, const linear_weight *weight, const void *a, long rows, void *out, long ldo, int kind,
                    int time) {
    linear_args g = {.weight = weight, .a = a, .lda = linear_operand_stride(weight), .rows = rows, .out = out,
                     .ldo = ldo, .out_kind = kind, .scale = (float)w->c->m->residual_multiplier};
    linear_team(&g, w->tid, w->size);
    lap(w, time);
}

/* residual += multiplier * (weight x operand), by way of a norm if there is one. */
static void join(worker *w, const linear_weight *weight, const void *a, const float *post, int time) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    long rows = c->s->rows, end;
    if (!post) {
        product(w, weight, a, rows, c->residual, m->hidden, OUT_ADD_F32, time);
        return;
    }
    product(w, weight, a, rows, c->normed, m->hidden, OUT_F32, time);
    v16 scale = v_set1((float)m->residual_multiplier);
    for (long r; (r = team_take(rows, team_chunk(rows, w->size), &end)) >= 0;)
        for (; r < end; r++) {
            float *x = c->normed + r * m->hidden, *to = c->residual + r * m->hidden;
            rms_norm_row(x, NULL, post, x, m->hidden, (float)m->eps, (float)m->norm_offset, 0, 0, 0);
            for (long i = 0; i < m->hidden; i += 16) {
                int n = m->hidden - i < 16 ? (int)(m->hidden - i) : 16;
                v_store_any_n(to, i, v_fma(v_load_any_n(x, i, n, 0), scale, v_load_any_n(to, i, n, 0)), n, 0);
            }
        }
    team_barrier(w->size);
    lap(w, TIME_ROWS);
}

static void embed(worker *w) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    const decoder_step *s = c->s;
    v16 factor = v_set1((float)m->embedding_multiplier);
    long end;
    for (long r; (r = team_take(s->rows, team_chunk(s->rows, w->size), &end)) >= 0;)
        for (; r < end; r++) {
            long id = s->ids[r];
            for (long i = 0; i < m->hidden; i += 16) {
                int n = m->hidden - i < 16 ? (int)(m->hidden - i) : 16;
                v16 v = id < 0 ? v_load_any_n(s->embeds, r * m->hidden + i, n, 0)
                               : v_mul(v_load_any_n(m->embedding, id * m->hidden + i, n, (int)m->embedding_bf16), factor);
                v_store_any_n(c->residual, r * m->hidden + i, v, n, 0);
            }
        }
    team_barrier(w->size);
    lap(w, TIME_ROWS);
}

/* RMSNorm of all query heads as one vector, and of all key heads (OLMo 2). */
static void norm_full(worker *w, const decoder_layer *layer) {
    const decoder_model *m = w->c->m;
    long q = m->q_heads * m->head_dim, k = m->kv_heads * m->head_dim, width = q + 2 * k, end;
    for (long r; (r = team_take(w->c->s->rows, team_chunk(w->c->s->rows, w->size), &end)) >= 0;)
        for (; r < end; r++) {
            float *x = w->c->qkv + r * width;
            rms_norm_row(x, NULL, layer->q_norm, x, q, (float)m->eps, (float)m->norm_offset, 0, 0, 0);
            rms_norm_row(x + q, NULL, layer->k_norm, x + q, k, (float)m->eps, (float)m->norm_offset, 0, 0, 0);
        }
    team_barrier(w->size);
}

static rope_args rope_of(const decoder_call *c, const decoder_layer *layer) {
    const decoder_model *m = c->m;
    long q = m->q_heads * m->head_dim, k = m->kv_heads * m->head_dim, width = q + 2 * k;
    int per_head = !m->qk_norm_full;
    return (rope_args){
        .q = c->qkv, .k = c->qkv + q, .v = c->qkv + q + k, .cos = layer->cos, .sin = layer->sin,
        .q_norm = per_head ? layer->q_norm : NULL, .k_norm = per_head ? layer->k_norm : NULL,
        .positions = c->s->positions, .slots = c->s->slots, .k_cache = layer->k_cache, .v_cache = layer->v_cache,
        .ldq = width, .ldk = width, .ldv = width, .rows = c->s->rows, .q_heads = m->q_heads, .kv_heads = m->kv_heads,
        .head_dim = m->head_dim, .half = layer->half, .position_count = layer->positions,
        .slot_count = m->blocks * m->block_size, .cache_bf16 = m->cache_bf16,
        .eps = m->eps, .norm_offset = m->norm_offset,
    };
}

static void attend(worker *w, const decoder_layer *layer) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    long q = m->q_heads * m->head_dim;
    int full = m->qk_norm_full && layer->q_norm, quantized = layer->o->kind == WEIGHT_INT8;
    if (full) norm_full(w, layer);
    rope_args rope = rope_of(c, layer);
    rope_team(&rope, w->tid, w->size);
    lap(w, TIME_ROPE);
    attention_args args = c->attention;
    args.k_cache = layer->k_cache;
    args.v_cache = layer->v_cache;
    args.window = layer->window;
    args.out = quantized ? (void *)c->wide : c->operand;
    args.ldo = quantized ? q : linear_operand_stride(layer->o);
    args.is_bf16 = 0;
    args.out_bf16 = layer->o->kind == WEIGHT_BF16 && BF16_DOT;
    attention_plan plan = c->plans[layer->window != 0];
    plan.args = &args;
    attention_team(&plan, w->tid, w->size);
    lap(w, TIME_ATTENTION);
    if (quantized) quantize_rows(w, layer->o, c->operand);
}

static void mlp(worker *w, const decoder_layer *layer) {
    decoder_call *c = w->c;
    const linear_weight *down = layer->down;
    int quantized = down->kind == WEIGHT_INT8;
    void *a = norm_rows(w, layer->mlp_norm, layer->gate_up, NULL, c->s->rows, NULL);
    product(w, layer->gate_up, a, c->s->rows, quantized ? (void *)c->wide : c->inner_operand,
            quantized ? c->m->inner : linear_operand_stride(down),
            down->kind == WEIGHT_BF16 && BF16_DOT ? OUT_BF16 : OUT_F32, TIME_GATE_UP);
    if (quantized) quantize_rows(w, down, c->inner_operand);
    join(w, down, c->inner_operand, layer->mlp_post, TIME_DOWN);
}

static void head(worker *w) {
    const decoder_model *m = w->c->m;
    const decoder_step *s = w->c->s;
    if (!s->outs) return;
    const linear_weight *weight = s->logits ? m->head : NULL;
    void *a = norm_rows(w, m->final_norm, weight, s->out_rows, s->outs, s->hidden);
    if (!weight) return;
    product(w, weight, a, s->outs, s->logits, weight->n, OUT_F32, TIME_HEAD);
    if (m->logit_multiplier == 1.0 && m->logit_softcap == 0.0) return;
    long total = s->outs * weight->n, end;
    v16 factor = v_set1((float)m->logit_multiplier), cap = v_set1((float)m->logit_softcap);
    for (long i; (i = team_take(total, 4096, &end)) >= 0;)
        for (; i < end; i += 16) {
            int n = end - i < 16 ? (int)(end - i) : 16;
            v16 v = v_mul(v_load_any_n(s->logits, i, n, 0), factor);
            if (m->logit_softcap > 0) v = v_mul(cap, v_tanh(v_div(v, cap)));
            v_store_any_n(s->logits, i, v, n, 0);
        }
    team_barrier(w->size);
    lap(w, TIME_HEAD);
}

static void step_team(int tid, int size, void *arg) {
    worker w = {.c = arg, .tid = tid, .size = size, .last = seconds()};
    const decoder_model *m = w.c->m;
    long width = (m->q_heads + 2 * m->kv_heads) * m->head_dim, rows = w.c->s->rows;
    embed(&w);
    for (const decoder_layer *layer = m->layers, *end = layer + m->layer_count; layer < end; layer++) {
        void *a = norm_rows(&w, layer->input_norm, layer->qkv, NULL, rows, NULL);
        product(&w, layer->qkv, a, rows, w.c->qkv, width, OUT_F32, TIME_QKV);
        attend(&w, layer);
        join(&w, layer->o, w.c->operand, layer->attention_post, TIME_O);
        mlp(&w, layer);
    }
    head(&w);
}

static size_t align64(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* Lays the scratch memory out from `base` (NULL: only measures); returns the bytes it takes. */
static size_t lay_out(decoder_call *c, char *base, int size) {
    const decoder_model *m = c->m;
    size_t rows = (size_t)c->s->rows, hidden = (size_t)m->hidden, used = 0;
    size_t width = (size_t)((m->q_heads + 2 * m->kv_heads) * m->head_dim), q = (size_t)(m->q_heads * m->head_dim);
    size_t operand = 0, inner = 0, private = 0;
    long private_rows = PRIVATE_ROWS / m->hidden;
    for (const decoder_layer *l = m->layers, *end = l + m->layer_count; l < end; l++) {
        operand = most(operand, linear_operand_bytes(l->qkv, c->s->rows));
        operand = most(operand, linear_operand_bytes(l->o, c->s->rows));
        operand = most(operand, linear_operand_bytes(l->gate_up, c->s->rows));
        inner = most(inner, linear_operand_bytes(l->down, c->s->rows));
        private = most(private, linear_operand_bytes(l->qkv, private_rows));
        private = most(private, linear_operand_bytes(l->gate_up, private_rows));
    }
    if (m->head) {
        operand = most(operand, linear_operand_bytes(m->head, c->s->outs));
        private = most(private, linear_operand_bytes(m->head, private_rows));
    }
    c->private_bytes = align64(private);
#define PLACE(field, bytes)                        \
    do {                                           \
        if (base) c->field = (void *)(base + used); \
        used += align64(bytes);                    \
    } while (0)
    PLACE(residual, rows * hidden * 4);
    PLACE(normed, rows * hidden * 4);
    PLACE(qkv, rows * width * 4);
    PLACE(wide, rows * most(q, (size_t)m->inner) * 4);
    PLACE(operand, operand);
    PLACE(inner_operand, inner);
    PLACE(private_operand, c->private_bytes * (size_t)size);
    PLACE(row, hidden * (size_t)size * 4);
#undef PLACE
    for (int i = 0; i < 2; i++) {
        if (!c->has_plan[i]) continue;
        attention_args args = c->attention;
        args.window = i ? c->window : 0;
        if (base) attention_plan_make(&c->plans[i], &args, size, base + used);
        used += align64(attention_scratch_bytes(&args, size));
    }
    return used;
}

/* Whether every index of the step stays inside its array; `c` has no scratch yet. */
static int valid(const decoder_call *c) {
    const decoder_model *m = c->m;
    const decoder_step *s = c->s;
    for (long i = 0; i < s->outs; i++)
        if (s->out_rows[i] < 0 || s->out_rows[i] >= s->rows) return 0;
    for (long r = 0; r < s->rows; r++)
        if (s->ids[r] >= m->vocab || (s->ids[r] < 0 && !s->embeds)) return 0;
    for (int i = 0; i < 2; i++) {
        attention_args args = c->attention;
        args.window = i ? c->window : 0;
        if (c->has_plan[i] && !attention_valid(&args)) return 0;
    }
    /* rotary tables may differ in length; the shortest one decides */
    const decoder_layer *shortest = NULL;
    for (const decoder_layer *l = m->layers, *end = l + m->layer_count; l < end; l++)
        if (l->cos && (!shortest || l->positions < shortest->positions)) shortest = l;
    rope_args rope = rope_of(c, shortest ? shortest : m->layers);
    return rope_valid(&rope);
}

/* Entry point for Python.  0; -1 without memory; -2 when an index is out of range. */
int q_decoder_step(const decoder_model *m, const decoder_step *s) {
    long q = m->q_heads * m->head_dim, k = m->kv_heads * m->head_dim;
    decoder_call c = {
        .m = m, .s = s,
        .attention = {.block_tables = s->block_tables, .query_starts = s->query_starts,
                      .context_lens = s->context_lens, .ldq = q + 2 * k, .ld_table = s->ld_table,
                      .rows = s->rows, .blocks = m->blocks, .table_width = s->table_width,
                      .sequences = s->sequences, .block_size = m->block_size, .q_heads = m->q_heads,
                      .kv_heads = m->kv_heads, .head_dim = m->head_dim, .causal = 1, .cache_bf16 = m->cache_bf16,
                      .scale = m->scale, .softcap = m->softcap},
    };
    for (long i = 0; i < m->layer_count; i++) {
        c.has_plan[m->layers[i].window != 0] = 1;
        if (m->layers[i].window) c.window = m->layers[i].window;
    }
    if (!valid(&c)) return -2;
    pool_enter();
    int size = pool_size();
    char *base = pool_scratch(lay_out(&c, NULL, size));
    if (base) {
        lay_out(&c, base, size);
        c.attention.q = c.qkv;
        pool_run(step_team, &c, POOL_ALWAYS);
    }
    pool_leave();
    return base ? 0 : -1;
}
