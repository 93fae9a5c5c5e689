#include "int4_products.h"

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
#define DOT(sum, w, x) (avx512_vnni_ints) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(w), (__m512i)(x))
#define SCALES(p) (avx512_vnni_floats) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define AT_ONCE 4
#include "int4_block.inc"

#define NAME(x) avx_vnni_##x
#define ATTRIBUTES __attribute__((target("avx2,fma,f16c,avxvnni")))
#define WIDTH 32
#define DOT(sum, w, x) (avx_vnni_ints) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(w), (__m256i)(x))
#define SCALES(p) (avx_vnni_floats) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define AT_ONCE 2
#include "int4_block.inc"

#define NAME(x) avx2_##x
#define ATTRIBUTES __attribute__((target("avx2,fma,f16c")))
#define WIDTH 32
/* two products are at most 2 * 15 * 127, far from where their sum would saturate in 16 bits */
#define PAIRS(w, x) _mm256_maddubs_epi16((__m256i)(w), (__m256i)(x))
#define DOT(sum, w, x) ((sum) + (avx2_ints)_mm256_madd_epi16(PAIRS(w, x), _mm256_set1_epi16(1)))
#define SCALES(p) (avx2_floats) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define AT_ONCE 2
#include "int4_block.inc"

#elif defined(__aarch64__)

#define NAME(x) neon_dot_##x
#define ATTRIBUTES __attribute__((target("arch=armv8.2-a+dotprod")))
#define WIDTH 16
/* weights of 0 to 15 are the same number signed */
#define DOT(sum, w, x) (neon_dot_ints) vdotq_s32((int32x4_t)(sum), (int8x16_t)(w), (int8x16_t)(x))
#define SCALES(p) (neon_dot_floats) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))
#define AT_ONCE 4
#include "int4_block.inc"

#endif
