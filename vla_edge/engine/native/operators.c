/* Operators of our own for ONNX Runtime, which runs them on its threads.
 *
 * `vla_edge::Int4MatMul`, the product of `int4_products.h`
 *   inputs      x (..., inputs) float32; weights, scales and largest as in `Int4Product`
 *   attributes  width (its outputs), group
 *   output      (..., width) float32
 *
 * `vla_edge::Int8MatMul`, the product of `int8_products.h`
 *   inputs      x (..., inputs) float32; weights, scales and sums of one or several layers, one after the other, each
 *               filled up to whole blocks; their widths (layers,) int64; and as far as there are any bias, norm and
 *               shift as in `Int8Product`, and what is added (..., width) or none
 *   attributes  finish, a `Finish` (ADDED, and GELU, of one layer; GATED of two); epsilon
 *   outputs     (..., width) float32 of each layer; one if GATED
 *
 * `vla_edge::Attention`, as in `attention.h`
 *   inputs      q (..., rows, depth), k (..., tokens, depth), v (..., tokens, width) and, where there is one, mask
 *               (1, ..., mask_rows, tokens), float32
 *   attributes  scale; rows_first, which of q, k, v and y are (1, rows, heads, ...) instead
 *   output      (..., rows, width) float32
 *
 * `vla_edge::Rotary`, as in `rotary.h`
 *   inputs      x (1, heads, rows, depth), cos and sin (..., rows, depth / 2), float32
 *   attributes  rows_first, whether x is (1, rows, heads, depth) instead
 *   output      (1, heads, rows, depth) float32
 */
#include <stdlib.h>
#include <string.h>

#include "onnxruntime_abi.h"
#include "rotary.h"
#include "ways.h"

enum { MOST_DIMENSIONS = 8, FAIL = 1, REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };
/* so many share out evenly over the threads of a robot's computer */
enum { ENOUGH_TASKS = 16 };
/* outputs of so many rows are finished while they are in the nearest cache */
enum { NEAR_ROWS = 8 * INT8_MOST_ROWS };
enum { MOST_LAYERS = 8 };
/* of an attention: a multiple of those that any way has at work together */
enum { ROWS_AT_ONCE = 12 };
/* other threads are not worth waking for so many; this many products with weights take as long as one */
enum { FEW_NUMBERS = 8192, PRODUCTS_OF_A_NUMBER = 48 };

#define CALL(api, type, place) ((type)(api)[place])
#define TRY(call)                      \
    do {                               \
        const Status status_ = (call); \
        if (status_) return status_;   \
    } while (0)

typedef struct {
    void *data;
    size_t count;
    int64_t shape[MOST_DIMENSIONS];
} Tensor;

static Status fail(OrtApi *api, const char *why) { return CALL(api, CreateStatus, CREATE_STATUS)(FAIL, why); }

static Status read_input(OrtApi *api, const void *context, size_t index, Tensor *tensor) {
    const void *value;
    void *shape;
    TRY(CALL(api, KernelContextGetInput, KERNEL_CONTEXT_GET_INPUT)(context, index, &value));
    TRY(CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)((void *)value, &tensor->data));
    TRY(CALL(api, GetTensorTypeAndShape, GET_TENSOR_TYPE_AND_SHAPE)(value, &shape));
    Status status = CALL(api, GetDimensionsCount, GET_DIMENSIONS_COUNT)(shape, &tensor->count);
    if (!status && (tensor->count < 1 || tensor->count > MOST_DIMENSIONS))
        status = fail(api, "vla_edge: a tensor has to have 1 to 8 dimensions");
    if (!status) status = CALL(api, GetDimensions, GET_DIMENSIONS)(shape, tensor->shape, tensor->count);
    CALL(api, ReleaseShape, RELEASE_SHAPE)(shape);
    return status;
}

