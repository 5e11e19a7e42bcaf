/* Planning of paged attention: who computes what; see attention.h.
 *
 * A work item is (sequence, kv head, run of query tokens): all query heads of the group share the keys and values that
 * the item loads.  A decode row of one among many sequences is one item for all its kv heads, whose rows lie side by
 * side, so that the cache is read as one stream.  With few items and long contexts (decode) items are cut further by parts of the context; merging goes
 * part by part in order either way, so a cut never changes a result.
 */
#include "attention.h"

#include "pool.h"

static long max_long(long a, long b) { return a > b ? a : b; }
static long min_long(long a, long b) { return a < b ? a : b; }

static long tokens_per_item(const attention_args *a) { return max_long(1, ITEM_ROWS / (a->q_heads / a->kv_heads)); }

static long query_len(const attention_args *a, long s) { return a->query_starts[s + 1] - a->query_starts[s]; }

/* Parts of the context that query tokens [from, to) of a sequence see. */
static void visible_parts(const attention_args *a, long s, long from, long to, long *first, long *end) {
    long context = a->context_lens[s], base = context - query_len(a, s);
    long lo = a->window ? max_long(0, base + from - a->window + 1) : 0;
    long hi = a->causal ? base + to : context;
    *first = lo / PART;
    *end = (hi + PART - 1) / PART;
}

int attention_valid(const attention_args *a) {
    if (a->sequences && (a->query_starts[0] || a->query_starts[a->sequences] != a->rows)) return 0;
    for (long s = 0; s < a->sequences; s++) {
        long n = query_len(a, s), context = a->context_lens[s], base = context - n;
        if (n < 0 || base < 0 || context > a->table_width * a->block_size) return 0;
        long block = (a->window ? max_long(0, base - a->window + 1) : 0) / a->block_size;
        for (; n && block * a->block_size < context; block++) {
            int32_t id = a->block_tables[s * a->ld_table + block];
            if (id < 0 || id >= a->blocks) return 0;
        }
    }
    return 1;
}

/* Counts items and parts; whether to split follows from the counts alone. */
static void count(const attention_args *a, long *items, long *parts, long *rows_by_parts) {
    long tokens = tokens_per_item(a), group = a->q_heads / a->kv_heads;
    *items = *parts = *rows_by_parts = 0;
    for (long s = 0; s < a->sequences; s++) {
        for (long from = 0, n = query_len(a, s); from < n; from += tokens) {
            long to = min_long(from + tokens, n), first, end;
            visible_parts(a, s, from, to, &first, &end);
            *items += a->kv_heads;
            *parts += a->kv_heads * (end - first);
            *rows_by_parts += a->kv_heads * (end - first) * (to - from) * group;
        }
    }
}

static int worth_splitting(long items, long parts, int size) { return size > 1 && items < 4L * size && parts > items; }

size_t attention_scratch_bytes(const attention_args *a, int size) {
    long items, parts, rows;
    count(a, &items, &parts, &rows);
    size_t bytes = (size_t)(attention_work_floats(a) * size) * 4;
    if (!worth_splitting(items, parts, size)) return bytes + (size_t)items * sizeof(attention_item);
    long width = (a->head_dim + 31) & ~31L;
    return bytes + (size_t)(rows * (width + 2)) * 4 + (size_t)(parts + items) * sizeof(attention_item);
}

/* kv heads of an item of a single token: all of them where the sequences alone keep the team busy. */
static long heads_per_item(const attention_args *a, int size) {
    int fit = a->kv_heads * (a->q_heads / a->kv_heads) <= ITEM_ROWS;
    return fit && a->sequences >= 4L * size ? a->kv_heads : 1;
}

void attention_plan_make(attention_plan *plan, const attention_args *a, int size, void *scratch) {
    long items, parts, rows, tokens = tokens_per_item(a), used = 0;
    count(a, &items, &parts, &rows);
    int split = worth_splitting(items, parts, size);
    long together = split ? 1 : heads_per_item(a, size);
    plan->args = a;
    plan->items = plan->splits = 0;
    plan->work = scratch;
    plan->work_floats = attention_work_floats(a);
    plan->item = (attention_item *)(plan->work + plan->work_floats * size);
    plan->merge = plan->item + (split ? parts : items);
    plan->partials = (float *)(plan->merge + (split ? items : 0));
    /* Late tokens see the longest contexts: they go first, so that no long item is left for the end. */
    for (long s = 0; s < a->sequences; s++) {
        long n = query_len(a, s);
        for (long from = n > 0 ? (n - 1) / tokens * tokens : -1; from >= 0; from -= tokens) {
            long to = min_long(from + tokens, n), first, end;
            visible_parts(a, s, from, to, &first, &end);
            long heads = to - from == 1 ? together : 1;
            for (long h = 0; h < a->kv_heads; h += heads) {
                attention_item whole = {(int32_t)s, (int32_t)h, (int32_t)from, (int32_t)to,
                                        (int32_t)first, (int32_t)end, heads, -1};
                if (!split || end - first < 2) {
                    plan->item[plan->items++] = whole;
                    continue;
                }
                whole.partial = used;
                plan->merge[plan->splits++] = whole;
                for (long p = first; p < end; p++) {
                    attention_item one = whole;
                    one.part = (int32_t)p;
                    one.part_end = (int32_t)p + 1;
                    one.partial = used;
                    used += attention_partial_floats(a, &one);
                    plan->item[plan->items++] = one;
                }
            }
        }
    }
}

void attention_team(const attention_plan *plan, int tid, int size) {
    float *work = plan->work + plan->work_floats * tid;
    /* the heads of a sequence lie side by side in the cache: with items enough, one thread takes them one by one */
    long step = plan->items >= 4 * plan->args->kv_heads * size && !plan->splits && plan->item[0].heads == 1
                    ? plan->args->kv_heads
                    : 1, end;
    for (long i; (i = team_take(plan->items, step, &end)) >= 0;)
        for (; i < end; i++)
            attention_item_run(plan, plan->item + i, i + 1 < end ? plan->item + i + 1 : NULL, work);
    team_barrier(size);
    if (!plan->splits) return;
    for (long i; (i = team_take(plan->splits, 1, &end)) >= 0;) attention_merge_run(plan, plan->merge + i, work);
    team_barrier(size);
}

static void call_team(int tid, int size, void *arg) { attention_team(arg, tid, size); }

/* Entry point for Python.  0; -1 without memory; -2 when an index is out of range. */
int q_attention(const attention_args *a) {
    attention_plan plan;
    if (!attention_valid(a)) return -2;
    pool_enter();
    int size = pool_size();
    void *scratch = pool_scratch(attention_scratch_bytes(a, size));
    if (scratch) {
        attention_plan_make(&plan, a, size, scratch);
        pool_run(call_team, &plan, POOL_ALWAYS);
    }
    pool_leave();
    return scratch ? 0 : -1;
}
