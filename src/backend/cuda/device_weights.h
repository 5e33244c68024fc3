// Weight tensors on their way to the device: copied from the host, or made there from a recipe.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/dtype.h"

namespace drover::cuda {

// The parts of a WeightTensor in device memory, in the store's layout. Null where it has none.
struct DeviceTensor {
  const uint8_t* codes = nullptr;  // first in its memory; floats' raw bytes too
  const uint16_t* scales = nullptr;
  const uint8_t* zeros = nullptr;
  const uint16_t* minimums = nullptr;
};

// Device memory that the parts of `w` take together, each from a bound of 256 bytes on.
size_t device_tensor_bytes(const WeightTensor& w);

// Fills device memory with weights, everything on one stream. Host bytes go through pinned memory
// that several threads fill while what they filled before is on the bus; nothing waits for the
// device but a thread whose pinned memory is. Used by one thread at a time. Errors: kEnvironment.
class WeightUploader {
 public:
  // `stream` outlives this. threads: that copy into pinned memory, the caller's among them: one
  // copies 7 GB/s, eight 43 and twelve 50; the bus of an H100 takes 55.
  explicit WeightUploader(cudaStream_t stream, int threads = 12);
  ~WeightUploader();
  WeightUploader(const WeightUploader&) = delete;
  WeightUploader& operator=(const WeightUploader&) = delete;

  // Into a scratch that grows as needed: what is put on the stream after this call may read the
  // parts until the next upload() or release(). `w` may go at once.
  DeviceTensor upload(const WeightTensor& w);
  // Into `device` (device_tensor_bytes, aligned to 256), where the parts stay.
  DeviceTensor upload_to(const WeightTensor& w, void* device);
  // Waits for the stream, then frees scratch and pinned memory, until the next upload.
  void release();

 private:
  class Pinned;
  cudaStream_t stream_;
  int threads_;
  std::unique_ptr<Pinned> pinned_;
  void* scratch_ = nullptr;
  size_t scratch_bytes_ = 0;
};

// A matrix of `bits` (4, 8, 16 or 32) an element, made of random bytes as WeightRecipe tells.
// Columns of 4 bits are even in number.
struct RandomMatrix {
  uint64_t seed = 0;
  int64_t rows = 0, cols = 0;
  int64_t row_begin = 0, col_begin = 0, all_cols = 0;
  int bits = 0;
  uint32_t table[256] = {};
};
void make_random(const RandomMatrix& m, void* out, cudaStream_t s);  // device_weights.cu

}  // namespace drover::cuda
