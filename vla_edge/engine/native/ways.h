/* The ways of computing that there are, by the instructions that they need. */
#ifndef VLA_EDGE_WAYS_H
#define VLA_EDGE_WAYS_H

#include "attention.h"
#include "cached_attention.h"
#include "int4_products.h"
#include "int8_products.h"

typedef struct {
    const char *name;
    int (*runs)(void); /* on this processor */
    void (*int4_round)(const Int4Product *, size_t row);
    void (*int4_block)(const Int4Product *, size_t block); /* y of all rows for a block's outputs */
    void (*int8_round)(const Int8Product *, size_t row);
    void (*int8_block)(const Int8Product *, size_t block, size_t row, size_t end); /* y of these rows for its outputs */
    /* y of `rows`, each `stride` behind the one before, and `count` outputs */
    void (*int8_finish)(
        float *y, size_t stride, const float *other, size_t other_stride, size_t rows, size_t count, enum Finish);
    void (*pack)(const Attention *, size_t head, void *packed); /* keys and values of one head */
    /* y of these rows of one head */
    void (*attend)(
        const Attention *, size_t head, size_t row, size_t end, void *packed, const void *mask, void *scratch);
    void (*attend_cached)(const CachedAttention *, size_t head, float *scores); /* y of all rows of one head */
} Way;

#define DECLARE(name)                                                                             \
    void name##_int4_round(const Int4Product *, size_t);                                          \
    void name##_int4_block(const Int4Product *, size_t);                                          \
    void name##_int8_round(const Int8Product *, size_t);                                          \
    void name##_int8_block(const Int8Product *, size_t, size_t, size_t);                          \
    void name##_int8_finish(float *, size_t, const float *, size_t, size_t, size_t, enum Finish); \
    void name##_pack(const Attention *, size_t, void *);                                          \
    void name##_attend(const Attention *, size_t, size_t, size_t, void *, const void *, void *);  \
    void name##_attend_cached(const CachedAttention *, size_t, float *);

#if defined(__x86_64__)
DECLARE(avx512_vnni)
DECLARE(avx_vnni)
DECLARE(avx2)
#elif defined(__aarch64__)
DECLARE(neon_dot)
#endif

/* The fastest that runs here, or the one of that name; NULL where there is none. */
const Way *find_way(const char *name);

#endif
