/* The part of ONNX Runtime's C interface that an operator of our own needs.
 *
 * That interface is a table of functions whose places never change once a version has shipped, so a library built for
 * an old version runs in every later one. The wheels come without its header; the places below are those of
 * onnxruntime_c_api.h, version 17 (ONNX Runtime 1.17). Everything the runtime owns is an opaque pointer.
 */
#ifndef VLA_EDGE_ONNXRUNTIME_ABI_H
#define VLA_EDGE_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

/* the first version that has all of the places below */
#define ORT_VERSION 17

enum { ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_FLOAT16 = 10 }; /* as in ONNX */

typedef void *Status; /* NULL: well */

typedef struct {
    const void *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} OrtApiBase;

/* the table itself: an array of pointers to functions, each cast to what it is where it is called */
typedef void *const OrtApi;

enum {
    CREATE_STATUS = 0, CREATE_CUSTOM_OP_DOMAIN = 26, CUSTOM_OP_DOMAIN_ADD = 27, ADD_CUSTOM_OP_DOMAIN = 28,
    GET_TENSOR_MUTABLE_DATA = 51, GET_DIMENSIONS_COUNT = 61, GET_DIMENSIONS = 62, GET_TENSOR_TYPE_AND_SHAPE = 65,
    KERNEL_INFO_GET_FLOAT = 85, KERNEL_INFO_GET_INT = 86, KERNEL_CONTEXT_GET_INPUT = 90,
    KERNEL_CONTEXT_GET_OUTPUT = 91, RELEASE_SHAPE = 99, KERNEL_INFO_GET_INPUT_COUNT = 230,
    KERNEL_INFO_GET_CONSTANT_INPUT = 249, KERNEL_CONTEXT_PARALLEL_FOR = 274,
};

typedef Status (*CreateStatus)(int code, const char *message);
typedef Status (*CreateCustomOpDomain)(const char *name, void **domain);
typedef Status (*CustomOpDomainAdd)(void *domain, const void *operator_);
typedef Status (*AddCustomOpDomain)(void *session_options, void *domain);
typedef Status (*GetTensorMutableData)(void *value, void **data);
typedef Status (*GetDimensionsCount)(const void *shape, size_t *count);
typedef Status (*GetDimensions)(const void *shape, int64_t *values, size_t count);
typedef Status (*GetTensorTypeAndShape)(const void *value, void **shape);
typedef Status (*KernelInfoGetFloat)(const void *info, const char *name, float *out);
typedef Status (*KernelInfoGetInt)(const void *info, const char *name, int64_t *out);
typedef Status (*KernelInfoGetInputCount)(const void *info, size_t *count);
typedef Status (*KernelInfoGetConstantInput)(const void *info, size_t index, int *constant, const void **value);
typedef Status (*KernelContextGetInput)(const void *context, size_t index, const void **value);
typedef Status (*KernelContextGetOutput)(void *context, size_t index, const int64_t *shape, size_t count, void **value);
typedef void (*ReleaseShape)(void *shape);
typedef Status (*ParallelFor)(
    const void *context, void (*call)(void *data, size_t index), size_t total, size_t batches, void *data);

/* An operator. Fields of later versions are read only where `version` says that they are there. */
typedef struct CustomOp {
    uint32_t version;
    void *(*create_kernel_without_status)(const struct CustomOp *, OrtApi *api, const void *info);
    const char *(*get_name)(const struct CustomOp *);
    const char *(*get_execution_provider)(const struct CustomOp *);
    int (*get_input_type)(const struct CustomOp *, size_t index);
    size_t (*get_input_count)(const struct CustomOp *);
    int (*get_output_type)(const struct CustomOp *, size_t index);
    size_t (*get_output_count)(const struct CustomOp *);
    void (*compute_without_status)(void *kernel, void *context);
    void (*destroy_kernel)(void *kernel);
    int (*get_input_characteristic)(const struct CustomOp *, size_t index);
    int (*get_output_characteristic)(const struct CustomOp *, size_t index);
    int (*get_input_memory)(const struct CustomOp *, size_t index);
    void *get_variadic_input_min_arity, *get_variadic_input_homogeneity;
    int (*get_variadic_output_min_arity)(const struct CustomOp *);
    int (*get_variadic_output_homogeneity)(const struct CustomOp *);
    Status (*create_kernel)(const struct CustomOp *, OrtApi *api, const void *info, void **kernel);
    Status (*compute)(void *kernel, void *context);
    void *infer_output_shape, *get_start_version, *get_end_version;
} CustomOp;

#endif
