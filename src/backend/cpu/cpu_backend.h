// The CPU backend: plain and right. Every kernel of every other backend is held against it.
#pragma once

#include <memory>

#include "backend/backend.h"

namespace drover {

struct CpuOptions {
  // kF32: inputs of linears are f32, weights f32: what goldens are held against.
  // kBf16: inputs of linears and their weights are rounded to bf16, sums f32.
  // kFp8E4m3: as kF32, but inputs of INT4 layers are rounded to e4m3 with a scale a row (W4A8).
  Dtype linear_type = Dtype::kBf16;
  int threads = 1;  // OpenMP threads of this rank
};

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options);

}  // namespace drover
