/* `vla_edge::CachedAttention`, as in `cached_attention.h`
 *   inputs      q (1, heads * groups, rows, depth); k and v of the cache (..., heads, tokens, depth), of one layer or of
 *               all one after the other; its bias (tokens,); own k and v (1, heads, behind, depth); their bias
 *               (rows, behind); shapes with more or fewer dimensions of size 1, float32
 *   attributes  scale; layer, the place in the cache
 *   output      (1, rows, heads * groups, depth) float32
 */
#include <stdlib.h>

#include "operator.h"

typedef struct {
    CachedAttention attention;
    const Way *way;
    float *scores; /* of all heads, one after the other */
    size_t each;
} CachedWork;

static void attend(void *data, size_t head) {
    const CachedWork *work = data;
    work->way->attend_cached(&work->attention, head, work->scores + head * work->each);
}

/* Memory for all of it; whoever calls frees `scores`. */
static int prepare_cached(CachedWork *work) {
    const CachedAttention *at = &work->attention;
    work->each = at->groups * at->rows * (cached_line(at) + 1); /* and each row's share */
    work->scores = malloc(at->heads * work->each * sizeof *work->scores);
    return work->scores != NULL;
}

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor q, k, v, bias, own_k, own_v, own_bias;
    TRY(read_inputs(kernel, context, (Tensor *const[]){&q, &k, &v, &bias, &own_k, &own_v, &own_bias}, 7, 7));
    if (q.count != 4 || k.count < 3 || v.count < 3 || own_k.count < 3 || own_v.count < 3)
        return fail(api, "CachedAttention: tensors of at least 3 dimensions");
    const size_t heads = leading(&own_k, 2), layer = (size_t)kernel->layer;
    CachedWork work = {
        .attention = {
            .q = q.data, .bias = bias.data, .own_k = own_k.data, .own_v = own_v.data, .own_bias = own_bias.data,
            .heads = heads, .groups = heads ? leading(&q, 2) / heads : 0, .rows = last(&q, 1), .tokens = last(&k, 1),
            .behind = last(&own_k, 1), .depth = last(&q, 0), .scale = kernel->scale,
        },
        .way = kernel->way,
    };
    CachedAttention *at = &work.attention;
    const size_t each = heads * at->tokens * at->depth, own = heads * at->behind * at->depth;
    /* the file may be anybody's: nothing is read beyond what it holds */
    if (!heads || !at->tokens || !at->behind || !at->depth || at->depth % CACHED_LANES ||
        leading(&q, 2) != heads * at->groups || last(&k, 0) != at->depth || last(&own_k, 0) != at->depth ||
        leading(&k, 2) % heads || layer >= leading(&k, 2) / heads || leading(&v, 0) != leading(&k, 0) ||
        leading(&own_v, 0) != own || leading(&bias, 0) != at->tokens || leading(&own_bias, 0) != at->rows * at->behind)
        return fail(api, "CachedAttention: queries, keys, values and what is added do not fit together");
    at->k = (const float *)k.data + layer * each;
    at->v = (const float *)v.data + layer * each;
    const int64_t shape[] = {1, q.shape[2], q.shape[1], q.shape[3]};
    TRY(make_output(api, context, 0, shape, 4, (void **)&at->y));
    if (!at->groups || !at->rows) return NULL;
    if (!prepare_cached(&work)) return fail(api, "CachedAttention: out of memory");
    Status status = share(api, context, attend, heads, (each + own) / heads, &work);
    free(work.scores);
    return status;
}

static Status create(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, info, &made));
    Status status = CALL(api, KernelInfoGetFloat, KERNEL_INFO_GET_FLOAT)(info, "scale", &made->scale);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "layer", &made->layer);
    if (!status && made->layer < 0) status = fail(api, "CachedAttention: no such layer");
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "CachedAttention"; }
static size_t inputs(const CustomOp *op) { return (void)op, 7; }

const CustomOp cached_operator = OPERATOR(inputs, is_float, is_required, is_required);

/* Alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
EXPORTED int vla_edge_cached_attention(const CachedAttention *attention, const char *way) {
    CachedWork work = {.attention = *attention, .way = find_way(way)};
    if (!work.way || !prepare_cached(&work)) return -1;
    for (size_t head = 0; head < attention->heads; head++) attend(&work, head);
    free(work.scores);
    return 0;
}
