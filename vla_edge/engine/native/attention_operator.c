/* `vla_edge::Attention`, as in `attention.h`
 *   inputs      q (..., rows, depth), k (..., tokens, depth), v (..., tokens, width) and, where there is one, mask
 *               (1, ..., mask_rows, tokens); keys and values of tokens that come before those, if any, (..., before, depth)
 *               and (..., before, width), of one layer or of all one after the other; float32
 *   attributes  scale; rows_first, which of q, k, v and y are (1, rows, heads, ...) instead; layer, the place in the cache
 *   output      (..., rows, width) float32
 */
#include <stdlib.h>

#include "operator.h"

/* a multiple of the rows that any way has at work together */
enum { ROWS_AT_ONCE = 12 };

typedef struct {
    Attention attention;
    const Way *way;
    char *packed, *mask;           /* of all heads, one after the other */
    size_t each, scratch, parts;   /* bytes of a head and of rows at work; shares of the rows */
    int failed;
} AttentionWork;

static void pack_head(void *data, size_t head) {
    const AttentionWork *work = data;
    work->way->pack(&work->attention, head, work->packed + head * work->each);
}

static void attend(void *data, size_t task) {
    AttentionWork *work = data;
    const Attention *at = &work->attention;
    const size_t head = task / work->parts;
    const Rows rows = rows_of(task % work->parts, work->parts, at->rows, ROWS_AT_ONCE);
    void *scratch = aligned_alloc(64, work->scratch);
    if (!scratch) work->failed = 1;
    else
        work->way->attend(
            at, head, rows.begin, rows.end, work->packed + head * work->each, work->mask, scratch);
    free(scratch);
}

/* Memory for all of it, in one; whoever calls frees `packed`. */
static int prepare_attention(AttentionWork *work) {
    const Attention *at = &work->attention;
    work->parts = shares_of(at->rows, ROWS_AT_ONCE, at->heads ? at->heads : 1);
    work->each = attention_packed(at);
    work->scratch = attention_scratch(at);
    work->packed = aligned_alloc(64, at->heads * work->each + attention_masked(at) + 64);
    if (!work->packed) return 0;
    work->mask = work->packed + at->heads * work->each;
    attention_mask(at, work->mask);
    return 1;
}

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor q, k, v, mask, k_before, v_before;
    TRY(read_inputs(kernel, context, (Tensor *const[]){&q, &k, &v, &mask, &k_before, &v_before}, 6, 3));
    const size_t first = (size_t)kernel->rows_first;
    if (q.count < 2 || k.count < 2 || v.count < 2 || (mask.data && mask.count < 2) ||
        (k_before.data && k_before.count < 2) || (v_before.data && v_before.count < 2))
        return fail(api, "Attention: tensors of at least 2 dimensions");
    if (!heads_first(&q, first & 1) || !heads_first(&k, first & 2) || !heads_first(&v, first & 4) ||
        (first & 8 && q.count != 4))
        return fail(api, "Attention: what has its rows first has 4 dimensions");
    const size_t before = k_before.data ? last(&k_before, 1) : 0, layer = (size_t)kernel->layer;
    AttentionWork work = {
        .attention = {
            .q = q.data, .k = k.data, .v = v.data, .mask = mask.data, .heads = leading(&q, 2), .rows = last(&q, 1),
            .tokens = last(&k, 1) + before, .depth = last(&q, 0), .width = last(&v, 0), .scale = kernel->scale,
            .mask_rows = mask.data ? last(&mask, 1) : 1, .rows_first = first,
            .before = before,
        },
        .way = kernel->way,
    };
    Attention *at = &work.attention;
    if (leading(&k, 2) != at->heads || leading(&v, 2) != at->heads || last(&k, 0) != at->depth ||
        last(&v, 1) != last(&k, 1) || !at->tokens || at->tokens > MOST_TOKENS || !at->depth || at->depth % 2 ||
        at->depth > MOST_DEPTH || !at->mask_rows || at->rows % at->mask_rows ||
        (mask.data && (leading(&mask, 2) != 1 || last(&mask, 0) != at->tokens)))
        return fail(api, "Attention: queries, keys, values and mask do not fit together");
    if (before) { /* the file may be anybody's: nothing is read beyond what there is */
        if (!v_before.data || !at->heads || leading(&k_before, 2) % at->heads ||
            layer >= leading(&k_before, 2) / at->heads || leading(&v_before, 2) != leading(&k_before, 2) ||
            last(&k_before, 0) != at->depth || last(&v_before, 1) != before || last(&v_before, 0) != at->width)
            return fail(api, "Attention: keys and values of earlier tokens do not fit");
        at->k_before = (const float *)k_before.data + layer * at->heads * before * at->depth;
        at->v_before = (const float *)v_before.data + layer * at->heads * before * at->width;
    }
    q.shape[q.count - 1] = (int64_t)at->width;
    heads_first(&q, first & 8); /* and back */
    TRY(make_output(api, context, 0, q.shape, q.count, (void **)&work.attention.y));
    if (!at->heads || !at->rows) return NULL;
    if (!prepare_attention(&work)) return fail(api, "Attention: out of memory");
    Status status = share(api, context, pack_head, at->heads, at->tokens * (at->depth + at->width), &work);
    const size_t products = at->heads * at->rows * at->tokens * (at->depth + at->width) / PRODUCTS_OF_A_NUMBER;
    const size_t tasks = at->heads * work.parts;
    if (!status) status = share(api, context, attend, tasks, products / tasks, &work);
    free(work.packed);
    return !status && work.failed ? fail(api, "Attention: out of memory") : status;
}

static Status create(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, info, &made));
    Status status = CALL(api, KernelInfoGetFloat, KERNEL_INFO_GET_FLOAT)(info, "scale", &made->scale);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "rows_first", &made->rows_first);
    if (!status && made->inputs > 4) {
        status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "layer", &made->layer);
        if (!status && made->layer < 0) status = fail(api, "Attention: no such layer");
    }
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "Attention"; }
static size_t inputs(const CustomOp *op) { return (void)op, 6; }
static int needs(const CustomOp *op, size_t index) { return (void)op, index < 3 ? REQUIRED : OPTIONAL; }

const CustomOp attention_operator = OPERATOR(inputs, is_float, needs, is_required);

/* Alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
EXPORTED int vla_edge_attention(const Attention *attention, const char *way) {
    AttentionWork work = {.attention = *attention, .way = find_way(way)};
    if (!work.way || !prepare_attention(&work)) return -1;
    for (size_t head = 0; head < attention->heads; head++) pack_head(&work, head);
    for (size_t task = 0; task < attention->heads * work.parts; task++) attend(&work, task);
    free(work.packed);
    return work.failed ? -1 : 0;
}
