// Chooses among the instruction sets that CMake compiled kernels.cpp for (SPARSE_ATTN_ISAS lists
// them, best first).
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(SPARSE_ATTN_AMX)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace sparse_attn::cpu {

#define X(ISA)                                   \
  extern const Kernels kernels_##ISA##_float32;  \
  extern const Kernels kernels_##ISA##_float64;  \
  extern const Kernels kernels_##ISA##_bfloat16; \
  extern const Kernels kernels_##ISA##_float16;
SPARSE_ATTN_ISAS
#undef X

#if defined(SPARSE_ATTN_AMX)
extern const Kernel amx_forward, amx_backward;
#endif

namespace {

#if defined(__x86_64__)

[[maybe_unused]] bool supports_x86_64_v2() {
  return __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("sse4.2") &&
         __builtin_cpu_supports("popcnt");
}

[[maybe_unused]] bool supports_x86_64_v3() {
  return supports_x86_64_v2() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
}

[[maybe_unused]] bool supports_x86_64_v4() {
  return supports_x86_64_v3() && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(SPARSE_ATTN_AMX)

/// Linux lends the tile registers to processes that ask for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

bool supports_x86_64_amx() {
  constexpr unsigned kTiles = 1u << 24, kTileProducts = 1u << 22, kAvx512BFloat16 = 1u << 5;
  unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, d1 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b, &c, &d1))
    return false;
  return supports_x86_64_v4() && (d & kTiles) && (d & kTileProducts) && (a1 & kAvx512BFloat16) &&
         may_use_tiles();
}

/// Only bfloat16 has kernels of its own.
const Kernels kAmxBFloat16 = [] {
  Kernels kernels = kernels_x86_64_v4_bfloat16;
  kernels.forward = amx_forward;
  kernels.backward = amx_backward;
  return kernels;
}();

#endif

#elif defined(__aarch64__)

bool supports_aarch64_neon() { return true; }

#endif

/// x86_64_v3 is a C++ identifier, x86-64-v3 the usual name.
std::string usual_name(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

struct Isa {
  std::string name;
  bool (*supported)();
  const Kernels* by_type[4];  // in the order of DataType
};

const Isa kIsas[] = {
#if defined(SPARSE_ATTN_AMX)
    {"x86-64-amx",
     supports_x86_64_amx,
     {&kernels_x86_64_v4_float32, &kernels_x86_64_v4_float64, &kAmxBFloat16,
      &kernels_x86_64_v4_float16}},
#endif
#define X(ISA)                                                                     \
  {usual_name(#ISA),                                                               \
   supports_##ISA,                                                                 \
   {&kernels_##ISA##_float32, &kernels_##ISA##_float64, &kernels_##ISA##_bfloat16, \
    &kernels_##ISA##_float16}},
    SPARSE_ATTN_ISAS
#undef X
};

const Isa& choose() {
  const char* variable = std::getenv("SPARSE_ATTN_ISA");
  const std::string wanted = usual_name(variable ? variable : "");
  for (const Isa& isa : kIsas) {
    if ((wanted.empty() || wanted == isa.name) && isa.supported()) return isa;
  }
  std::string names;
  for (const Isa& isa : kIsas) {
    if (isa.supported()) names += (names.empty() ? "" : ", ") + isa.name;
  }
  if (names.empty()) {
    throw std::invalid_argument("expected a CPU of at least " + std::end(kIsas)[-1].name);
  }
  throw std::invalid_argument("expected SPARSE_ATTN_ISA to be one of " + names + ", got " + wanted);
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

const Kernels& kernels(DataType dtype) { return *chosen().by_type[static_cast<int>(dtype)]; }

const Kernels* kernels(const char* name, DataType dtype) {
  for (const Isa& isa : kIsas) {
    if (isa.name == name && isa.supported()) return isa.by_type[static_cast<int>(dtype)];
  }
  return nullptr;
}

const char* isa_name() { return chosen().name.c_str(); }

const char* compiled_isa(int n) {
  return n < static_cast<int>(std::size(kIsas)) ? kIsas[n].name.c_str() : nullptr;
}

}  // namespace sparse_attn::cpu
