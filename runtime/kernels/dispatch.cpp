// Which kernels this processor runs. The compiled files are told by macros MOEDGE_HAS_... (see compiling.py).

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace moedge {

namespace {

#if defined(__x86_64__)
bool runs_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool halves = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);  // F16C, which not every compiler can ask for
  return halves && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool runs_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
bool runs_avx512() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

using Find = const Kernels* (*)();

// The best first.
const Find* available() {
  static Find found[5];
  int count = 0;
#if defined(__x86_64__)
#ifdef MOEDGE_HAS_AVX512
  if (runs_avx512()) found[count++] = avx512_kernels;
#endif
#if defined(MOEDGE_HAS_AVXVNNI) && defined(MOEDGE_HAS_AVX2)
  if (runs_avxvnni()) found[count++] = avxvnni_kernels;
#endif
#ifdef MOEDGE_HAS_AVX2
  if (runs_avx2()) found[count++] = avx2_kernels;
#endif
#endif
#ifdef MOEDGE_HAS_NEON
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & (1u << 20)) found[count++] = neon_kernels;  // HWCAP_ASIMDDP
#else
  found[count++] = neon_kernels;  // every 64-bit Apple processor
#endif
#endif
#ifdef MOEDGE_HAS_PORTABLE
  found[count++] = portable_kernels;
#endif
  found[count] = nullptr;
  return found;
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Find* find = available(); *find; ++find)
    if (strcmp((*find)()->name, name) == 0) return (*find)();
  return nullptr;
}

const Kernels* default_kernels() {
  const char* asked = getenv("MOEDGE_KERNELS");
  // "stock" is for who decides whether this library is loaded; here it is.
  if (asked && *asked && strcmp(asked, "stock") != 0) return find_kernels(asked);
  return available()[0] ? available()[0]() : nullptr;
}

const AttentionKernels* attention_kernels(const Kernels* kernels) {
  struct Pair {
    Find products;
    const AttentionKernels* (*attention)();
  };
  static constexpr Pair pairs[] = {
#ifdef MOEDGE_HAS_AVX512
      {avx512_kernels, avx512_attention},
#endif
#if defined(MOEDGE_HAS_AVXVNNI) && defined(MOEDGE_HAS_AVX2)
      {avxvnni_kernels, avx2_attention},
#endif
#ifdef MOEDGE_HAS_AVX2
      {avx2_kernels, avx2_attention},
#endif
#ifdef MOEDGE_HAS_NEON
      {neon_kernels, neon_attention},
#endif
#ifdef MOEDGE_HAS_PORTABLE
      {portable_kernels, portable_attention},
#endif
      {nullptr, nullptr},
  };
  for (const Pair* pair = pairs; pair->products; ++pair)
    if (pair->products() == kernels) return pair->attention();
  return nullptr;
}

}  // namespace moedge

// The instruction sets that this processor runs, the best first, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* moedge_kernels_available() {
  static char names[128];
  if (!names[0])
    for (const moedge::Find* find = moedge::available(); *find; ++find) {
      const size_t held = strlen(names);
      snprintf(names + held, sizeof names - held, "%s ", (*find)()->name);
    }
  return names;
}
