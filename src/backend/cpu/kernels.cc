#include "backend/cpu/kernels.h"

#include "backend/cpu/dnnl_linear.h"

namespace drover::cpu {

const Kernels& choose_kernels() {
  const Isa limit = dnnl_isa();
  __builtin_cpu_init();
  if (limit >= Isa::kAvx512 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return kKernelsAvx512;
  // Every CPU with AVX2 and FMA has F16C (GCC 12 cannot ask for it).
  if (limit >= Isa::kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kKernelsAvx2;
  return kKernelsBase;
}

}  // namespace drover::cpu
