#include "rotary.h"

void rotate_head(const Rotary *rotary, size_t head) {
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
