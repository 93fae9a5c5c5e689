#include "operator.h"

#include <stdlib.h>

/* numbers for which waking other threads costs more than they save */
enum { FEW = 8192 };

Status fail(OrtApi *api, const char *why) { return CALL(api, CreateStatus, CREATE_STATUS)(1, why); }

static Status read_tensor(OrtApi *api, const void *value, Tensor *tensor) {
    void *shape;
    TRY(CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)((void *)value, &tensor->data));
    TRY(CALL(api, GetTensorTypeAndShape, GET_TENSOR_TYPE_AND_SHAPE)(value, &shape));
    Status status = CALL(api, GetDimensionsCount, GET_DIMENSIONS_COUNT)(shape, &tensor->count);
    if (!status && (tensor->count < 1 || tensor->count > MOST_DIMENSIONS))
        status = fail(api, "vla_edge: a tensor has to have 1 to 8 dimensions");
    if (!status) status = CALL(api, GetDimensions, GET_DIMENSIONS)(shape, tensor->shape, tensor->count);
    CALL(api, ReleaseShape, RELEASE_SHAPE)(shape);
    return status;
}

Status read_inputs(const Kernel *kernel, const void *context, Tensor *const *tensors, size_t count, size_t required) {
    OrtApi *api = kernel->api;
    for (size_t index = 0; index < count; index++) {
        *tensors[index] = kernel->constants[index];
        if (tensors[index]->data) continue;
        const void *value = NULL;
        if (index < kernel->inputs)
            TRY(CALL(api, KernelContextGetInput, KERNEL_CONTEXT_GET_INPUT)(context, index, &value));
        if (value) TRY(read_tensor(api, value, tensors[index]));
        else if (index < required) return fail(api, "vla_edge: an input is missing");
    }
    return NULL;
}

Status make_output(OrtApi *api, void *context, size_t index, const int64_t *shape, size_t count, void **data) {
    void *output;
    TRY(CALL(api, KernelContextGetOutput, KERNEL_CONTEXT_GET_OUTPUT)(context, index, shape, count, &output));
    if (!output) return fail(api, "vla_edge: an output is missing");
    return CALL(api, GetTensorMutableData, GET_TENSOR_MUTABLE_DATA)(output, data);
}

size_t leading(const Tensor *tensor, size_t without) {
    size_t product = 1;
    for (size_t d = 0; d + without < tensor->count; d++) product *= (size_t)tensor->shape[d];
    return product;
}

size_t last(const Tensor *tensor, size_t from_end) {
    return (size_t)tensor->shape[tensor->count - 1 - from_end];
}

Status share(
    OrtApi *api, void *context, void (*call)(void *, size_t), size_t total, size_t numbers, void *data) {
    if (total * numbers > FEW)
        return CALL(api, ParallelFor, KERNEL_CONTEXT_PARALLEL_FOR)(context, call, total, 0, data);
    for (size_t index = 0; index < total; index++) call(data, index);
    return NULL;
}

int heads_first(Tensor *tensor, size_t rows_do) {
    if (!rows_do) return 1;
    if (tensor->count != 4 || tensor->shape[0] != 1) return 0;
    const int64_t rows = tensor->shape[1];
    tensor->shape[1] = tensor->shape[2];
    tensor->shape[2] = rows;
    return 1;
}

Status new_kernel(OrtApi *api, const void *info, Kernel **made) {
    const Way *way = find_way(NULL);
    if (!way) return fail(api, "vla_edge: this processor lacks the instructions for it");
    Kernel *kernel = *made = calloc(1, sizeof **made);
    if (!kernel) return fail(api, "vla_edge: out of memory");
    kernel->api = api;
    kernel->way = way;
    Status status = CALL(api, KernelInfoGetInputCount, KERNEL_INFO_GET_INPUT_COUNT)(info, &kernel->inputs);
    for (size_t index = 0; !status && index < kernel->inputs && index < MOST_INPUTS; index++) {
        const void *value;
        int constant;
        status = CALL(api, KernelInfoGetConstantInput, KERNEL_INFO_GET_CONSTANT_INPUT)(info, index, &constant, &value);
        if (!status && constant) status = read_tensor(api, value, kernel->constants + index);
    }
    if (status) free(kernel);
    return status;
}

Status hand_over(Status status, Kernel *made, void **kernel) {
    if (status) free(made);
    else *kernel = made;
    return status;
}

void destroy_kernel(void *kernel) { free(kernel); }
const char *get_execution_provider(const CustomOp *op) { return (void)op, NULL; } /* the CPU */
int is_float(const CustomOp *op, size_t index) { return (void)op, (void)index, ORT_FLOAT; }
int is_required(const CustomOp *op, size_t index) { return (void)op, (void)index, REQUIRED; }
int is_variadic(const CustomOp *op, size_t index) { return (void)op, (void)index, VARIADIC; }
int is_default_memory(const CustomOp *op, size_t index) { return (void)op, (void)index, 0; }
size_t one(const CustomOp *op) { return (void)op, 1; }
int at_least_one(const CustomOp *op) { return (void)op, 1; }
