/* What operators of our own have in common: tensors, threads, and what ONNX Runtime asks of each. */
#ifndef VLA_EDGE_OPERATOR_H
#define VLA_EDGE_OPERATOR_H

#include "onnxruntime_abi.h"
#include "ways.h"

enum { MOST_DIMENSIONS = 8, MOST_INPUTS = 9, REQUIRED = 0, OPTIONAL = 1, VARIADIC = 2 };
/* so many share out evenly over the threads of a robot's computer */
enum { ENOUGH_TASKS = 16 };
/* this many products with weights take as long as going over one number */
enum { PRODUCTS_OF_A_NUMBER = 48 };

#define EXPORTED __attribute__((visibility("default")))
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

/* A node of any operator, with its attributes, and those of its inputs that never change: to ask the runtime for all of
 * them in every call takes as long as a small product. `data` is NULL of the others. */
typedef struct {
    OrtApi *api;
    const Way *way;
    size_t inputs;
    Tensor constants[MOST_INPUTS];
    int64_t width, group; /* of a product with 4-bit weights */
    int64_t finish;       /* of one with 8-bit weights */
    float epsilon;
    int64_t rows_first; /* of an attention or a rotary embedding */
    int64_t layer;      /* of a cache */
    float scale;
} Kernel;

Status fail(OrtApi *api, const char *why);
/* So many inputs; those behind the first `required` may be left out, then `data` is NULL. */
Status read_inputs(const Kernel *kernel, const void *context, Tensor *const *tensors, size_t count, size_t required);
Status make_output(OrtApi *api, void *context, size_t index, const int64_t *shape, size_t count, void **data);

/* Product of all but the last `without` dimensions; and one of those, from the end. */
size_t leading(const Tensor *tensor, size_t without);
size_t last(const Tensor *tensor, size_t from_end);
/* The shape as if heads came first where rows do; whether there are heads and rows to exchange. */
int heads_first(Tensor *tensor, size_t rows_do);

/* How many pieces of that size hold so many. */
static inline size_t pieces(size_t count, size_t size) { return (count + size - 1) / size; }

/* Shares of rows in whole tiles, so that there is work for every thread where `tasks` for all rows are few; and one. */
static inline size_t shares_of(size_t rows, size_t tile, size_t tasks) {
    const size_t wanted = pieces(ENOUGH_TASKS, tasks), tiles = pieces(rows, tile);
    return wanted < tiles ? wanted : tiles;
}

typedef struct {
    size_t begin, end;
} Rows;

static inline Rows rows_of(size_t part, size_t parts, size_t rows, size_t tile) {
    const size_t tiles = pieces(rows, tile), end = (part + 1) * tiles / parts * tile;
    return (Rows){part * tiles / parts * tile, end < rows ? end : rows};
}

/* `call` for all of `total`, each of which goes over so many numbers; on all threads where they are not few. */
Status share(OrtApi *api, void *context, void (*call)(void *, size_t), size_t total, size_t numbers, void *data);

/* A node without its attributes; and handed over, unless something was wrong with them. */
Status new_kernel(OrtApi *api, const void *info, Kernel **made);
Status hand_over(Status status, Kernel *made, void **kernel);

/* For `OPERATOR`: float32 comes out, all of it in the processor's memory. */
void destroy_kernel(void *kernel);
const char *get_execution_provider(const CustomOp *op);
int is_float(const CustomOp *op, size_t index);
int is_required(const CustomOp *op, size_t index);
int is_variadic(const CustomOp *op, size_t index);
int is_default_memory(const CustomOp *op, size_t index);
size_t one(const CustomOp *op);
int at_least_one(const CustomOp *op);

#define OPERATOR(inputs, type_of_input, characteristic, of_output)                                             \
    {                                                                                                          \
        .version = ORT_VERSION, .get_name = get_name, .get_execution_provider = get_execution_provider,        \
        .get_input_type = type_of_input, .get_input_count = inputs, .get_output_type = is_float,               \
        .get_output_count = one, .destroy_kernel = destroy_kernel, .get_input_characteristic = characteristic, \
        .get_output_characteristic = of_output, .get_variadic_output_min_arity = at_least_one,                 \
        .get_variadic_output_homogeneity = at_least_one, .get_input_memory = is_default_memory,                \
        .create_kernel = create, .compute = compute,                                                           \
    }

extern const CustomOp int4_operator, int8_operator, attention_operator, cached_operator, rotary_operator;

#endif
