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

#define PRIVATE_ELEMENTS 4096 /* of a row phase that every thread does for itself */

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
    char *operand, *inner_operand;
    char *private_operand;        /* [threads][private_bytes] */
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

static void norm_row(const decoder_model *m, const float *x, const float *norm, float *out, long dim) {
    rms_norm_row(x, norm, out, dim, (float)m->eps, 0);
}

/* Whether every thread makes the operand for itself, in private_operand_of. */
static int is_private(const decoder_step *s, const linear_weight *next) { return s->rows * next->k <= PRIVATE_ELEMENTS; }
static char *private_operand_of(const worker *w) { return w->c->private_operand + w->c->private_bytes * (size_t)w->tid; }

/* The residual, normed, as the operand of `next`, which is returned. */
static void *norm_rows(worker *w, const float *norm, const linear_weight *next) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    long rows = c->s->rows;
    int alone = is_private(c->s, next);
    char *operand = alone ? private_operand_of(w) : c->operand;
    float *row = c->row + m->hidden * w->tid;
    long end, r = 0;
    for (;;) {
        if (alone) end = rows;
        else if ((r = team_take(rows, team_chunk(rows, w->size), &end)) < 0) break;
        for (; r < end; r++) {
            const float *x = c->residual + r * m->hidden;
            if (norm) norm_row(m, x, norm, row, m->hidden);
            linear_make_operand(next, norm ? row : x, 0, 0, operand, r, r + 1, rows);
        }
        if (alone) break;
    }
    if (!alone) team_barrier(w->size);
    lap(w, TIME_ROWS);
    return operand;
}

/* The operand of `next`, which wants whole rows where it is int8: those are made of plain floats [rows][k], in `wide`, and
 * the others are in `operand` already. */
static void *whole_rows(worker *w, const linear_weight *next, char *operand) {
    long rows = w->c->s->rows, end;
    if (next->kind != WEIGHT_INT8) return operand;
    if (is_private(w->c->s, next)) {
        operand = private_operand_of(w);
        linear_make_operand(next, w->c->wide, 0, next->k, operand, 0, rows, rows);
    } else {
        for (long r; (r = team_take(rows, team_chunk(rows, w->size), &end)) >= 0;)
            linear_make_operand(next, w->c->wide, 0, next->k, operand, r, end, rows);
        team_barrier(w->size);
    }
    lap(w, TIME_ROWS);
    return operand;
}

static void product(worker *w, const linear_weight *weight, const void *a, void *out, long ldo, int kind, int time) {
    linear_args g = {.weight = weight, .a = a, .lda = linear_operand_stride(weight), .rows = w->c->s->rows,
                     .out = out, .ldo = ldo, .out_kind = kind, .scale = (float)w->c->m->residual_multiplier};
    linear_team(&g, w->tid, w->size);
    lap(w, time);
}

