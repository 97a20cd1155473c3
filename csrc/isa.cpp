// Choosing the instruction set: the best one at first use, another one on request.
#include "isa.h"

#include <cstdlib>
#include <string>

#include "cpu/memory.h"

namespace fused {
namespace {

#define FUSED_KERNELS(isa) {#isa, row_kernels_##isa(), channel_kernels_##isa(), stages_##isa()}

// A table is made only on a machine that has its instruction set: the code that fills it is
// compiled for that set, too.
const Kernels* find_kernels(const std::string& name) {
  if (name == "portable") {
    static const Kernels portable = FUSED_KERNELS(portable);
    return &portable;
  }
#if !defined(FUSED_PORTABLE_ONLY)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2" && has_avx2) {
    static const Kernels avx2 = FUSED_KERNELS(avx2);
    return &avx2;
  }
  if (name == "avx512" && has_avx512) {
    static const Kernels avx512 = FUSED_KERNELS(avx512);
    return &avx512;
  }
#endif
  return nullptr;
}

const Kernels* best_kernels() {
  const char* wanted = std::getenv("FUSED_CPU_ISA");
  if (wanted && *wanted) {
    // What is not served is said by fused/backends/extension.py.
    if (const Kernels* kernels = find_kernels(wanted)) return kernels;
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (const Kernels* kernels = find_kernels(name)) return kernels;
  }
  return find_kernels("portable");
}

const Kernels*& active() {
  static const Kernels* kernels = best_kernels();
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *active(); }

// Called by fused/backends/extension.py and fused/backends/backend.py through ctypes: none takes
// part in a computation.
extern "C" __attribute__((visibility("default"))) const char* fused_cpu_isa() {
  return active()->name;
}

extern "C" __attribute__((visibility("default"))) int fused_set_cpu_isa(const char* name) {
  const Kernels* kernels = find_kernels(name);
  if (kernels) active() = kernels;
  return kernels != nullptr;
}

// By which a library of older sources is noticed.
extern "C" __attribute__((visibility("default"))) int fused_activation_codes() {
  return kActivationCodes;
}

extern "C" __attribute__((visibility("default"))) void fused_empty_cache() { empty_block_cache(); }

extern "C" __attribute__((visibility("default"))) void fused_poison_outputs(int on) {
  poison_new_tensors = on != 0;
}

}  // namespace fused