/* An input that may be left out: then its `data` is NULL. */
static Status read_optional(OrtApi *api, const void *context, size_t index, Tensor *tensor) {
    size_t inputs;
    const void *value = NULL;
    TRY(CALL(api, KernelContextGetInputCount, KERNEL_CONTEXT_GET_INPUT_COUNT)(context, &inputs));
    if (index < inputs) TRY(CALL(api, KernelContextGetInput, KERNEL_CONTEXT_GET_INPUT)(context, index, &value));
    *tensor = (Tensor){.data = NULL};
    return value ? read_input(api, context, index, tensor) : NULL;
}

static Status make_output(OrtApi *api, void *context, size_t index, const int64_t *shape, size_t count, void **data) {
    void *output;
    TRY(CALL(api, KernelContextGetOutput, KERNEL_CONTEXT_GET_OUTPUT)(context, index, shape, count, &output));
    return CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)(output, data);
}

/* Product of all but the last `without` dimensions. */
static size_t leading(const Tensor *tensor, size_t without) {
    size_t product = 1;
    for (size_t d = 0; d + without < tensor->count; d++) product *= (size_t)tensor->shape[d];
    return product;
}

static size_t last(const Tensor *tensor, size_t from_end) {
    return (size_t)tensor->shape[tensor->count - 1 - from_end];
}

/* How many pieces of that size hold so many. */
static size_t pieces(size_t count, size_t size) { return (count + size - 1) / size; }

/* `call` for all of `total`, each of which goes over so many numbers; on all threads where they are not few. */
static Status share(
    OrtApi *api, void *context, void (*call)(void *, size_t), size_t total, size_t numbers, void *data) {
    if (total * numbers > FEW_NUMBERS)
        return CALL(api, ParallelFor, KERNEL_CONTEXT_PARALLEL_FOR)(context, call, total, 0, data);
    for (size_t index = 0; index < total; index++) call(data, index);
    return NULL;
}

/* A node of any operator, with its attributes. */
typedef struct {
    OrtApi *api;
    const Way *way;
    int64_t width, group; /* of a product with 4-bit weights */
    int64_t finish;       /* of one with 8-bit weights */
    float epsilon;
    int64_t rows_first;   /* of an attention or a rotary embedding */
    float scale;
} Kernel;

static Status new_kernel(OrtApi *api, Kernel **made) {
    const Way *way = find_way(NULL);
    if (!way) return fail(api, "vla_edge: this processor lacks the instructions for it");
    *made = calloc(1, sizeof **made);
    if (!*made) return fail(api, "vla_edge: out of memory");
    (*made)->api = api;
    (*made)->way = way;
    return NULL;
}

/* Hands a kernel over, unless something was wrong with its attributes. */
static Status hand_over(Status status, Kernel *made, void **kernel) {
    if (status) free(made);
    else *kernel = made;
    return status;
}

/* ---- products with 4-bit weights */

typedef struct {
    Int4Product product;
    const Way *way;
} Int4Work;

static void int4_round_row(void *work, size_t row) {
    ((Int4Work *)work)->way->int4_round(&((Int4Work *)work)->product, row);
}

static void int4_multiply(void *work, size_t block) {
    ((Int4Work *)work)->way->int4_block(&((Int4Work *)work)->product, block);
}

