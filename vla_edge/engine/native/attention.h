/* softmax(scale q k' + mask) v in whole numbers of 16 bits: keys and values of a head are rounded once, its rows some
 * at a time.
 *
 * Each row of q and of k has a step of its own, each channel of v too, of a size that lets sums of products fit 32
 * bits: rounding is that of 12 bits or more, and processors multiply twice as fast as in float32. Nothing of the size
 * of rows x tokens is ever written to memory. Keys and values of the first tokens may lie elsewhere, in a cache.
 */
#ifndef VLA_EDGE_ATTENTION_H
#define VLA_EDGE_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

/* of more tokens, a row that attends to all alike could not give each of them anything */
enum { MOST_TOKENS = 8192, MOST_DEPTH = 256 };

typedef struct {
    const float *q;    /* (heads, rows, depth), or (rows, heads, depth); depth is even */
    const float *k;    /* (heads, tokens - before, depth), or (tokens - before, heads, depth) */
    const float *v;    /* (heads, tokens - before, width), or (tokens - before, heads, width) */
    const float *mask; /* (mask_rows, tokens), added for row r of any head in its row r % mask_rows; or NULL */
    float *y;          /* (heads, rows, width), or (rows, heads, width) */
    size_t heads, rows, tokens, depth, width, mask_rows;
    size_t rows_first; /* which are the other way round: 1 q + 2 k + 4 v + 8 y */
    float scale;
    size_t before;                       /* tokens that come first */
    const float *k_before, *v_before;    /* (heads, before, depth) and (heads, before, width) */
} Attention;

/* Bytes, multiples of 64, that have to begin at one: of a head's keys and values, of the mask, and of rows at work. */
size_t attention_packed(const Attention *attention);
size_t attention_masked(const Attention *attention);
size_t attention_scratch(const Attention *attention);

/* Fill the mask up to whole vectors. */
void attention_mask(const Attention *attention, void *mask);

#endif
