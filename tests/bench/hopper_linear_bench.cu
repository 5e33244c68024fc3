// Hopper linears alone (backend/cuda/hopper_linear.h): a check of every variant against double
// precision on the GPU, and the time of the four linears of a Llama-2-70B layer, beside cuBLASLt's
// FP8 with a scale a row. Depends on CUDA only, so that one binary can be carried to a machine.
//
//   hopper_linear_bench check             errors of every variant; exit 1 when one is too large
//   hopper_linear_bench time [M...]       every variant at each M, in graphs, weights rotating
//   hopper_linear_bench sustained [M...]  variants for 3 s each: the chip at its power limit
//   hopper_linear_bench library [M...]    cuBLASLt alone for 3 s each
// DROVER_BENCH_FILTER keeps the variants it names ("128x160 c2 p1", with commas) and leaves the
// library and check's larger shapes out, DROVER_BENCH_FP8=1 leaves W4A16 out, DROVER_BENCH_SECONDS
// is in place of 3.
#include <cublasLt.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backend/cuda/hopper_linear.h"
#include "backend/cuda/library_fp8.h"
#include "bench/hopper_bench_data.cuh"

namespace {

using namespace drover::cuda;

struct Shape {
  const char* name;
  int64_t n, k;
};
constexpr Shape kLayer[] = {
    {"qkv", 10240, 8192}, {"o", 8192, 8192}, {"gate_up", 57344, 8192}, {"down", 8192, 28672}};
constexpr double kParameters = 10240.0 * 8192 + 8192.0 * 8192 + 57344.0 * 8192 + 8192.0 * 28672;

// Errors of the outputs i * stride: {max |error| / sum |terms|, sum error^2, sum value^2, count,
// sum of signed error / sum |terms|, mean |error| / sum |terms|}.
__global__ void compare(const uint8_t* codes, const uint16_t* scales, bool bf16_scales,
                        const void* x, const float* x_scale, bool fp8, const void* out, bool f32,
                        int64_t n, int64_t k, int64_t m, int64_t stride, double* stats) {
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / 32, lane = threadIdx.x % 32;
  for (int64_t w = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32; w * stride < n * m;
       w += warps) {
    const int64_t token = w * stride / n, row = w * stride % n;
    double sum = 0, magnitude = 0;
    for (int64_t c = lane; c < k; c += 32) {
      const uint8_t pair = codes[(row * k + c) / 2];
      const uint16_t sb = scales[row * (k / 128) + c / 128];
      const float s = bf16_scales ? __uint_as_float(uint32_t{sb} << 16)
                                  : __half2float(*reinterpret_cast<const __half*>(&sb));
      double v;
      if (fp8) {
        const uint8_t b = static_cast<const uint8_t*>(x)[token * k + c];
        v = static_cast<float>(*reinterpret_cast<const __nv_fp8_e4m3*>(&b));
      } else {
        v = __uint_as_float(uint32_t{static_cast<const uint16_t*>(x)[token * k + c]} << 16);
      }
      const double t = v * s * ((c % 2 ? pair >> 4 : pair & 15) - 8);
      sum += t, magnitude += fabs(t);
    }
    for (int o = 16; o > 0; o /= 2) {
      sum += __shfl_xor_sync(~0u, sum, o);
      magnitude += __shfl_xor_sync(~0u, magnitude, o);
    }
    if (lane != 0) continue;
    if (fp8) sum *= x_scale[token], magnitude *= x_scale[token];
    const int64_t at = token * n + row;
    const double got = f32 ? static_cast<const float*>(out)[at]
                           : __uint_as_float(uint32_t{static_cast<const uint16_t*>(out)[at]} << 16);
    const double error = got - sum, relative = fabs(error) / magnitude;
    atomicMax(reinterpret_cast<unsigned long long*>(stats),
              relative == relative ? static_cast<unsigned long long>(__double_as_longlong(relative))
                                   : ~0ull >> 1);
    atomicAdd(stats + 1, error * error), atomicAdd(stats + 2, sum * sum), atomicAdd(stats + 3, 1.0);
    atomicAdd(stats + 4, error / magnitude), atomicAdd(stats + 5, relative);
  }
}

struct Bench {
  cudaStream_t stream = nullptr;
  Workspace work;
  std::vector<void*> owned;
  void* alloc(size_t bytes) {
    void* p = nullptr;
    CHECK(cudaMalloc(&p, bytes));
    owned.push_back(p);
    return p;
  }
  void free_all() {
    CHECK(cudaDeviceSynchronize());
    for (void* p : owned) cudaFree(p);
    owned.clear();
  }