static Status compute_int4(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, weights, scales, largest;
    TRY(read_input(api, context, 0, &x));
    TRY(read_input(api, context, 1, &weights));
    TRY(read_input(api, context, 2, &scales));
    TRY(read_input(api, context, 3, &largest));
    Int4Work work = {
        .product = {
            .weights = weights.data, .scales = scales.data, .largest = largest.data, .x = x.data,
            .rows = leading(&x, 1), .inputs = last(&x, 0), .outputs = (size_t)kernel->width,
            .group = (size_t)kernel->group,
        },
        .way = kernel->way,
    };
    Int4Product *p = &work.product;
    const size_t blocks = pieces(p->outputs, INT4_BLOCK), groups = p->inputs / p->group;
    /* the file may be anybody's: nothing is read beyond what it holds */
    if (p->inputs % p->group || weights.count != 3 || scales.count != 3 || largest.count != 1 ||
        (size_t)weights.shape[0] != blocks || (size_t)weights.shape[1] != p->inputs / INT4_INPUTS ||
        weights.shape[2] != INT4_CHUNK || (size_t)scales.shape[0] != blocks || (size_t)scales.shape[1] != groups ||
        scales.shape[2] != INT4_BLOCK || (size_t)largest.shape[0] != blocks * INT4_BLOCK)
        return fail(api, "Int4MatMul: weights, scales and inputs do not fit together");
    x.shape[x.count - 1] = kernel->width;
    TRY(make_output(api, context, 0, x.shape, x.count, (void **)&p->y));
    if (!p->rows) return NULL;
    p->steps = malloc(p->rows * (2 * groups * sizeof(float) + p->inputs));
    if (!p->steps) return fail(api, "Int4MatMul: out of memory");
    p->shifts = p->steps + p->rows * groups;
    p->rounded = (int8_t *)(p->shifts + p->rows * groups);
    ParallelFor parallel = CALL(api, ParallelFor, KERNEL_CONTEXT_PARALLEL_FOR);
    Status status = NULL;
    /* other threads are worth waking for more than a few rows */
    if (p->rows <= INT4_MOST_ROWS)
        for (size_t row = 0; row < p->rows; row++) int4_round_row(&work, row);
    else
        status = parallel(context, int4_round_row, p->rows, 0, &work);
    if (!status) status = parallel(context, int4_multiply, blocks, 0, &work);
    free(p->steps);
    return status;
}

static Status create_int4(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, &made));
    Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "width", &made->width);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "group", &made->group);
    if (!status && (made->width < 1 || made->group < 1 || made->group % INT4_INPUTS))
        status = fail(api, "Int4MatMul: a width of at least 1 and groups of a multiple of 8");
    return hand_over(status, made, kernel);
}

/* ---- products with 8-bit weights */

/* `parts` shares of the rows, so that there is work for every thread where the `blocks` are few. */
typedef struct {
    Int8Product layers[MOST_LAYERS]; /* that differ in weights, outputs and y alone */
    size_t first[MOST_LAYERS + 1];   /* block of each */
    const float *added;
    const Way *way;
    enum Finish finish;
    size_t count, blocks, parts;
} Int8Work;

static void int8_round_row(void *data, size_t row) {
    const Int8Work *work = data;
    work->way->int8_round(work->layers, row);
}

/* y of rows `begin` to `end` of a gated pair's block, both of which are in memory for a moment. */
static void multiply_gated(const Int8Work *work, size_t block, size_t begin, size_t end) {
    const Int8Product *gate = work->layers;
    Int8Product up = work->layers[1];
    const size_t place = block * INT8_BLOCK, left = up.outputs - place;
    float scratch[NEAR_ROWS * INT8_BLOCK], *y = gate->y + begin * gate->outputs + place;
    /* these rows and this block of it alone */
    up.outputs = left < INT8_BLOCK ? left : INT8_BLOCK;
    up.weights += place * up.padded;
    up.scales += place;
    up.sums += place;
    if (up.bias) up.bias += place;
    up.rounded += begin * up.padded;
    up.steps += begin;
    up.zeros += begin;
    up.y = scratch;
    work->way->int8_block(gate, block, begin, end);
    work->way->int8_block(&up, 0, 0, end - begin);
    work->way->int8_finish(y, gate->outputs, scratch, up.outputs, end - begin, up.outputs, GATED);
}

