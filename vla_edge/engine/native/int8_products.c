#include "int8_products.h"

#include <math.h>
#include <string.h>

#include "rounding.h"
#include "ways.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

/* What differs between processors: how wide their vectors are, and what multiplies bytes. */

#if defined(__x86_64__)

#define NAME(x) avx512_vnni_##x
#define ATTRIBUTES __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define WIDTH 64
#define DOT(sum, x, w) (avx512_vnni_ints) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(w))
#define ZERO 0
#define ROWS 6
#define AT_ONCE 4
#include "int8_block.inc"

#define NAME(x) avx_vnni_##x
#define ATTRIBUTES __attribute__((target("avx2,fma,avxvnni")))
#define WIDTH 32
#define DOT(sum, x, w) (avx_vnni_ints) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(x), (__m256i)(w))
#define ZERO 0
#define ROWS 6
#define AT_ONCE 2
#include "int8_block.inc"

#define NAME(x) avx2_##x
#define ATTRIBUTES __attribute__((target("avx2,fma")))
#define WIDTH 32
/* in 16 bits, as sums of two products of bytes would saturate: first and third of four, second and last */
#define EVEN_INPUTS(x) _mm256_and_si256((__m256i)(x), _mm256_set1_epi16(0xFF))
#define ODD_INPUTS(x) _mm256_srli_epi16((__m256i)(x), 8)
#define EVEN_WEIGHTS(w) _mm256_srai_epi16(_mm256_slli_epi16((__m256i)(w), 8), 8)
#define ODD_WEIGHTS(w) _mm256_srai_epi16((__m256i)(w), 8)
#define DOT(sum, x, w)                                                            \
    ((sum) + (avx2_ints)_mm256_madd_epi16(EVEN_INPUTS(x), EVEN_WEIGHTS(w)) +      \
     (avx2_ints)_mm256_madd_epi16(ODD_INPUTS(x), ODD_WEIGHTS(w)))
#define ZERO 0
#define ROWS 4
#define AT_ONCE 2
#include "int8_block.inc"

#elif defined(__aarch64__)

#define NAME(x) neon_dot_##x
#define ATTRIBUTES __attribute__((target("arch=armv8.2-a+dotprod")))
#define WIDTH 16
/* both sides of this processor's products are signed */
#define SIGNED(x) veorq_s8((int8x16_t)(x), vdupq_n_s8(-128))
#define DOT(sum, x, w) (neon_dot_ints) vdotq_s32((int32x4_t)(sum), SIGNED(x), (int8x16_t)(w))
#define ZERO 128
#define ROWS 4
#define AT_ONCE 4
#include "int8_block.inc"

#endif