  Bench() {
    cudaDeviceProp p{};
    CHECK(cudaGetDeviceProperties(&p, 0));
    std::printf("%s, %d multiprocessors\n", p.name, p.multiProcessorCount);
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    work.partial_count = size_t{16} << 20, work.counter_count = 1 << 16;
    work.multiprocessors = p.multiProcessorCount;
    CHECK(cudaMalloc(&work.partials, work.partial_count * 4));
    CHECK(cudaMalloc(&work.counters, work.counter_count * 4));
    CHECK(cudaMemset(work.counters, 0, work.counter_count * 4));
  }

  HopperWeights weights(int64_t n, int64_t k, bool fp8, bool bf16_scales, uint32_t seed,
                        uint8_t* codes, uint16_t* scales) {
    make_codes<<<2048, 256, 0, stream>>>(codes, static_cast<size_t>(n * k / 2), seed);
    make_scales<<<256, 256, 0, stream>>>(scales, static_cast<size_t>(n * k / 128), seed,
                                         bf16_scales);
    HopperWeights w = hopper_shape(fp8, bf16_scales, n, k);
    w.records = alloc(hopper_bytes(w));
    CHECK(cudaMemsetAsync(w.records, 0, hopper_bytes(w), stream));
    const int64_t half = n / 2 / 3 * 2;  // two parts of a stack that share a tile
    RepackSource f{4, 128, 0, half, k, codes, scales, nullptr, nullptr};
    hopper_repack(f, 0, w, stream);
    f.rows = n - half, f.codes += half * k / 2, f.scales += half * (k / 128);
    hopper_repack(f, half, w, stream);
    CHECK(cudaGetLastError());
    return w;
  }

  static std::vector<HopperVariant> variants(int64_t m, bool all, bool fp8) {
    std::vector<HopperVariant> v;
    for (const int tokens : {8, 16, 32})
      if (all || (m <= tokens && m > tokens / 2) || (tokens == 8 && m <= 8))
        for (const int stages : {32, 20, 16, 12, 11, 8})
          for (const int per_sm : {1, 2}) {
            const HopperVariant some{tokens, 1, per_sm, stages};
            if ((per_sm == 1 || stages == 32) && hopper_has(fp8, some)) v.push_back(some);
          }
    if (all || (m > 32 && m <= 128)) v.push_back({64});
    if (all || m > 64) {
      v.push_back({128});
      v.push_back({128, 2});
      if (fp8) v.push_back({160}), v.push_back({160, 2}), v.push_back({256});
    }
    return v;
  }
  static std::string name(const HopperVariant& v) {
    char text[64], stages[16] = "";
    if (v.max_stages < 32) std::snprintf(stages, sizeof stages, " s%d", v.max_stages);
    std::snprintf(text, sizeof text, "128x%d c%d p%d%s%s%s", v.tokens, v.cluster, v.per_sm, stages,
                  v.split ? "" : " nosplit", v.dependent ? "" : " nopdl");
    return text;
  }

  // DROVER_BENCH_FILTER: names to keep, with commas, for runs that look into a variant.
  static bool wanted(const HopperVariant& v) {
    const char* filter = std::getenv("DROVER_BENCH_FILTER");
    return filter == nullptr ||
           ("," + std::string(filter) + ",").find("," + name(v) + ",") != std::string::npos;
  }

