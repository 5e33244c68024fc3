// Linears through oneDNN. The only place that includes it; written for its 2.6 and 3.x.
//
// Weights are packed once per tensor, in the layout that oneDNN chooses for the largest number of
// rows, and that every other bucket of rows accepts. inner_product, not matmul: measured on
// Sapphire Rapids both are equally fast up to 64 rows (matmul is up to 1.5 times faster at 256),
// but only inner_product sums along K in the same order for every number of rows, so that a token's
// logits do not depend on what else is in its batch (tests/ops/linear_test.cc holds it to that).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"

namespace drover::cpu {

enum class Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
// What oneDNN may use here: the CPU's best within ONEDNN_MAX_CPU_ISA.
Isa dnnl_isa();
std::string dnnl_description();  // "oneDNN 2.6.3 avx512_core_amx"

class LinearEngine {
 public:
  // kF32: f32 weights and inputs, never rounded. kBf16: both rounded to bf16, f32 sums; on a CPU
  // without bf16 instructions the rounded values are held and multiplied as f32.
  // kFp8E4m3: as kF32; INT4 layers want quantized inputs, which on the CPU are f32 all the same.
  LinearEngine(Dtype type, int threads, const Kernels& kernels);
  ~LinearEngine();

  // Rows are computed in blocks of at most 256 (64 below AVX-512), the last one rounded up to a
  // bucket, so that few primitives exist. All of a shape's primitives are made at load.
  int64_t padded_rows(int64_t rows) const;

  std::unique_ptr<Linear> load(std::span<const WeightTensor> parts);
  // out [padded_rows(rows), w.rows] = in [padded_rows(rows), w.cols] * w^T
  void run(const Linear& w, const float* in, float* out, int64_t rows);
  std::string description() const;  // "bf16 (brgemm:avx512_core_amx_bf16)"

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace drover::cpu
