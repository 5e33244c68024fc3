// cuBLASLt's linear of e4m3 weights and e4m3 inputs with an f32 scale a row of either ("outer
// vector" scaling), bf16 out: the yardstick for W4A8, in `drover bench linear` and
// hopper_linear_bench. Plain types only.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace drover::cuda {

// One shape with the way that cuBLASLt's heuristics name first.
class LibraryFp8 {
 public:
  // n, k and rows are multiples of 16. Null where cuBLASLt has no way: it scales by rows on Hopper
  // only, from CUDA 12.9 on.
  static std::unique_ptr<LibraryFp8> make(cublasLtHandle_t handle, int64_t n, int64_t k,
                                          int64_t rows, size_t workspace_bytes,
                                          bool f32_out = false);
  ~LibraryFp8();
  LibraryFp8(const LibraryFp8&) = delete;
  LibraryFp8& operator=(const LibraryFp8&) = delete;

  // out [rows, n], bf16 unless it was made for f32, = (in [rows, k] * in_scale [rows]) * (w [n, k]
  // * w_scale [n])^T. Device pointers, aligned to 16 bytes.
  cublasStatus_t run(const void* w, const float* w_scale, const void* in, const float* in_scale,
                     void* out, void* workspace, cudaStream_t s);

  static int64_t padded(int64_t rows) { return (rows + 15) / 16 * 16; }

 private:
  LibraryFp8() = default;
  cublasStatus_t describe(int64_t n, int64_t k, int64_t rows, bool f32_out);
  cublasLtHandle_t handle_ = nullptr;
  size_t workspace_bytes_ = 0;
  cublasLtMatmulDesc_t operation_ = nullptr;
  cublasLtMatrixLayout_t w_ = nullptr, in_ = nullptr, out_ = nullptr;
  cublasLtMatmulHeuristicResult_t choice_{};
};

}  // namespace drover::cuda
