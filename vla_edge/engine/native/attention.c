#include "attention.h"

#include <math.h>
#include <string.h>

#include "rounding.h"
#include "ways.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* the widest vector has 16 lanes */
enum { PAD = 16, MOST_QUERIES = 6 };

/* Largest whole number of v, and the most that what a row attends to adds up to: with the rounding of 8192 tokens on
 * top the sum of products still fits 32 bits. */
enum { MOST_VALUE = 4095, MOST_SHARES = 520000, MOST_SHARE = 32767 };

/* A head's keys and values, the mask, and what rows at work need. `tokens` and `width` are filled up to whole vectors,
 * with what adds nothing. */
typedef struct {
    size_t tokens, depth, width;
    float limit;               /* largest whole number of a row of q or k: products of `depth` of them fit 32 bits */
    int16_t *k, *v;            /* (depth / 2, tokens, 2), (tokens / 2, width, 2) */
    float *k_steps, *v_steps;  /* (tokens,), (width,) */
    float *inverse;            /* (width,), while values are rounded */
    const float *mask;         /* (mask_rows, tokens) */
    int16_t *q, *shares;       /* (MOST_QUERIES, depth), (MOST_QUERIES, tokens) */
    float *scores, *out;       /* (MOST_QUERIES, tokens), (MOST_QUERIES, width) */
    float q_steps[MOST_QUERIES], of_all[MOST_QUERIES];
} Memory;

static size_t whole(size_t count) { return (count + PAD - 1) / PAD * PAD; }
static size_t lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

size_t attention_packed(const Attention *at) {
    const size_t tokens = whole(at->tokens), width = whole(at->width);
    return lines(sizeof(int16_t) * tokens * (at->depth + width) + sizeof(float) * (tokens + 2 * width));
}

size_t attention_masked(const Attention *at) {
    return at->mask ? lines(sizeof(float) * at->mask_rows * whole(at->tokens)) : 0;
}

size_t attention_scratch(const Attention *at) {
    const size_t tokens = whole(at->tokens), width = whole(at->width);
    return lines(MOST_QUERIES * (sizeof(float) * (tokens + width) + sizeof(int16_t) * (tokens + at->depth + PAD)));
}

void attention_mask(const Attention *at, void *memory) {
    float *mask = memory;
    for (size_t row = 0; at->mask && row < at->mask_rows; row++, mask += whole(at->tokens)) {
        memcpy(mask, at->mask + row * at->tokens, at->tokens * sizeof *mask);
        memset(mask + at->tokens, 0, (whole(at->tokens) - at->tokens) * sizeof *mask);
    }
}

/* Where a row of a head begins in one of q, k, v (and y), of which `rows_first` has `bit`. */
static inline size_t begin(const Attention *at, size_t bit, size_t head, size_t row, size_t rows, size_t width) {
    return (at->rows_first & bit ? row * at->heads + head : head * rows + row) * width;
}

/* Keys or values, of `width` numbers each, of a token. */
static inline const float *of_token(
    const Attention *at, const float *before, const float *x, size_t bit, size_t head, size_t token, size_t width) {
    if (token < at->before) return before + (head * at->before + token) * width;
    return x + begin(at, bit, head, token - at->before, at->tokens - at->before, width);
}

/* Whole vectors come first in each part, so that every one of them begins at a multiple of 64 bytes. */
static Memory lay_out(const Attention *at, void *packed, const void *mask, void *scratch) {
    Memory m = {.tokens = whole(at->tokens), .depth = at->depth, .width = whole(at->width), .mask = mask};
    m.limit = floorf(sqrtf(2147483647.0f / (float)at->depth)) - 1;
    if (m.limit > 32767) m.limit = 32767;
    m.k = packed;
    m.v = m.k + m.depth * m.tokens;
    m.k_steps = (float *)(m.v + m.tokens * m.width);
    m.v_steps = m.k_steps + m.tokens;
    m.inverse = m.v_steps + m.width;
    m.scores = scratch;
    if (!scratch) return m;
    m.out = m.scores + MOST_QUERIES * m.tokens;
    m.shares = (int16_t *)(m.out + MOST_QUERIES * m.width);
    m.q = m.shares + MOST_QUERIES * m.tokens;
    return m;
}

static inline __attribute__((always_inline)) int32_t pair(const int16_t *x) {
    int32_t word;
    memcpy(&word, x, sizeof word);
    return word;
}

/* x in whole numbers of up to `limit`; returns their step, which is not finite where an x is not. */
static inline __attribute__((always_inline)) float round_row(
    const float *x, size_t count, float limit, int16_t *rounded) {
    const float step = largest(x, count) / limit, inverse = isnormal(step) ? 1 / step : 0;
    for (size_t i = 0; i < count; i++) rounded[i] = (int16_t)nearest(inverse ? x[i] * inverse : 0);
    return step;
}

#if defined(__x86_64__)

#define NAME(x) avx512_vnni_##x
#define ATTRIBUTES __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define WIDTH 64
#define DOT(sum, a, b) (avx512_vnni_ints) _mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(a), (__m512i)(b))
#define ROWS 6
#define AT_ONCE 4
#include "attention_head.inc"

#define NAME(x) avx_vnni_##x
#define ATTRIBUTES __attribute__((target("avx2,fma,avxvnni")))
#define WIDTH 32
#define DOT(sum, a, b) (avx_vnni_ints) _mm256_dpwssd_avx_epi32((__m256i)(sum), (__m256i)(a), (__m256i)(b))
#define ROWS 4
#define AT_ONCE 2
#include "attention_head.inc"

#define NAME(x) avx2_##x
#define ATTRIBUTES __attribute__((target("avx2,fma")))
#define WIDTH 32
#define DOT(sum, a, b) ((sum) + (avx2_ints)_mm256_madd_epi16((__m256i)(a), (__m256i)(b)))
#define ROWS 4
#define AT_ONCE 2
#include "attention_head.inc"

#elif defined(__aarch64__)

#define NAME(x) neon_dot_##x
#define ATTRIBUTES
#define WIDTH 16
#define PRODUCTS(half, a, b) vmull_s16(vget_##half##_s16((int16x8_t)(a)), vget_##half##_s16((int16x8_t)(b)))
#define DOT(sum, a, b) ((sum) + (neon_dot_ints)vpaddq_s32(PRODUCTS(low, a, b), PRODUCTS(high, a, b)))
#define ROWS 4
#define AT_ONCE 4
#include "attention_head.inc"

#endif
