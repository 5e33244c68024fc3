// How far W4A8 linears and cuBLASLt's FP8 linears are from what they should be: each against
// double precision sums of its own operands, so rounding of weights and activations is no part of
// it. Shapes of Llama-2-70B, activations the same, the library's weights the same rounded to e4m3
// with a scale a row. An error is taken relative to the sum of the terms' magnitudes, which is what
// a sum's rounding is bounded by. f32 outputs show the sums, bf16 outputs what a layer gets.
//
//   hopper_errors_bench [M]     (default 512)
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/hopper_linear.h"
#include "backend/cuda/library_fp8.h"
#include "bench/hopper_bench_data.cuh"

namespace {

using namespace drover::cuda;

// Quarter octaves of relative error: bin b holds those from 2^(b / 4 - 40) on, 0 those below.
constexpr int kBins = 160;
struct Errors {
  double error2, value2, signed_sum, count;
  unsigned long long bins[kBins];
};

__device__ float code_of(const uint8_t* codes, int64_t i) {
  const uint8_t pair = codes[i / 2];
  return static_cast<float>((i % 2 != 0 ? pair >> 4 : pair & 15) - 8);
}
__device__ float e4m3(const void* p, int64_t i) {
  const uint8_t b = static_cast<const uint8_t*>(p)[i];
  return static_cast<float>(*reinterpret_cast<const __nv_fp8_e4m3*>(&b));
}

// A block a row: w [n, k] e4m3 = round(codes * group scales / w_scale), w_scale = largest / 448.
__global__ void round_rows(const uint8_t* codes, const __half* scales, uint8_t* w, float* w_scale,
                           int64_t k) {
  const int64_t row = blockIdx.x;
  __shared__ float top;
  if (threadIdx.x == 0) top = 0;
  __syncthreads();
  for (int64_t c = threadIdx.x; c < k; c += blockDim.x) {
    const float v =
        fabsf(code_of(codes, row * k + c) * __half2float(scales[row * (k / 128) + c / 128]));
    atomicMax(reinterpret_cast<int*>(&top), __float_as_int(v));
  }
  __syncthreads();
  if (threadIdx.x == 0) w_scale[row] = top / 448;
  for (int64_t c = threadIdx.x; c < k; c += blockDim.x) {
    const __nv_fp8_e4m3 v(code_of(codes, row * k + c) *
                          __half2float(scales[row * (k / 128) + c / 128]) * (448 / top));
    w[row * k + c] = *reinterpret_cast<const uint8_t*>(&v);
  }
}

// Of outputs i * stride. With `w`, of e4m3 weights and w_scale; otherwise of codes and scales.
__global__ void compare(const uint8_t* codes, const __half* scales, const uint8_t* w,
                        const float* w_scale, const void* x, const float* x_scale, const void* out,
                        bool f32, int64_t n, int64_t k, int64_t m, int64_t stride, Errors* to) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32, lane = threadIdx.x % 32;
  for (int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32; i * stride < n * m;
       i += warps) {
    const int64_t token = i * stride / n, row = i * stride % n;
    double sum = 0, magnitude = 0;
    for (int64_t c = lane; c < k; c += 32) {
      double t = e4m3(x, token * k + c);
      t *= w != nullptr ? e4m3(w, row * k + c)
                        : double{code_of(codes, row * k + c)} *
                              __half2float(scales[row * (k / 128) + c / 128]);
      sum += t, magnitude += fabs(t);
    }
    for (int o = 16; o > 0; o /= 2) {
      sum += __shfl_xor_sync(~0u, sum, o);
      magnitude += __shfl_xor_sync(~0u, magnitude, o);
    }
    if (lane != 0) continue;
    const double scale = double{x_scale[token]} * (w != nullptr ? w_scale[row] : 1.0f);
    sum *= scale, magnitude *= scale;
    const int64_t at = token * n + row;
    const double got = f32 ? static_cast<const float*>(out)[at]
                           : __uint_as_float(uint32_t{static_cast<const uint16_t*>(out)[at]} << 16);
    const double error = got - sum, relative = fabs(error) / magnitude;
    atomicAdd(&to->error2, error * error), atomicAdd(&to->value2, sum * sum);
    atomicAdd(&to->signed_sum, error / magnitude), atomicAdd(&to->count, 1.0);
    // What is no number counts as the largest.
    const double bin = relative == relative ? (log2(fmax(relative, 0x1p-40)) + 40) * 4 : kBins - 1;
    atomicAdd(to->bins + min(kBins - 1, static_cast<int>(bin)), 1ull);
  }
}

void print(const char* what, int64_t n, int64_t k, int64_t m, const Errors& e) {
  std::printf("N %5lld K %5lld M %lld %-22s |e|/|y| %.2e, bias %+.1e, |e|/sum|t|:",
              static_cast<long long>(n), static_cast<long long>(k), static_cast<long long>(m), what,
              std::sqrt(e.error2 / e.value2), e.signed_sum / e.count);
  for (const double share : {0.5, 0.9, 0.99, 0.999, 1.0}) {
    double seen = 0;
    int bin = 0;
    for (; bin < kBins - 1; ++bin)
      if ((seen += static_cast<double>(e.bins[bin])) >= share * e.count) break;
    std::printf(" %g%% < %.1e", share * 100, std::exp2((bin + 1) / 4.0 - 40));
  }
  std::printf(" (%.0f outputs)\n", e.count);
  std::fflush(stdout);
}

