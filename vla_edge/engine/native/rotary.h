/* Rotary embedding: the first and the second half of each head's channels turned into each other. */
#ifndef VLA_EDGE_ROTARY_H
#define VLA_EDGE_ROTARY_H

#include <stddef.h>

typedef struct {
    const float *x;         /* (heads, rows, depth), or (rows, heads, depth) */
    const float *cos, *sin; /* (rows, depth / 2) */
    float *y;               /* (heads, rows, depth) */
    size_t heads, rows, depth;
    int rows_first; /* of x */
} Rotary;

/* y of one head. */
void rotate_head(const Rotary *rotary, size_t head);

#endif