static void int8_multiply(void *data, size_t task) {
    const Int8Work *work = data;
    const size_t tiles = pieces(work->layers->rows, INT8_MOST_ROWS), part = task / work->blocks;
    size_t block = task % work->blocks, layer = 0;
    while (block >= work->first[layer + 1]) layer++;
    block -= work->first[layer];
    const Int8Product *p = work->layers + layer;
    const size_t most = (part + 1) * tiles / work->parts * INT8_MOST_ROWS, stop = most < p->rows ? most : p->rows;
    const size_t place = block * INT8_BLOCK, count = p->outputs - place < INT8_BLOCK ? p->outputs - place : INT8_BLOCK;
    size_t end;
    for (size_t begin = part * tiles / work->parts * INT8_MOST_ROWS; begin < stop; begin = end) {
        end = stop - begin < NEAR_ROWS ? stop : begin + NEAR_ROWS;
        if (work->finish == GATED) {
            multiply_gated(work, block, begin, end);
            continue;
        }
        work->way->int8_block(p, block, begin, end);
        const size_t at = begin * p->outputs + place;
        work->way->int8_finish(
            p->y + at, p->outputs, work->added ? work->added + at : NULL, p->outputs, end - begin, count, work->finish);
    }
}

static Status compute_int8(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, weights, scales, sums, widths, bias, norm, shift, added;
    TRY(read_input(api, context, 0, &x));
    TRY(read_input(api, context, 1, &weights));
    TRY(read_input(api, context, 2, &scales));
    TRY(read_input(api, context, 3, &sums));
    TRY(read_input(api, context, 4, &widths));
    TRY(read_optional(api, context, 5, &bias));
    TRY(read_optional(api, context, 6, &norm));
    TRY(read_optional(api, context, 7, &shift));
    TRY(read_optional(api, context, 8, &added));
    Int8Work work = {
        .way = kernel->way, .finish = (enum Finish)kernel->finish, .added = added.data, .count = leading(&widths, 0),
    };
    Int8Product all = {
        .weights = weights.data, .scales = scales.data, .sums = sums.data, .bias = bias.data, .x = x.data,
        .norm = norm.data, .shift = shift.data, .epsilon = kernel->epsilon, .rows = leading(&x, 1),
        .inputs = last(&x, 0), .padded = pieces(last(&x, 0), INT8_INPUTS) * INT8_INPUTS,
    };
    if (widths.count != 1 || !work.count || work.count > MOST_LAYERS)
        return fail(api, "Int8MatMul: the widths of 1 to 8 layers");
    const int64_t *outputs = widths.data;
    size_t width = 0;
    for (size_t layer = 0; layer < work.count; layer++) {
        if (outputs[layer] < 1 || outputs[layer] > INT32_MAX) return fail(api, "Int8MatMul: widths of at least 1");
        width += (size_t)outputs[layer];
        work.first[layer + 1] = work.first[layer] + pieces((size_t)outputs[layer], INT8_BLOCK);
    }
    const size_t blocks = work.first[work.count], tiles = pieces(all.rows, INT8_MOST_ROWS);
    const size_t wanted = work.finish == GATED ? 2 : 1;
    /* the file may be anybody's: nothing is read beyond what it holds */
    if (all.inputs > INT8_MOST_INPUTS || weights.count != 3 || (size_t)weights.shape[0] != blocks ||
        (size_t)weights.shape[1] != all.padded / INT8_INPUTS || weights.shape[2] != INT8_CHUNK ||
        leading(&scales, 0) != blocks * INT8_BLOCK || leading(&sums, 0) != blocks * INT8_BLOCK ||
        (all.bias && leading(&bias, 0) != width) || (all.norm && leading(&norm, 0) != all.inputs) ||
        (all.shift && (!all.norm || leading(&shift, 0) != all.inputs)) ||
        (work.finish == ADDED) != !!work.added || (work.added && leading(&added, 0) != all.rows * width) ||
        (work.finish != PLAIN && work.count != wanted) || (work.finish == GATED && outputs[0] != outputs[1]))
        return fail(api, "Int8MatMul: weights, scales and inputs do not fit together");
    work.blocks = work.finish == GATED ? work.first[1] : blocks;
    for (size_t layer = 0, place = 0; layer < work.count; place += (size_t)outputs[layer++]) {
        Int8Product *p = work.layers + layer;
        *p = all;
        p->outputs = (size_t)outputs[layer];
        p->weights += work.first[layer] * INT8_BLOCK * all.padded;
        p->scales += work.first[layer] * INT8_BLOCK;
        p->sums += work.first[layer] * INT8_BLOCK;
        if (p->bias) p->bias += place;
        x.shape[x.count - 1] = outputs[layer];
        if (!layer || work.finish != GATED) TRY(make_output(api, context, layer, x.shape, x.count, (void **)&p->y));
    }
    if (!all.rows) return NULL;
    float *steps = malloc(all.rows * (sizeof(float) + sizeof(int32_t) + all.padded));
    if (!steps) return fail(api, "Int8MatMul: out of memory");
    for (size_t layer = 0; layer < work.count; layer++) {
        work.layers[layer].steps = steps;
        work.layers[layer].zeros = (int32_t *)(steps + all.rows);
        work.layers[layer].rounded = (uint8_t *)(steps + 2 * all.rows);
    }
    work.parts = pieces(ENOUGH_TASKS, work.blocks) < tiles ? pieces(ENOUGH_TASKS, work.blocks) : tiles;
    Status status = share(api, context, int8_round_row, all.rows, all.inputs, &work);
    const size_t tasks = work.blocks * work.parts, numbers = all.rows * all.padded * width / PRODUCTS_OF_A_NUMBER;
    if (!status) status = share(api, context, int8_multiply, tasks, numbers / tasks, &work);
    free(steps);
    return status;
}

