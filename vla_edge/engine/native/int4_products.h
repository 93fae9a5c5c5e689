/* Products with 4-bit weights and inputs rounded to 8 bits: y = x W', in integers as far as a group of inputs goes.
 *
 * Weights lie in blocks of 64 outputs, so that a processor reads one stream and adds without shuffling: of 8 inputs in
 * turn, 4 vectors of 64 bytes; byte 4 r + j of vector v holds input j (low half) and 4 + j (high half) of output
 * 16 v + r, each plus 8. A group's scales follow one another by output, as shares of the largest of their output.
 */
#ifndef VLA_EDGE_INT4_PRODUCTS_H
#define VLA_EDGE_INT4_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

enum { INT4_BLOCK = 64, INT4_INPUTS = 8, INT4_CHUNK = INT4_BLOCK * INT4_INPUTS / 2, INT4_MOST_ROWS = 4 };

/* `inputs` is a multiple of `group`, which is one of 8. */
typedef struct {
    const uint8_t *weights;  /* (blocks, inputs / 8, 256) */
    const uint16_t *scales;  /* (blocks, inputs / group, 64) float16 */
    const float *largest;    /* (64 blocks,) */
    const float *x;          /* (rows, inputs) */
    float *y;                /* (rows, outputs) */
    int8_t *rounded;         /* (rows, inputs): x in steps of its group */
    float *steps;            /* (rows, groups) */
    float *shifts;           /* (rows, groups): -8 times the sum of a group's rounded inputs, in its steps */
    size_t rows, inputs, outputs, group;
} Int4Product;

#endif
