/* Products with 8-bit weights and inputs rounded to 8 bits, each row on a grid of its own: y = x W' + bias.
 *
 * Weights lie in blocks of 64 outputs, so that a processor reads one stream and adds without shuffling: of 4 inputs in
 * turn, 64 outputs side by side; byte 4 n + j holds input j of output n. Inputs and outputs are filled up with zeros.
 */
#ifndef VLA_EDGE_INT8_PRODUCTS_H
#define VLA_EDGE_INT8_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

enum { INT8_BLOCK = 64, INT8_INPUTS = 4, INT8_CHUNK = INT8_BLOCK * INT8_INPUTS, INT8_MOST_ROWS = 6 };
/* sums of products of 255 and 127 fit 32 bits */
enum { INT8_MOST_INPUTS = 65536 };

/* What becomes of a layer's outputs: nothing more; y plus another; silu(y) times another; GELU by erf or by tanh. */
enum Finish { PLAIN, ADDED, GATED, GELU_ERF, GELU_TANH };

typedef struct {
    const int8_t *weights;  /* (blocks, padded / 4, 256) */
    const float *scales;    /* (64 blocks,) */
    const int32_t *sums;    /* (64 blocks,): of an output's weights */
    const float *bias;      /* (outputs,), or NULL */
    const float *x;         /* (rows, inputs) */
    const float *norm;      /* (inputs,), or NULL: rows are brought to one size and multiplied with it before */
    const float *shift;     /* (inputs,), or NULL: rows are brought around zero, too, and it is added */
    float epsilon;          /* added to what a row's size is the root of */
    float *y;               /* (rows, outputs) */
    uint8_t *rounded;       /* (rows, padded): x in steps of its row, moved by its zero point */
    float *steps;           /* (rows,) */
    int32_t *zeros;         /* (rows,): zero points */
    size_t rows, inputs, padded, outputs;
} Int8Product;

#endif