static Status create_int8(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, &made));
    Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "finish", &made->finish);
    if (!status) status = CALL(api, KernelInfoGetFloat, KERNEL_INFO_GET_FLOAT)(info, "epsilon", &made->epsilon);
    if (!status && (made->finish < PLAIN || made->finish > GELU_TANH)) status = fail(api, "Int8MatMul: no such finish");
    return hand_over(status, made, kernel);
}

/* ---- attention */

typedef struct {
    Attention attention;
    const Way *way;
    char *packed, *mask;           /* of all heads, one after the other */
    size_t each, scratch, parts;   /* bytes of a head and of rows at work; shares of the rows */
    int failed;
} AttentionWork;

/* The shape as if heads came first where rows do; whether there are heads and rows to exchange. */
static int heads_first(Tensor *tensor, size_t rows_do) {
    if (!rows_do) return 1;
    if (tensor->count != 4 || tensor->shape[0] != 1) return 0;
    const int64_t rows = tensor->shape[1];
    tensor->shape[1] = tensor->shape[2];
    tensor->shape[2] = rows;
    return 1;
}

static void pack_head(void *data, size_t head) {
    const AttentionWork *work = data;
    work->way->pack(&work->attention, head, work->packed + head * work->each);
}

static void attend(void *data, size_t task) {
    AttentionWork *work = data;
    const Attention *at = &work->attention;
    const size_t head = task / work->parts, part = task % work->parts, tiles = pieces(at->rows, ROWS_AT_ONCE);
    const size_t begin = part * tiles / work->parts * ROWS_AT_ONCE;
    const size_t most = (part + 1) * tiles / work->parts * ROWS_AT_ONCE;
    void *scratch = aligned_alloc(64, work->scratch);
    if (!scratch) work->failed = 1;
    else
        work->way->attend(
            at, head, begin, most < at->rows ? most : at->rows, work->packed + head * work->each, work->mask, scratch);
    free(scratch);
}

/* Memory for all of it, in one; whoever calls frees `packed`. */
static int prepare_attention(AttentionWork *work) {
    const Attention *at = &work->attention;
    const size_t tiles = pieces(at->rows, ROWS_AT_ONCE), parts = pieces(ENOUGH_TASKS, at->heads ? at->heads : 1);
    work->parts = parts < tiles ? parts : tiles;
    work->each = attention_packed(at);
    work->scratch = attention_scratch(at);
    work->packed = aligned_alloc(64, at->heads * work->each + attention_masked(at) + 64);
    if (!work->packed) return 0;
    work->mask = work->packed + at->heads * work->each;
    attention_mask(at, work->mask);
    return 1;
}

