/* What the processor that runs this can do, by the names that its ways have here. */
#ifndef VLA_EDGE_PROCESSOR_H
#define VLA_EDGE_PROCESSOR_H

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

static int avx512_vnni_runs(void) {
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
}

static int avx2_runs(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

static int avx_vnni_runs(void) {
    unsigned a, b, c, d; /* compilers of 2021 have no name for it */
    return avx2_runs() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 4;
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#include <sys/auxv.h>

static int neon_dot_runs(void) { return !!(getauxval(AT_HWCAP) & 1ul << 20); }

#endif
#endif
