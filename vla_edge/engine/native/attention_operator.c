/* `vla_edge::Attention`, as in `attention.h`
 *   inputs      q (..., rows, depth), k (..., tokens, depth), v (..., tokens, width) and, where there is one, mask
 *               (1, ..., mask_rows, tokens), float32
 *   attributes  scale; rows_first, which of q, k, v and y are (1, rows, heads, ...) instead
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
    Tensor q, k, v, mask;
    TRY(read_inputs(kernel, context, (Tensor *const[]){&q, &k, &v, &mask}, 4, 3));
    const size_t first = (size_t)kernel->rows_first;
    if (q.count < 2 || k.count < 2 || v.count < 2 || (mask.data && mask.count < 2))
        return fail(api, "Attention: tensors of at least 2 dimensions");
    if (!heads_first(&q, first & 1) || !heads_first(&k, first & 2) || !heads_first(&v, first & 4) ||
        (first & 8 && q.count != 4))
        return fail(api, "Attention: what has its rows first has 4 dimensions");
    AttentionWork work = {
        .attention = {
            .q = q.data, .k = k.data, .v = v.data, .mask = mask.data, .heads = leading(&q, 2), .rows = last(&q, 1),
            .tokens = last(&k, 1), .depth = last(&q, 0), .width = last(&v, 0), .scale = kernel->scale,
            .mask_rows = mask.data ? last(&mask, 1) : 1, .rows_first = first,
        },
        .way = kernel->way,
    };
    const Attention *at = &work.attention;
    if (leading(&k, 2) != at->heads || leading(&v, 2) != at->heads || last(&k, 0) != at->depth ||
        last(&v, 1) != at->tokens || !at->tokens || at->tokens > MOST_TOKENS || !at->depth || at->depth % 2 ||
        at->depth > MOST_DEPTH || !at->mask_rows || at->rows % at->mask_rows ||
        (mask.data && (leading(&mask, 2) != 1 || last(&mask, 0) != at->tokens)))
        return fail(api, "Attention: queries, keys, values and mask do not fit together");
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
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "Attention"; }
static size_t inputs(const CustomOp *op) { return (void)op, 4; }
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
