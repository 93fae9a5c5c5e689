/* softmax(scale q [k, own_k]' + [bias, own_bias]) [v, own_v] of few rows, in float32: a cache is read once, where it
 * lies, and what is behind it from elsewhere.
 */
#ifndef VLA_EDGE_CACHED_ATTENTION_H
#define VLA_EDGE_CACHED_ATTENTION_H

#include <stddef.h>

/* depth comes in whole vectors, of which the widest has so many lanes */
enum { CACHED_LANES = 16 };

typedef struct {
    const float *q;               /* (heads * groups, rows, depth) */
    const float *k, *v;           /* (heads, tokens, depth), each head for a group of those of q */
    const float *bias;            /* (tokens,) */
    const float *own_k, *own_v;   /* (heads, behind, depth) */
    const float *own_bias;        /* (rows, behind) */
    float *y;                     /* (rows, heads * groups, depth) */
    size_t heads, groups, rows, tokens, behind, depth;
    float scale;
} CachedAttention;

/* Scores of one row, filled up to whole vectors. */
static inline size_t cached_line(const CachedAttention *at) {
    return (at->tokens + at->behind + CACHED_LANES - 1) / CACHED_LANES * CACHED_LANES;
}

#endif
