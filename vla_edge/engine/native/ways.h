/* The ways of computing that there are, by the instructions that they need. */
#ifndef VLA_EDGE_WAYS_H
#define VLA_EDGE_WAYS_H

#include "attention.h"
#include "int4_products.h"

typedef struct {
    const char *name;
    int (*runs)(void); /* on this processor */
    void (*block)(const Product *product, size_t block);                  /* y of all rows for a block's outputs */
    void (*head)(const Attention *attention, size_t head, void *scratch); /* y of one head */
} Way;

#define DECLARE(name)                           \
    void name##_block(const Product *, size_t); \
    void name##_head(const Attention *, size_t, void *);

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
