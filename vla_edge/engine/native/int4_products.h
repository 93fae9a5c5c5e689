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

enum { BLOCK = 64, INPUTS = 8, CHUNK = BLOCK * INPUTS / 2, MOST_ROWS = 4 };

/* One product. `inputs` is a multiple of `group`, which is one of 8. */
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
} Product;

/* Fills `rounded`, `steps` and `shifts` of one row. */
void int4_round(const Product *product, size_t row);

#endif