/* residual += multiplier * (weight x operand), by way of a norm if there is one. */
static void join(worker *w, const linear_weight *weight, const void *a, const float *post, int time) {
    decoder_call *c = w->c;
    const decoder_model *m = c->m;
    long rows = c->s->rows, end;
    if (!post) {
        product(w, weight, a, c->residual, m->hidden, OUT_ADD_F32, time);
        return;
    }
    product(w, weight, a, c->normed, m->hidden, OUT_F32, time);
    v16 scale = v_set1((float)m->residual_multiplier);
    for (long r; (r = team_take(rows, team_chunk(rows, w->size), &end)) >= 0;)
        for (; r < end; r++) {
            float *x = c->normed + r * m->hidden, *to = c->residual + r * m->hidden;
            norm_row(m, x, post, x, m->hidden);
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
            norm_row(m, x, layer->q_norm, x, q);
            norm_row(m, x + q, layer->k_norm, x + q, k);
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
        .eps = m->eps,
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
    join(w, layer->o, whole_rows(w, layer->o, c->operand), layer->attention_post, TIME_O);
}

static void mlp(worker *w, const decoder_layer *layer) {
    decoder_call *c = w->c;
    const linear_weight *down = layer->down;
    int quantized = down->kind == WEIGHT_INT8;
    void *a = norm_rows(w, layer->mlp_norm, layer->gate_up);
    product(w, layer->gate_up, a, quantized ? (void *)c->wide : c->inner_operand,
            quantized ? c->m->inner : linear_operand_stride(down),
            down->kind == WEIGHT_BF16 && BF16_DOT ? OUT_BF16 : OUT_F32, TIME_GATE_UP);
    join(w, down, whole_rows(w, down, c->inner_operand), layer->mlp_post, TIME_DOWN);
}

/* The wanted rows after the last norm. */
static void finish(worker *w) {
    const decoder_call *c = w->c;
    const decoder_step *s = c->s;
    long width = c->m->hidden, end;
    for (long r; (r = team_take(s->outs, team_chunk(s->outs, w->size), &end)) >= 0;)
        for (; r < end; r++) norm_row(c->m, c->residual + s->out_rows[r] * width, c->m->final_norm, s->hidden + r * width, width);
    team_barrier(w->size);
    lap(w, TIME_ROWS);
}

static void step_team(int tid, int size, void *arg) {
    worker w = {.c = arg, .tid = tid, .size = size, .last = seconds()};
    const decoder_model *m = w.c->m;
    long width = (m->q_heads + 2 * m->kv_heads) * m->head_dim;
    embed(&w);
    for (const decoder_layer *layer = m->layers, *end = layer + m->layer_count; layer < end; layer++) {
        void *a = norm_rows(&w, layer->input_norm, layer->qkv);
        product(&w, layer->qkv, a, w.c->qkv, width, OUT_F32, TIME_QKV);
        attend(&w, layer);
        mlp(&w, layer);
    }
    finish(&w);
}

static size_t most(size_t a, size_t b) { return a > b ? a : b; }

/* Lays the scratch memory out; returns the bytes it takes. */
static size_t lay_out(decoder_call *c, char *base, int size) {
    arena a = {.base = base};
    const decoder_model *m = c->m;
    size_t rows = (size_t)c->s->rows, hidden = (size_t)m->hidden;
    size_t width = (size_t)((m->q_heads + 2 * m->kv_heads) * m->head_dim), q = (size_t)(m->q_heads * m->head_dim);
    size_t operand = 0, inner = 0, private = 0;
    for (const decoder_layer *l = m->layers, *end = l + m->layer_count; l < end; l++) {
        operand = most(operand, linear_operand_bytes(l->qkv, c->s->rows));
        operand = most(operand, linear_operand_bytes(l->o, c->s->rows));
        operand = most(operand, linear_operand_bytes(l->gate_up, c->s->rows));
        inner = most(inner, linear_operand_bytes(l->down, c->s->rows));
        const linear_weight *each[] = {l->qkv, l->o, l->gate_up, l->down};
        for (int i = 0; i < 4; i++)
            if (is_private(c->s, each[i])) private = most(private, linear_operand_bytes(each[i], c->s->rows));
    }
    c->private_bytes = align64(private);
    c->residual = arena_take(&a, rows * hidden * 4);
    c->normed = arena_take(&a, rows * hidden * 4);
    c->qkv = arena_take(&a, rows * width * 4);
    c->wide = arena_take(&a, rows * most(q, (size_t)m->inner) * 4);
    c->operand = arena_take(&a, operand);
    c->inner_operand = arena_take(&a, inner);
    c->private_operand = arena_take(&a, c->private_bytes * (size_t)size);
    c->row = arena_take(&a, hidden * (size_t)size * 4);
    for (int i = 0; i < 2; i++) {
        if (!c->has_plan[i]) continue;
        attention_args args = c->attention;
        args.window = i ? c->window : 0;
        char *scratch = arena_take(&a, attention_scratch_bytes(&args, size));
        if (scratch) attention_plan_make(&c->plans[i], &args, size, scratch);
    }
    return a.used;
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
