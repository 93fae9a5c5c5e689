/* `vla_edge::Int8MatMul`, the product of `int8_products.h`
 *   inputs      x (..., inputs) float32; weights, scales and sums of one or several layers, one after the other, each
 *               filled up to whole blocks; their widths (layers,) int64; and as far as there are any bias, norm and
 *               shift as in `Int8Product`, and what is added (..., width) or none
 *   attributes  finish, a `Finish` (ADDED, and GELU, of one layer; GATED of two); epsilon
 *   outputs     (..., width) float32 of each layer; one if GATED
 */
#include <stdlib.h>

#include "operator.h"

/* outputs of so many rows are finished while they are in the nearest cache */
enum { NEAR_ROWS = 8 * INT8_MOST_ROWS };
enum { MOST_LAYERS = 8, INPUTS = 9, NEEDED = 5 };

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
    size_t block = task % work->blocks, layer = 0;
    while (block >= work->first[layer + 1]) layer++;
    block -= work->first[layer];
    const Int8Product *p = work->layers + layer;
    const Rows rows = rows_of(task / work->blocks, work->parts, p->rows, INT8_MOST_ROWS);
    const size_t place = block * INT8_BLOCK, count = p->outputs - place < INT8_BLOCK ? p->outputs - place : INT8_BLOCK;
    size_t end;
    for (size_t begin = rows.begin; begin < rows.end; begin = end) {
        end = rows.end - begin < NEAR_ROWS ? rows.end : begin + NEAR_ROWS;
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

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, weights, scales, sums, widths, bias, norm, shift, added;
    Tensor *const given[] = {&x, &weights, &scales, &sums, &widths, &bias, &norm, &shift, &added};
    TRY(read_inputs(kernel, context, given, INPUTS, NEEDED));
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
    const size_t blocks = work.first[work.count];
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
    work.parts = shares_of(all.rows, INT8_MOST_ROWS, work.blocks);
    Status status = share(api, context, int8_round_row, all.rows, all.inputs, &work);
    const size_t tasks = work.blocks * work.parts, numbers = all.rows * all.padded * width / PRODUCTS_OF_A_NUMBER;
    if (!status) status = share(api, context, int8_multiply, tasks, numbers / tasks, &work);
    free(steps);
    return status;
}

static Status create(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, info, &made));
    Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "finish", &made->finish);
    if (!status) status = CALL(api, KernelInfoGetFloat, KERNEL_INFO_GET_FLOAT)(info, "epsilon", &made->epsilon);
    if (!status && (made->finish < PLAIN || made->finish > GELU_TANH)) status = fail(api, "Int8MatMul: no such finish");
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "Int8MatMul"; }
static size_t inputs(const CustomOp *op) { return (void)op, INPUTS; }
static int needs(const CustomOp *op, size_t index) { return (void)op, index < NEEDED ? REQUIRED : OPTIONAL; }

static int type_of_input(const CustomOp *op, size_t index) {
    (void)op;
    return index >= NEEDED ? ORT_FLOAT : (const int[]){ORT_FLOAT, ORT_INT8, ORT_FLOAT, ORT_INT32, ORT_INT64}[index];
}

const CustomOp int8_operator = OPERATOR(inputs, type_of_input, needs, is_variadic);

/* Alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
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
