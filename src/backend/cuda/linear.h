// Linears of the CUDA backend. INT4 in symmetric groups of 128 on Hopper goes through
// hopper_kernel.cuh, other quantized weights through linear_kernel.cuh, float ones through
// cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <map>
#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/device_weights.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/library_fp8.h"

namespace drover::cuda {

// Owns device memory. Its destructor waits for the device, as cudaFree does.
class DeviceBytes {
 public:
  DeviceBytes() = default;
  // Full of zeros. Throws kEnvironment saying what for and how much.
  DeviceBytes(size_t bytes, std::string_view purpose, cudaStream_t s);
  ~DeviceBytes();
  DeviceBytes(DeviceBytes&& o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  DeviceBytes& operator=(DeviceBytes&& o) noexcept {
    std::swap(p_, o.p_);
    return *this;
  }
  void* get() const { return p_; }

 private:
  void* p_ = nullptr;
};

// cudaMalloc with an error that says what for and how much.
void* device_alloc(size_t bytes, std::string_view purpose);

class LinearEngine {
 public:
  // Of the current device. fp8_inputs: INT4 layers take their inputs in e4m3 (W4A8), else in bf16
  // (W4A16). portable: as if the device were no Hopper.
  LinearEngine(const Workspace& work, cudaStream_t stream, bool fp8_inputs, bool portable,
               Tuning tuning);
  ~LinearEngine();
  LinearEngine(const LinearEngine&) = delete;
  LinearEngine& operator=(const LinearEngine&) = delete;

  std::unique_ptr<Linear> load(std::span<const WeightTensor> parts) { return load(parts, false); }
  std::unique_ptr<Linear> load_gate_up(std::span<const WeightTensor> parts) {
    return load(parts, true);
  }
  // Whether run() writes silu(gate) * up of it, [rows, w.rows / 2].
  static bool gates(const Linear& w);
  // Backend::library_linear.
  std::unique_ptr<Linear> library(int64_t rows, int64_t cols);
  WeightUploader& uploads() { return uploads_; }
  // Frees what only loading needs.
  void loaded() { uploads_.release(); }
  // Backend::linear_ways, run_linear_as.
  std::vector<LinearWay> ways(const Linear& w, int64_t rows) const;
  void run_as(Linear& w, const LinearWay* way) const;
  void run(const Linear& w, const LinearInput& in, void* out, int64_t rows, bool f32_out);

 private:
  struct Plan;
  RepackSource upload(const WeightTensor& part);
  std::unique_ptr<Linear> load(std::span<const WeightTensor> parts, bool gate_up);
  std::unique_ptr<Linear> load_hopper(std::span<const WeightTensor> parts, int64_t rows,
                                      bool gate_up);
  std::unique_ptr<Linear> load_quantized(std::span<const WeightTensor> parts, int64_t rows,
                                         bool gate_up);
  std::unique_ptr<Linear> load_float(std::span<const WeightTensor> parts, int64_t rows);
  void run_quantized(const Linear& w, const LinearInput& in, void* out, int64_t rows, bool f32_out);
  void run_library(const Linear& w, const LinearInput& in, void* out, int64_t rows);
  const Plan& plan(int64_t n, int64_t k, int64_t rows, bool f32_out);
  LibraryFp8* library_plan(int64_t n, int64_t k, int64_t rows);  // null: there is no way

  Workspace work_;
  cudaStream_t stream_;
  bool fp8_inputs_;
  Tuning tuning_;
  int compute_capability_major_ = 0;
  WeightUploader uploads_;
  bool fresh_ = false;  // weights were repacked since the last launch
  // Inputs in e4m3 become bf16 here, kWidenedRows at a time, where no kernel takes them as they
  // are.
  DeviceBytes widened_;
  size_t widened_bytes_ = 0;
  cublasLtHandle_t handle_ = nullptr;
  DeviceBytes lt_workspace_;
  // Heuristics are asked once for each shape and kept.
  std::map<std::tuple<int64_t, int64_t, int64_t, bool>, std::unique_ptr<Plan>> plans_;
  std::map<std::tuple<int64_t, int64_t, int64_t>, std::unique_ptr<LibraryFp8>> library_plans_;
};

}  // namespace drover::cuda
