/* `vla_edge::Int4MatMul` for ONNX Runtime: the product of `int4_products.h` on the runtime's own threads.
 *
 *   inputs      x (..., inputs) float32; weights, scales and largest as in `Product`
 *   attributes  width (its outputs), group
 *   output      (..., outputs) float32
 */
#include <stdlib.h>
#include <string.h>

#include "int4_products.h"
#include "onnxruntime_abi.h"

enum { MOST_DIMENSIONS = 8, FAIL = 1 };

typedef struct {
    OrtApi *api;
    const Int4Way *way;
    int64_t outputs, group;
} Kernel;

typedef struct {
    Product product;
    const Int4Way *way;
} Work;

#define CALL(api, type, place) ((type)(api)[place])
#define TRY(call)                        \
    do {                                 \
        const Status status_ = (call);   \
        if (status_) return status_;     \
    } while (0)

static Status fail(OrtApi *api, const char *why) { return CALL(api, CreateStatus, CREATE_STATUS)(FAIL, why); }

/* Address of an input, its dimensions and how many. */
static Status tensor(OrtApi *api, const void *context, size_t index, void **data, int64_t *dimensions, size_t *count) {
    const void *value;
    void *shape;
    TRY(CALL(api, KernelContextGetInput, KERNEL_CONTEXT_GET_INPUT)(context, index, &value));
    TRY(CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)((void *)value, data));
    TRY(CALL(api, GetTensorTypeAndShape, GET_TENSOR_TYPE_AND_SHAPE)(value, &shape));
    Status status = CALL(api, GetDimensionsCount, GET_DIMENSIONS_COUNT)(shape, count);
    if (!status && (*count < 1 || *count > MOST_DIMENSIONS)) status = fail(api, "Int4MatMul: 1 to 8 dimensions");
    if (!status) status = CALL(api, GetDimensions, GET_DIMENSIONS)(shape, dimensions, *count);
    CALL(api, ReleaseShape, RELEASE_SHAPE)(shape);
    return status;
}

static void round_row(void *work, size_t row) { int4_round(&((Work *)work)->product, row); }

static void multiply_block(void *work, size_t block) { ((Work *)work)->way->block(&((Work *)work)->product, block); }

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Work work = {.way = kernel->way};
    Product *p = &work.product;
    int64_t shape[MOST_DIMENSIONS], weights[MOST_DIMENSIONS], scales[MOST_DIMENSIONS], largest[MOST_DIMENSIONS];
    size_t count, of_weights, of_scales, of_largest;
    TRY(tensor(api, context, 0, (void **)&p->x, shape, &count));
    TRY(tensor(api, context, 1, (void **)&p->weights, weights, &of_weights));
    TRY(tensor(api, context, 2, (void **)&p->scales, scales, &of_scales));
    TRY(tensor(api, context, 3, (void **)&p->largest, largest, &of_largest));
    p->inputs = (size_t)shape[count - 1], p->outputs = (size_t)kernel->outputs, p->group = (size_t)kernel->group;
    p->rows = 1;
    for (size_t d = 0; d + 1 < count; d++) p->rows *= (size_t)shape[d];
    const size_t blocks = (p->outputs + BLOCK - 1) / BLOCK, groups = p->inputs / p->group;
    /* the file may be anybody's: nothing is read beyond what it holds */
    if (p->inputs % p->group || of_weights != 3 || of_scales != 3 || of_largest != 1 || weights[0] != (int64_t)blocks ||
        weights[1] != (int64_t)(p->inputs / INPUTS) || weights[2] != CHUNK || scales[0] != (int64_t)blocks ||
        scales[1] != (int64_t)groups || scales[2] != BLOCK || largest[0] != (int64_t)(blocks * BLOCK))
        return fail(api, "Int4MatMul: weights, scales and inputs do not fit together");
    shape[count - 1] = kernel->outputs;
    void *output;
    TRY(CALL(api, KernelContextGetOutput, KERNEL_CONTEXT_GET_OUTPUT)(context, 0, shape, count, &output));
    TRY(CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)(output, (void **)&p->y));
    if (!p->rows) return NULL;
    p->steps = malloc(p->rows * (2 * groups * sizeof(float) + p->inputs));
    if (!p->steps) return fail(api, "Int4MatMul: out of memory");
    p->shifts = p->steps + p->rows * groups;
    p->rounded = (int8_t *)(p->shifts + p->rows * groups);
    ParallelFor parallel = CALL(api, ParallelFor, KERNEL_CONTEXT_PARALLEL_FOR);
    Status status = NULL;
    /* other threads are worth waking for more than a few rows */
    if (p->rows <= MOST_ROWS)
        for (size_t row = 0; row < p->rows; row++) int4_round(p, row);
    else
        status = parallel(context, round_row, p->rows, 0, &work);
    if (!status) status = parallel(context, multiply_block, blocks, 0, &work);
    free(p->steps);
    return status;
}

