// The kernels for AVX2 with FMA and F16C (x86-64-v3).
#include "backend/cpu/kernels.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace drover::cpu {
namespace {
#define DROVER_KERNELS 256
#include "backend/cpu/kernels_impl.h"
}  // namespace

#pragma GCC pop_options

const Kernels kKernelsAvx2 = {"avx2",        add,    rms_norm,    silu_gate, to_bf16,
                              round_to_bf16, to_fp8, through_fp8, argmax,    attention};

}  // namespace drover::cpu