static Status compute_attention(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor q, k, v, mask;
    TRY(read_input(api, context, 0, &q));
    TRY(read_input(api, context, 1, &k));
    TRY(read_input(api, context, 2, &v));
    TRY(read_optional(api, context, 3, &mask));
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

static Status create_attention(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, &made));
    Status status = CALL(api, KernelInfoGetFloat, KERNEL_INFO_GET_FLOAT)(info, "scale", &made->scale);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "rows_first", &made->rows_first);
    return hand_over(status, made, kernel);
}

/* ---- rotary embeddings */

static void rotate(void *rotary, size_t head) { rotate_head(rotary, head); }

static Status compute_rotary(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, cos, sin;
    TRY(read_input(api, context, 0, &x));
    TRY(read_input(api, context, 1, &cos));
    TRY(read_input(api, context, 2, &sin));
    if (x.count != 4 || x.shape[0] != 1) return fail(api, "Rotary: x of 4 dimensions, the first of them 1");
    heads_first(&x, kernel->rows_first != 0);
    Rotary rotary = {
        .x = x.data, .cos = cos.data, .sin = sin.data, .heads = last(&x, 2), .rows = last(&x, 1), .depth = last(&x, 0),
        .rows_first = kernel->rows_first != 0,
    };
    const size_t angles = rotary.rows * (rotary.depth / 2);
    if (rotary.depth % 2 || leading(&cos, 0) != angles || leading(&sin, 0) != angles)
        return fail(api, "Rotary: x, cosines and sines do not fit together");
    TRY(make_output(api, context, 0, x.shape, x.count, (void **)&rotary.y));
    return share(api, context, rotate, rotary.heads, rotary.rows * rotary.depth, &rotary);
}

static Status create_rotary(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, &made));
    const Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "rows_first", &made->rows_first);
    return hand_over(status, made, kernel);
}

/* ---- what the runtime asks of them */

