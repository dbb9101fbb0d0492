// Which kernels this machine can run.
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace resens::cpu {
namespace {

struct Available {
  const Kernels* all[4];
  int count = 0;
  Available() {
#if defined(RESENS_AVX2) || defined(RESENS_AVX512) || defined(RESENS_AVX512BF16)
    __builtin_cpu_init();
    [[maybe_unused]] const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#ifdef RESENS_AVX512BF16
    if (avx512 && __builtin_cpu_supports("avx512bf16")) all[count++] = &avx512bf16::kernels;
#endif
#ifdef RESENS_AVX512
    if (avx512) all[count++] = &avx512::kernels;
#endif
#ifdef RESENS_AVX2
    if (avx2) all[count++] = &avx2::kernels;
#endif
    all[count++] = &portable::kernels;
  }
};

const Available& available() {
  static const Available a;
  return a;
}

}  // namespace

int kernel_count() { return available().count; }
const Kernels& kernels_at(int index) { return *available().all[index]; }

const Kernels& kernels_named(const char* name) {
  if (!name || !*name) return kernels_at(0);
  std::string known;
  for (int i = 0; i < kernel_count(); ++i) {
    if (std::strcmp(kernels_at(i).name, name) == 0) return kernels_at(i);
    known += std::string(i ? ", " : "") + kernels_at(i).name;
  }
  throw std::invalid_argument("This machine has no instruction set named \"" + std::string(name) + "\"; set RESENS_FAST_ISA to one of " + known + ".");
}

}  // namespace resens::cpu
