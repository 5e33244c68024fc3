// The kernels for AVX-512 (x86-64-v4).
#include "backend/cpu/kernels.h"

#include <immintrin.h>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace drover::cpu {
namespace {
#define DROVER_KERNELS 512
#include "backend/cpu/kernels_impl.h"
}  // namespace

#pragma GCC pop_options

const Kernels kKernelsAvx512 = {"avx512",      add,    rms_norm,    silu_gate, to_bf16,
                                round_to_bf16, to_fp8, through_fp8, argmax,    attention};

}  // namespace drover::cpu
