#include "cached_attention.h"

#include <math.h>
#include <string.h>

#include "rounding.h"
#include "ways.h"

#if defined(__x86_64__)

#define NAME(x) avx512_vnni_##x
#define ATTRIBUTES __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define WIDTH 64
#define ROWS 4
#define AT_ONCE 4
#include "cached_head.inc"

#define NAME(x) avx_vnni_##x
#define ATTRIBUTES __attribute__((target("avx2,fma")))
#define WIDTH 32
#define ROWS 2
#define AT_ONCE 4
#include "cached_head.inc"

#define NAME(x) avx2_##x
#define ATTRIBUTES __attribute__((target("avx2,fma")))
#define WIDTH 32
#define ROWS 2
#define AT_ONCE 4
#include "cached_head.inc"

#elif defined(__aarch64__)

#define NAME(x) neon_dot_##x
#define ATTRIBUTES
#define WIDTH 16
#define ROWS 4
#define AT_ONCE 4
#include "cached_head.inc"

#endif