static Status create_kernel(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made = calloc(1, sizeof *made);
    if (!made) return fail(api, "Int4MatMul: out of memory");
    made->api = api;
    made->way = int4_way(NULL);
    Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "width", &made->outputs);
    if (!status) status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "group", &made->group);
    if (!status && (made->outputs < 1 || made->group < 1 || made->group % INPUTS))
        status = fail(api, "Int4MatMul: outputs of at least 1 and groups of a multiple of 8");
    if (!status && !made->way) status = fail(api, "Int4MatMul: this processor lacks the instructions for it");
    if (status) free(made);
    else *kernel = made;
    return status;
}

static void destroy_kernel(void *kernel) { free(kernel); }
static const char *get_name(const CustomOp *op) { return (void)op, "Int4MatMul"; }
static const char *get_execution_provider(const CustomOp *op) { return (void)op, NULL; } /* the CPU */
static size_t get_input_count(const CustomOp *op) { return (void)op, 4; }
static size_t get_output_count(const CustomOp *op) { return (void)op, 1; }
static int get_output_type(const CustomOp *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
static int zero(const CustomOp *op, size_t index) { return (void)op, (void)index, 0; } /* required; default memory */

static int get_input_type(const CustomOp *op, size_t index) {
    (void)op;
    return (const int[]){ORT_FLOAT, ORT_UINT8, ORT_FLOAT16, ORT_FLOAT}[index];
}

static const CustomOp OPERATOR = {
    .version = ORT_VERSION, .get_name = get_name, .get_execution_provider = get_execution_provider,
    .get_input_type = get_input_type, .get_input_count = get_input_count, .get_output_type = get_output_type,
    .get_output_count = get_output_count, .destroy_kernel = destroy_kernel, .get_input_characteristic = zero,
    .get_output_characteristic = zero, .get_input_memory = zero, .create_kernel = create_kernel, .compute = compute,
};

/* What the runtime calls when it is told of this library. */
__attribute__((visibility("default"))) Status RegisterCustomOps(void *options, const OrtApiBase *base) {
    static void *domain; /* for as long as the process lives: sessions keep a pointer to it */
    OrtApi *api = base->get_api(ORT_VERSION);
    if (!api) return ((OrtApi *)base->get_api(1)) ? fail(base->get_api(1), "vla_edge: ONNX Runtime is too old") : NULL;
    if (!domain) {
        void *made;
        TRY(CALL(api, CreateCustomOpDomain, CREATE_CUSTOM_OP_DOMAIN)("vla_edge", &made));
        TRY(CALL(api, CustomOpDomainAdd, CUSTOM_OP_DOMAIN_ADD)(made, &OPERATOR));
        domain = made;
    }
    return CALL(api, AddCustomOpDomain, ADD_CUSTOM_OP_DOMAIN)(options, domain);
}

__attribute__((visibility("default"))) int vla_edge_int4_runs(const char *way) { return int4_way(way) != NULL; }

/* The product alone, in the way of that name or the fastest, for tests: 0, or -1 where that cannot run. */
__attribute__((visibility("default"))) int vla_edge_int4_product(const Product *product, const char *way) {
    const Int4Way *chosen = int4_way(way);
    if (!chosen) return -1;
    for (size_t row = 0; row < product->rows; row++) int4_round(product, row);
    for (size_t block = 0; block * BLOCK < product->outputs; block++) chosen->block(product, block);
    return 0;
}
