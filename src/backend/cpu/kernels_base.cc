// The kernels for any x86-64.
#include "backend/cpu/kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined

namespace drover::cpu {
namespace {
#define DROVER_KERNELS 128
#include "backend/cpu/kernels_impl.h"
}  // namespace

const Kernels kKernelsBase = {"base",        add,    rms_norm,    silu_gate, to_bf16,
                              round_to_bf16, to_fp8, through_fp8, argmax,    attention};

}  // namespace drover::cpu