  bool check_one(int64_t n, int64_t k, int64_t m, bool fp8, bool bf16_scales, bool f32,
                 std::vector<HopperVariant> list) {
    auto* codes = static_cast<uint8_t*>(alloc(static_cast<size_t>(n * k / 2)));
    auto* scales = static_cast<uint16_t*>(alloc(static_cast<size_t>(n * k / 128 * 2)));
    const HopperWeights w =
        weights(n, k, fp8, bf16_scales, static_cast<uint32_t>(n + m), codes, scales);
    void* x = alloc(static_cast<size_t>(m * k * 2));
    auto* x_scale = static_cast<float*>(alloc(static_cast<size_t>(m * 4)));
    make_x<<<1024, 256, 0, stream>>>(x, x_scale, static_cast<size_t>(m * k), static_cast<size_t>(k),
                                     fp8, static_cast<uint32_t>(n * 3 + m));
    const size_t bytes = static_cast<size_t>(m * n * (f32 ? 4 : 2)), guard = 4096;
    auto* out = static_cast<uint8_t*>(alloc(bytes + guard));
    auto* again = static_cast<uint8_t*>(alloc(bytes + guard));
    auto* stats = static_cast<double*>(alloc(64));
    bool good = true;
    if (list.empty()) list.push_back(choose_hopper(w, m, work).variant);
    for (const HopperVariant& v : list) {
      if (!wanted(v)) continue;
      const HopperConfig c = plan_hopper(w, m, work, v);
      CHECK(cudaMemsetAsync(out, 0xff, bytes + guard, stream));
      CHECK(cudaMemsetAsync(again, 0xff, bytes + guard, stream));
      CHECK(cudaMemsetAsync(stats, 0, 64, stream));
      if (!hopper_linear(w, c, x, x_scale, out, m, f32, work, stream)) std::printf("no launch\n");
      CHECK(cudaGetLastError());
      hopper_linear(w, c, x, x_scale, again, m, f32, work, stream);
      const double work_size = static_cast<double>(n) * static_cast<double>(m * k);
      const int64_t stride = std::max<int64_t>(1, static_cast<int64_t>(work_size / 8e9)) * 2 - 1;
      compare<<<1024, 256, 0, stream>>>(codes, scales, bf16_scales, x, x_scale, fp8, out, f32, n, k,
                                        m, stride, stats);
      CHECK(cudaGetLastError());
      CHECK(cudaStreamSynchronize(stream));
      double h[6];
      CHECK(cudaMemcpy(h, stats, 48, cudaMemcpyDeviceToHost));
      std::vector<uint8_t> a(bytes + guard), b(bytes + guard);
      CHECK(cudaMemcpy(a.data(), out, bytes + guard, cudaMemcpyDeviceToHost));
      CHECK(cudaMemcpy(b.data(), again, bytes + guard, cudaMemcpyDeviceToHost));
      const bool same = a == b;
      bool inside = true;
      for (size_t i = bytes; i < bytes + guard; ++i) inside = inside && a[i] == 0xff;
      const double norm = std::sqrt(h[1] / h[2]);
      const bool ok = same && inside && norm < (f32 ? (fp8 ? 1e-3 : 1e-5) : 3e-3) &&
                      h[0] < (f32 ? (fp8 ? 1e-3 : 1e-5) : 1e-2);
      good = good && ok;
      if (!ok || n * k * m > 100000000)
        std::printf(
            "%s %s N %lld K %lld M %lld %s %s: |e|/|y| %.2e, max |e|/sum|t| %.2e mean %.2e "
            "bias %+.2e, %.0f values%s%s%s\n",
            ok ? "ok  " : "BAD ", name(v).c_str(), static_cast<long long>(n),
            static_cast<long long>(k), static_cast<long long>(m), fp8 ? "e4m3" : "bf16",
            f32 ? "f32" : "bf16 out", norm, h[0], h[5] / h[3], h[4] / h[3], h[3],
            same ? "" : " NOT DETERMINISTIC", inside ? "" : " OUT OF BOUNDS",
            c.split_tiles > 0 ? " split" : "");
      std::fflush(stdout);
    }
    free_all();
    return good;
  }

  bool check() {
    bool good = true;
    for (const bool fp8 : {true, false}) {
      if (!fp8 && std::getenv("DROVER_BENCH_FP8") != nullptr) break;
      // The smallest first: a hang or a wrong layout shows here.
      for (const HopperVariant& v : variants(0, true, fp8)) {
        if (!wanted(v)) continue;
        std::printf("%s %s\n", fp8 ? "e4m3" : "bf16", name(v).c_str());
        std::fflush(stdout);
        good = check_one(256, 128, 5, fp8, false, true, {v}) && good;
        good = check_one(512, 1024, 200, fp8, true, true, {v}) && good;
        good = check_one(1096, 3072, 129, fp8, false, false, {v}) && good;
        good = check_one(1001, 384, 300, fp8, false, false, {v}) && good;
        HopperVariant whole = v;
        whole.split = false, whole.dependent = false;
        good = check_one(1096, 1280, 65, fp8, true, false, {whole}) && good;
        if (!good) return false;
      }
      if (std::getenv("DROVER_BENCH_FILTER") != nullptr) continue;
      for (const int64_t m : {1, 2, 3, 17, 64, 129, 1000}) {
        good = check_one(5120, 8192, m, fp8, false, true, {}) && good;
        good = check_one(8192, 28672, m, fp8, true, false, variants(m, false, fp8)) && good;
        good = check_one(10240, 8192, m, fp8, false, true, variants(m, false, fp8)) && good;
      }
    }
    return good;
  }

