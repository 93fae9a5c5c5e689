/* `vla_edge::Int4MatMul`, the product of `int4_products.h`
 *   inputs      x (..., inputs) float32; weights, scales and largest as in `Int4Product`
 *   attributes  width (its outputs), group
 *   output      (..., width) float32
 */
#include <stdlib.h>

#include "operator.h"

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

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, weights, scales, largest;
    TRY(read_inputs(kernel, context, (Tensor *const[]){&x, &weights, &scales, &largest}, 4, 4));
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
    Status status = share(api, context, int4_round_row, p->rows, p->inputs, &work);
    const size_t numbers = p->rows * p->inputs * INT4_BLOCK / PRODUCTS_OF_A_NUMBER;
    if (!status) status = share(api, context, int4_multiply, blocks, numbers, &work);
    free(p->steps);
    return status;
}

static Status create(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, info, &made));
    Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "width", &made->width);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "group", &made->group);
    if (!status && (made->width < 1 || made->group < 1 || made->group % INT4_INPUTS))
        status = fail(api, "Int4MatMul: a width of at least 1 and groups of a multiple of 8");
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "Int4MatMul"; }
static size_t inputs(const CustomOp *op) { return (void)op, 4; }

static int type_of_input(const CustomOp *op, size_t index) {
    (void)op;
    return (const int[]){ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_FLOAT}[index];
}

const CustomOp int4_operator = OPERATOR(inputs, type_of_input, is_required, is_required);

/* Alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
EXPORTED int vla_edge_int4_product(const Int4Product *product, const char *way) {
    const Way *chosen = find_way(way);
    if (!chosen) return -1;
    for (size_t row = 0; row < product->rows; row++) chosen->int4_round(product, row);
    for (size_t block = 0; block * INT4_BLOCK < product->outputs; block++) chosen->int4_block(product, block);
    return 0;
}
