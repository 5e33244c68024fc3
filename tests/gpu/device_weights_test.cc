// Weights on the device are those of the host, whether they were copied there or made there.
#include "backend/cuda/device_weights.h"

#include <gtest/gtest.h>

#include <cstring>

#include "backend/cuda/cuda_check.h"
#include "model/weights.h"

namespace drover::cuda {
namespace {

class DeviceWeights : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU here";
    DROVER_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  template <typename T>
  void expect_bytes(const std::vector<T>& host, const void* device, const char* what) {
    if (host.empty()) {
      EXPECT_EQ(device, nullptr) << what;
      return;
    }
    std::vector<T> got(host.size());
    DROVER_CUDA(cudaMemcpyAsync(got.data(), device, got.size() * sizeof(T), cudaMemcpyDeviceToHost,
                                stream_));
    DROVER_CUDA(cudaStreamSynchronize(stream_));
    EXPECT_TRUE(got == host) << what;
  }
  void expect_same(const WeightTensor& w, const DeviceTensor& d) {
    expect_bytes(w.codes, d.codes, "codes");
    expect_bytes(w.scales, d.scales, "scales");
    expect_bytes(w.zeros, d.zeros, "zeros");
    expect_bytes(w.minimums, d.minimums, "minimums");
  }

  cudaStream_t stream_ = nullptr;
};

TEST_F(DeviceWeights, MadeThereAsHere) {
  const struct {
    const char *model, *name;
    Range rows, cols;
  } cases[] = {
      {"llama2-70b", "layers.79.down", {100, 1124}, {3584, 7168}},
      {"llama2-70b", "layers.3.gate", {28000, 28672}, {0, 8192}},
      {"llama2-70b", "layers.0.k", {0, 1024}, {0, 8192}},
      {"llama2-70b", "embed", {31000, 32000}, {0, 8192}},
      {"llama2-70b", "output", {7, 19}, {3, 4106}},  // rows of 16 bytes only by chance
      {"tiny", "embed", {3, 1000}, {32, 96}},
      {"tiny", "layers.2.up", {5, 77}, {32, 224}},
      {"tiny", "layers.2.up", {5, 5}, {32, 224}},
  };
  WeightUploader uploader(stream_, 2);
  for (const auto& c : cases) {
    SCOPED_TRACE(std::string(c.model) + " " + c.name);
    const auto source = synthetic_weights(c.model, 5);
    const WeightTensor host = source->read(c.name, c.rows, c.cols);
    source->allow_recipes();
    const WeightTensor recipe = source->read(c.name, c.rows, c.cols);
    ASSERT_NE(recipe.recipe, nullptr);
    expect_same(host, uploader.upload(recipe));
  }
}

WeightTensor some(WeightFormat format, ZeroKind zero, int64_t rows, int64_t cols, uint8_t salt) {
  WeightTensor w;
  w.format = format, w.zero = zero, w.rows = rows, w.cols = cols;
  w.group = format == WeightFormat::kInt4 || format == WeightFormat::kInt8 ? 32 : 0;
  w.codes.resize(w.code_bytes());
  for (size_t i = 0; i < w.codes.size(); ++i)
    w.codes[i] = static_cast<uint8_t>((i * 2654435761u >> 13) + salt);
  w.scales.assign(w.groups(), static_cast<uint16_t>(salt * 257 + 1));
  if (zero == ZeroKind::kZeroPoints) w.zeros.assign(w.groups(), 7);
  if (zero == ZeroKind::kMinimums) w.minimums.assign(w.groups(), 999);
  return w;
}

// Larger and smaller ones in turn, past the pinned ring's end, without a wait in between.
TEST_F(DeviceWeights, CopiedWhole) {
  WeightUploader uploader(stream_, 3);
  const WeightTensor cases[] = {
      some(WeightFormat::kInt4, ZeroKind::kZeroPoints, 33, 96, 1),
      some(WeightFormat::kInt4, ZeroKind::kSymmetric, 8192, 20480, 2),
      some(WeightFormat::kInt8, ZeroKind::kMinimums, 7, 32, 3),
      some(WeightFormat::kF32, ZeroKind::kSymmetric, 3, 5, 4),
      some(WeightFormat::kBf16, ZeroKind::kSymmetric, 1000, 8192, 5),
  };
  for (const auto& w : cases) expect_same(w, uploader.upload(w));
  uploader.release();
  expect_same(cases[0], uploader.upload(cases[0]));

  void* memory = nullptr;
  const WeightTensor& last = cases[1];
  DROVER_CUDA(cudaMalloc(&memory, device_tensor_bytes(last)));
  const DeviceTensor kept = uploader.upload_to(last, memory);
  uploader.upload(cases[4]);
  EXPECT_EQ(kept.codes, memory);
  expect_same(last, kept);
  cudaFree(memory);
}

}  // namespace
}  // namespace drover::cuda