static void destroy_kernel(void *kernel) { free(kernel); }
static const char *get_execution_provider(const CustomOp *op) { return (void)op, NULL; } /* the CPU */
static size_t one(const CustomOp *op) { return (void)op, 1; }
static size_t three_inputs(const CustomOp *op) { return (void)op, 3; }
static size_t four_inputs(const CustomOp *op) { return (void)op, 4; }
static size_t nine_inputs(const CustomOp *op) { return (void)op, 9; }
static int is_float(const CustomOp *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
static int at_least_one(const CustomOp *op) { return (void)op, 1; }
static int all_alike(const CustomOp *op) { return (void)op, 1; }
static int is_variadic(const CustomOp *op, size_t index) { return (void)op, (void)index, VARIADIC; }
static int is_required(const CustomOp *op, size_t index) { return (void)op, (void)index, REQUIRED; }
static int is_default_memory(const CustomOp *op, size_t index) { return (void)op, (void)index, 0; }

static const char *int4_name(const CustomOp *op) { return (void)op, "Int4MatMul"; }

static int int4_input(const CustomOp *op, size_t index) {
    (void)op;
    return (const int[]){ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_FLOAT}[index];
}

static const char *int8_name(const CustomOp *op) { return (void)op, "Int8MatMul"; }
static int int8_needs(const CustomOp *op, size_t index) { return (void)op, index < 5 ? REQUIRED : OPTIONAL; }

static int int8_input(const CustomOp *op, size_t index) {
    (void)op;
    return index > 4 ? ORT_FLOAT : (const int[]){ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_INT32, ORT_INT64}[index];
}

static const char *rotary_name(const CustomOp *op) { return (void)op, "Rotary"; }
static const char *attention_name(const CustomOp *op) { return (void)op, "Attention"; }
static int attention_needs(const CustomOp *op, size_t index) { return (void)op, index < 3 ? REQUIRED : OPTIONAL; }

/* what they have in common: float32 comes out, all of it in the processor's memory */
#define OPERATOR(kind, inputs, type_of_input, characteristic, of_output)                                       \
    {                                                                                                          \
        .version = ORT_VERSION, .get_name = kind##_name, .get_execution_provider = get_execution_provider,     \
        .get_input_type = type_of_input, .get_input_count = inputs, .get_output_type = is_float,               \
        .get_output_count = one, .destroy_kernel = destroy_kernel, .get_input_characteristic = characteristic, \
        .get_output_characteristic = of_output, .get_variadic_output_min_arity = at_least_one,                 \
        .get_variadic_output_homogeneity = all_alike, .get_input_memory = is_default_memory,                   \
        .create_kernel = create_##kind, .compute = compute_##kind,                                             \
    }

static const CustomOp OPERATORS[] = {
    OPERATOR(int4, four_inputs, int4_input, is_required, is_required),
    OPERATOR(int8, nine_inputs, int8_input, int8_needs, is_variadic),
    OPERATOR(attention, four_inputs, is_float, attention_needs, is_required),
    OPERATOR(rotary, three_inputs, is_float, is_required, is_required),
};

#define EXPORTED __attribute__((visibility("default")))

/* What the runtime calls when it is told of this library. */
EXPORTED Status RegisterCustomOps(void *options, const OrtApiBase *base) {
    static void *domain; /* for as long as the process lives: sessions keep a pointer to it */
    OrtApi *api = base->get_api(ORT_VERSION);
    if (!api) return ((OrtApi *)base->get_api(1)) ? fail(base->get_api(1), "vla_edge: ONNX Runtime is too old") : NULL;
    if (!domain) {
        void *made;
        TRY(CALL(api, CreateCustomOpDomain, CREATE_CUSTOM_OP_DOMAIN)("vla_edge", &made));
        for (size_t i = 0; i < sizeof OPERATORS / sizeof *OPERATORS; i++)
            TRY(CALL(api, CustomOpDomainAdd, CUSTOM_OP_DOMAIN_ADD)(made, OPERATORS + i));
        domain = made;
    }
    return CALL(api, AddCustomOpDomain, ADD_CUSTOM_OP_DOMAIN)(options, domain);
}

/* Whether they run on this processor, in the way of that name or any. */
EXPORTED int vla_edge_runs(const char *way) { return find_way(way) != NULL; }

/* Alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
EXPORTED int vla_edge_int4_product(const Int4Product *product, const char *way) {
    const Way *chosen = find_way(way);
    if (!chosen) return -1;
    for (size_t row = 0; row < product->rows; row++) chosen->int4_round(product, row);
    for (size_t block = 0; block * INT4_BLOCK < product->outputs; block++) chosen->int4_block(product, block);
    return 0;
}

EXPORTED int vla_edge_int8_product(const Int8Product *product, const char *way) {
    const Way *chosen = find_way(way);
    if (!chosen) return -1;
    for (size_t row = 0; row < product->rows; row++) chosen->int8_round(product, row);
    for (size_t block = 0; block * INT8_BLOCK < product->outputs; block++)
        chosen->int8_block(product, block, 0, product->rows);
    return 0;
}

EXPORTED int vla_edge_int8_finish(
    float *y, const float *other, size_t rows, size_t count, int finish, const char *way) {
    const Way *chosen = find_way(way);
    if (!chosen) return -1;
    chosen->int8_finish(y, count, other, count, rows, count, (enum Finish)finish);
    return 0;
}

EXPORTED int vla_edge_attention(const Attention *attention, const char *way) {
    AttentionWork work = {.attention = *attention, .way = find_way(way)};
    if (!work.way || !prepare_attention(&work)) return -1;
    for (size_t head = 0; head < attention->heads; head++) pack_head(&work, head);
    for (size_t task = 0; task < attention->heads * work.parts; task++) attend(&work, task);
    free(work.packed);
    return work.failed ? -1 : 0;
}
