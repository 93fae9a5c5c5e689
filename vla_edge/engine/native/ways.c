#include "ways.h"

#include <string.h>

#define WAY(name) \
    {#name, name##_runs, name##_int4_round, name##_int4_block, name##_int8_round, name##_int8_block, \
     name##_int8_finish, name##_pack, name##_attend, name##_attend_cached}

#if defined(__x86_64__)
#include <cpuid.h>

static int avx512_vnni_runs(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}

static int avx2_runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int avx_vnni_runs(void) {
    unsigned a, b, c, d; /* compilers of 2021 have no name for it */
    return avx2_runs() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
}

static const Way WAYS[] = {WAY(avx512_vnni), WAY(avx_vnni), WAY(avx2)};

#elif defined(__aarch64__)
#include <sys/auxv.h>

static int neon_dot_runs(void) { return !!(getauxval(AT_HWCAP) & 1ul << 20); }

static const Way WAYS[] = {WAY(neon_dot)};

#else

static const Way WAYS[] = {{.name = NULL}};

#endif

const Way *find_way(const char *name) {
    for (size_t i = 0; i < sizeof WAYS / sizeof *WAYS; i++)
        if (WAYS[i].name && (!name || !strcmp(name, WAYS[i].name)) && WAYS[i].runs()) return WAYS + i;
    return NULL;
}