void run(int64_t n, int64_t k, int64_t m, const Workspace& work, cublasLtHandle_t handle,
         cudaStream_t s) {
  std::vector<void*> owned;
  const auto alloc = [&](int64_t bytes) {
    void* p = nullptr;
    CHECK(cudaMalloc(&p, static_cast<size_t>(bytes)));
    owned.push_back(p);
    return p;
  };
  auto* codes = static_cast<uint8_t*>(alloc(n * k / 2));
  auto* scales = static_cast<__half*>(alloc(n * k / 64));
  auto* w8 = static_cast<uint8_t*>(alloc(n * k));
  auto* w8_scale = static_cast<float*>(alloc(n * 4));
  auto* x = static_cast<uint8_t*>(alloc(m * k));
  auto* x_scale = static_cast<float*>(alloc(m * 4));
  void* out = alloc(m * n * 4);
  auto* errors = static_cast<Errors*>(alloc(sizeof(Errors)));
  constexpr size_t kRoom = size_t{64} << 20;
  void* room = alloc(kRoom);
  make_codes<<<2048, 256, 0, s>>>(codes, static_cast<size_t>(n * k / 2), 3);
  make_scales<<<256, 256, 0, s>>>(reinterpret_cast<uint16_t*>(scales),
                                  static_cast<size_t>(n * k / 128), 3, false);
  make_x<<<1024, 256, 0, s>>>(x, x_scale, static_cast<size_t>(m * k), static_cast<size_t>(k), true,
                              4);
  round_rows<<<static_cast<unsigned>(n), 256, 0, s>>>(codes, scales, w8, w8_scale, k);
  HopperWeights w = hopper_shape(true, false, n, k);
  w.records = alloc(static_cast<int64_t>(hopper_bytes(w)));
  CHECK(cudaMemsetAsync(w.records, 0, hopper_bytes(w), s));
  hopper_repack({4, 128, 0, n, k, codes, reinterpret_cast<uint16_t*>(scales), nullptr, nullptr}, 0,
                w, s);
  const auto show = [&](const char* what, bool library, bool f32) {
    CHECK(cudaGetLastError());
    CHECK(cudaMemsetAsync(errors, 0, sizeof(Errors), s));
    compare<<<1024, 256, 0, s>>>(codes, scales, library ? w8 : nullptr, w8_scale, x, x_scale, out,
                                 f32, n, k, m, std::max<int64_t>(1, n * m * k / 4000000000) * 2 - 1,
                                 errors);
    CHECK(cudaGetLastError());
    Errors e;
    CHECK(cudaMemcpyAsync(&e, errors, sizeof e, cudaMemcpyDeviceToHost, s));
    CHECK(cudaStreamSynchronize(s));
    print(what, n, k, m, e);
  };
  for (const bool f32 : {true, false}) {
    CHECK(cudaMemsetAsync(out, 0xff, static_cast<size_t>(m * n * 4), s));
    hopper_linear(w, choose_hopper(w, m, work), x, x_scale, out, m, f32, work, s);
    show(f32 ? "W4A8, f32" : "W4A8, bf16", false, f32);
    CHECK(cudaMemsetAsync(out, 0xff, static_cast<size_t>(m * n * 4), s));
    const auto way = LibraryFp8::make(handle, n, k, m, kRoom, f32);
    if (!way || way->run(w8, w8_scale, x, x_scale, out, room, s) != CUBLAS_STATUS_SUCCESS)
      std::printf("cuBLASLt FP8 has no way to %s\n", f32 ? "f32" : "bf16");
    else
      show(f32 ? "cuBLASLt FP8, f32" : "cuBLASLt FP8, bf16", true, f32);
  }
  for (void* p : owned) cudaFree(p);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t m = argc > 1 ? std::atoll(argv[1]) : 512;
  if (m < 16 || m % 16 != 0) return std::printf("hopper_errors_bench [M], M a multiple of 16\n"), 2;
  cudaDeviceProp p{};
  CHECK(cudaGetDeviceProperties(&p, 0));
  cudaStream_t s;
  CHECK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  Workspace work;
  work.partial_count = size_t{16} << 20, work.counter_count = 1 << 16;
  work.multiprocessors = p.multiProcessorCount;
  CHECK(cudaMalloc(&work.partials, work.partial_count * 4));
  CHECK(cudaMalloc(&work.counters, work.counter_count * 4));
  CHECK(cudaMemset(work.counters, 0, work.counter_count * 4));
  cublasLtHandle_t handle;
  if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS)
    return std::printf("cuBLASLt does not start\n"), 1;
  std::printf("%s\n", p.name);
  run(8192, 8192, m, work, handle, s);
  run(8192, 28672, m, work, handle, s);
  cublasLtDestroy(handle);
  return 0;
}
