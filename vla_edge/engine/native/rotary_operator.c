/* `vla_edge::Rotary`, rotary embedding: the first and the second half of each head's channels turned into each other.
 *   inputs      x (1, heads, rows, depth), cos and sin (..., rows, depth / 2), float32
 *   attributes  rows_first, whether x is (1, rows, heads, depth) instead
 *   output      (1, heads, rows, depth) float32
 */
#include "operator.h"

typedef struct {
    const float *x;         /* (heads, rows, depth), or (rows, heads, depth) */
    const float *cos, *sin; /* (rows, depth / 2) */
    float *y;               /* (heads, rows, depth) */
    size_t heads, rows, depth;
    int rows_first; /* of x */
} Rotary;

static void rotate(void *data, size_t head) {
    const Rotary *rotary = data;
    const size_t depth = rotary->depth, half = depth / 2, rows = rotary->rows, heads = rotary->heads;
    for (size_t row = 0; row < rows; row++) {
        const float *x = rotary->x + (rotary->rows_first ? row * heads + head : head * rows + row) * depth;
        const float *cos = rotary->cos + row * half, *sin = rotary->sin + row * half;
        float *restrict y = rotary->y + (head * rows + row) * depth;
        for (size_t i = 0; i < half; i++) {
            y[i] = x[i] * cos[i] - x[half + i] * sin[i];
            y[half + i] = x[half + i] * cos[i] + x[i] * sin[i];
        }
    }
}

static Status compute(void *self, void *context) {
    const Kernel *kernel = self;
    OrtApi *api = kernel->api;
    Tensor x, cos, sin;
    TRY(read_inputs(kernel, context, (Tensor *const[]){&x, &cos, &sin}, 3, 3));
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

static Status create(const CustomOp *op, OrtApi *api, const void *info, void **kernel) {
    (void)op;
    Kernel *made;
    TRY(new_kernel(api, info, &made));
    const Status status = CALL(api, KernelInfoGetInt, KERNEL_INFO_GET_INT)(info, "rows_first", &made->rows_first);
    return hand_over(status, made, kernel);
}

static const char *get_name(const CustomOp *op) { return (void)op, "Rotary"; }
static size_t inputs(const CustomOp *op) { return (void)op, 3; }

const CustomOp rotary_operator = OPERATOR(inputs, is_float, is_required, is_required);

