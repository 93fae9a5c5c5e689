/* Rounding of floats to whole numbers in ways that compilers turn into vectors. */
#ifndef VLA_EDGE_ROUNDING_H
#define VLA_EDGE_ROUNDING_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* 1.5 * 2^23: a float of which the last bits are an integer; adding it rounds to nearest */
#define ROUNDER 12582912.0f
#define ROUNDER_BITS 0x4B400000

/* of magnitudes below 2^22 */
static inline int32_t nearest(float x) {
    const float moved = x + ROUNDER;
    int32_t bits;
    memcpy(&bits, &moved, sizeof bits);
    return bits - ROUNDER_BITS;
}

/* |x| as an integer: magnitudes keep their order, and what is not finite is above all others */
static inline uint32_t magnitude(const float *x) {
    uint32_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits & 0x7FFFFFFF;
}

/* The largest |x|; not finite where one is not. */
static inline float largest(const float *x, size_t count) {
    uint32_t most = 0;
    for (size_t i = 0; i < count; i++) most = magnitude(x + i) > most ? magnitude(x + i) : most;
    float found;
    memcpy(&found, &most, sizeof found);
    return found;
}

/* x as an integer: numbers keep their order, and what is not one is below or above all others */
static inline int32_t in_order(const float *x) {
    int32_t bits;
    memcpy(&bits, x, sizeof bits);
    return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

static inline float from_order(int32_t place) {
    const int32_t bits = place ^ (place >> 31 & 0x7FFFFFFF);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Four rounded inputs, one after the other, as a word. */
static inline int32_t four(const void *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return word;
}

#endif