  // Milliseconds of one of `count` calls, captured; the median of 7 replays.
  double time(int count, const std::function<void(int)>& call, double sustain_s = 0) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < count; ++i) call(i);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    CHECK(cudaEventCreate(&a));
    CHECK(cudaEventCreate(&b));
    std::vector<double> all;
    double spent = 0;
    const size_t least = sustain_s > 0 ? 3 : 9;
    while (all.size() < least || spent < sustain_s * 1e3) {
      CHECK(cudaEventRecord(a, stream));
      CHECK(cudaGraphLaunch(exec, stream));
      CHECK(cudaEventRecord(b, stream));
      CHECK(cudaEventSynchronize(b));
      float ms = 0;
      CHECK(cudaEventElapsedTime(&ms, a, b));
      spent += ms, all.push_back(ms / count);
    }
    // Warm-up, or the time until the clock has settled, goes.
    all.erase(all.begin(), all.begin() + static_cast<int64_t>(sustain_s > 0 ? all.size() / 2 : 2));
    std::nth_element(all.begin(), all.begin() + static_cast<int64_t>(all.size() / 2), all.end());
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    cudaEventDestroy(a), cudaEventDestroy(b);
    return all[all.size() / 2];
  }

  double copy_gb_s = 0;
  void copy() {
    const size_t bytes = size_t{2} << 30;
    void* a = alloc(bytes);
    void* b = alloc(bytes);
    make_codes<<<2048, 256, 0, stream>>>(static_cast<uint8_t*>(a), bytes, 1);
    const double ms = time(
        4, [&](int) { CHECK(cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream)); });
    copy_gb_s = 2.0 * static_cast<double>(bytes) / ms * 1e-6;
    std::printf("copy %.0f GB/s\n", copy_gb_s);
    free_all();
  }

  static constexpr int kCopies = 4;
  HopperWeights layer[kCopies][4];
  void* x = nullptr;
  float* x_scale = nullptr;
  void* out = nullptr;
  void load(bool fp8, int64_t most) {
    auto* codes = static_cast<uint8_t*>(alloc(size_t{57344} * 8192 / 2));
    auto* scales = static_cast<uint16_t*>(alloc(size_t{57344} * 8192 / 64));
    for (int i = 0; i < kCopies; ++i)
      for (int j = 0; j < 4; ++j)
        layer[i][j] = weights(kLayer[j].n, kLayer[j].k, fp8, false,
                              static_cast<uint32_t>(i * 4 + j), codes, scales);
    x = alloc(static_cast<size_t>(most) * 28672 * 2);
    x_scale = static_cast<float*>(alloc(static_cast<size_t>(most) * 4));
    out = alloc(static_cast<size_t>(most) * 57344 * 2);
    make_x<<<2048, 256, 0, stream>>>(x, x_scale, static_cast<size_t>(most) * 28672, 28672, fp8, 9);
    CHECK(cudaStreamSynchronize(stream));
  }
  void report(const std::string& what, int64_t m, double ms) {
    const double bytes = kParameters * (0.5 + 2.0 / 128),
                 flop = 2 * kParameters * static_cast<double>(m);
    std::printf("M %4lld %-26s %8.4f ms %6.0f GB/s %5.1f %% of copy %7.1f TFLOP/s",
                static_cast<long long>(m), what.c_str(), ms, bytes / ms * 1e-6,
                100 * bytes / ms * 1e-6 / copy_gb_s, flop / ms * 1e-9);
  }
  void times(bool fp8, const std::vector<int64_t>& ms) {
    load(fp8, *std::max_element(ms.begin(), ms.end()));
    for (const int64_t m : ms)
      for (HopperVariant v : variants(m, false, fp8)) {
        if (!wanted(v)) continue;
        const auto one = [&](int i, int j) {
          const HopperWeights& w = layer[i % kCopies][j];
          hopper_linear(w, plan_hopper(w, m, work, v), x, x_scale, out, m, false, work, stream);
        };
        const auto four = [&](int i) {
          for (int j = 0; j < 4; ++j) one(i, j);
        };
        const double all = time(kCopies, four);
        report(std::string(fp8 ? "W4A8 " : "W4A16 ") + name(v), m, all);
        std::printf(" each");
        for (int j = 0; j < 4; ++j)
          std::printf(" %.4f", time(kCopies * 2, [&](int i) { one(i, j); }));
        if (m <= 32 || m == 256) {
          v.dependent = false;
          std::printf(" nopdl %.4f", time(kCopies, four));
        }
        std::printf("\n");
        std::fflush(stdout);
      }
    free_all();
  }
  static double seconds() {
    const char* text = std::getenv("DROVER_BENCH_SECONDS");
    return text == nullptr ? 3.0 : std::atof(text);
  }
  const double sustain = seconds();
  void sustained(bool fp8, const std::vector<int64_t>& ms) {
    load(fp8, *std::max_element(ms.begin(), ms.end()));
    for (const int64_t m : ms)
      for (const HopperVariant& v : variants(m, false, fp8)) {
        if (!wanted(v)) continue;
        const double t = time(
            kCopies * 4,
            [&](int i) {
              for (int j = 0; j < 4; ++j) {
                const HopperWeights& w = layer[i % kCopies][j];
                hopper_linear(w, plan_hopper(w, m, work, v), x, x_scale, out, m, false, work,
                              stream);
              }
            },
            sustain);
        char text[128];
        describe(plan_hopper(layer[0][2], m, work, v), text, sizeof text);
        report(fp8 ? "W4A8 sustained" : "W4A16 sustained", m, t);
        std::printf(" (gate_up %s)\n", text);
        std::fflush(stdout);
      }
    free_all();
  }

  // FP8 weights and inputs with a scale a row of either, bf16 out.
  void library(const std::vector<int64_t>& ms, double sustain_s) {
    cublasLtHandle_t handle;
    if (cublasLtCreate(&handle) != CUBLAS_STATUS_SUCCESS)
      return void(std::printf("cuBLASLt does not start\n"));
    const int64_t most = *std::max_element(ms.begin(), ms.end());
    constexpr int kSets = 2;
    constexpr size_t kRoom = size_t{64} << 20;
    void* w[kSets][4];
    for (auto& set : w)
      for (int j = 0; j < 4; ++j) {
        const auto count = static_cast<size_t>(kLayer[j].n * kLayer[j].k);
        set[j] = alloc(count);
        make_x<<<2048, 256, 0, stream>>>(set[j], static_cast<float*>(alloc(count / 16)), count,
                                         8192, true, static_cast<uint32_t>(j));
      }
    void* in = alloc(static_cast<size_t>(most) * 28672);
    auto* scale = static_cast<float*>(alloc(size_t{65536} * 4));
    void* to = alloc(static_cast<size_t>(most) * 57344 * 2);
    void* room = alloc(kRoom);
    make_x<<<2048, 256, 0, stream>>>(in, scale, static_cast<size_t>(most) * 28672, 28672, true, 9);
    std::vector<float> ones(65536, 0.01f);
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(scale, ones.data(), ones.size() * 4, cudaMemcpyHostToDevice));
    for (const int64_t m : ms) {
      if (m % 16 != 0) continue;
      std::unique_ptr<LibraryFp8> way[4];
      for (int j = 0; j < 4; ++j) {
        way[j] = LibraryFp8::make(handle, kLayer[j].n, kLayer[j].k, m, kRoom);
        if (!way[j]) return void(std::printf("cuBLASLt: no way\n"));
      }
      const double t = time(
          kSets * 2,
          [&](int i) {
            for (int j = 0; j < 4; ++j) {
              const cublasStatus_t s =
                  way[j]->run(w[i % kSets][j], scale, in, scale, to, room, stream);
              if (s != CUBLAS_STATUS_SUCCESS)
                std::printf("cuBLASLt: %s\n", cublasLtGetStatusString(s)), std::exit(1);
            }
          },
          sustain_s);
      report(sustain_s > 0 ? "cuBLASLt FP8 sustained" : "cuBLASLt FP8", m, t);
      std::printf("\n");
      std::fflush(stdout);
    }
    free_all();
    cublasLtDestroy(handle);
  }
};

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  Bench b;
  if (mode == "check") {
    const bool good = b.check();
    std::printf(good ? "all good\n" : "BAD\n");
    return good ? 0 : 1;
  }
  std::vector<int64_t> ms;
  for (int i = 2; i < argc; ++i) ms.push_back(std::atoll(argv[i]));
  b.copy();
  if (mode == "time") {
    if (ms.empty()) ms = {1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048};
    if (std::getenv("DROVER_BENCH_FILTER") == nullptr) b.library(ms, 0);
    b.times(true, ms);
    if (std::getenv("DROVER_BENCH_FP8") == nullptr) b.times(false, ms);
  } else if (mode == "sustained") {
    if (ms.empty()) ms = {512, 1024, 2048};
    b.sustained(true, ms);
    if (std::getenv("DROVER_BENCH_FP8") == nullptr) b.sustained(false, ms);
    if (std::getenv("DROVER_BENCH_FILTER") == nullptr) b.library(ms, b.sustain);
  } else if (mode == "library") {
    b.library(ms, b.sustain);
  } else {
    return std::printf("hopper_linear_bench check | time | sustained | library [M...]\n"), 2;
  }
  return 0;
}
