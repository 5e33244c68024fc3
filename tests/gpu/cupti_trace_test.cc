// The trace has a span for every kernel of a graph replay, in the steady clock.
#include "backend/cuda/cupti_trace.h"

#include <gtest/gtest.h>

#include <iostream>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device_weights.h"
#include "base/json.h"
#include "base/trace.h"

namespace drover::cuda {
namespace {

TEST(DeviceTrace, SeesKernelsInsideOfAGraph) {
  trace::start();
  // Before the first CUDA call.
  const std::string why = start_device_trace();
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) GTEST_SKIP() << "no GPU here";
  if (!why.empty()) GTEST_SKIP() << "no CUPTI: " << why;
  constexpr int kKernels = 5, kReplays = 3;
  cudaStream_t s = nullptr;
  DROVER_CUDA(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
  void* memory = nullptr;
  DROVER_CUDA(cudaMalloc(&memory, size_t{64} << 20));
  const RandomMatrix m{.rows = 8192, .cols = 8192, .all_cols = 8192, .bits = 4};
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  DROVER_CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kKernels; ++i) make_random(m, memory, s);
  DROVER_CUDA(cudaStreamEndCapture(s, &graph));
  DROVER_CUDA(cudaGraphInstantiate(&replay, graph, 0));
  const int64_t begin = trace::now_ns();
  for (int i = 0; i < kReplays; ++i) DROVER_CUDA(cudaGraphLaunch(replay, s));
  DROVER_CUDA(cudaStreamSynchronize(s));
  const int64_t end = trace::now_ns();
  flush_device_trace();
  const Json events = Json::parse(fmt::format("[{}]", trace::take_json_events(0, 0)));
  int kernels = 0;
  double busy = 0;
  for (const auto& e : events) {
    if (e.value("cat", "") != "kernel") continue;
    ++kernels;
    EXPECT_TRUE(e["name"].get<std::string>().starts_with("make_random_kernel<4>(RandomMatrix"))
        << e["name"];
    EXPECT_NE(e["args"]["graph"], 0);
    // CUPTI fits the GPU's clock to the host's: to some microseconds.
    EXPECT_GE(e["ts"].get<double>() * 1000, static_cast<double>(begin) - 20e3);
    EXPECT_LE((e["ts"].get<double>() + e["dur"].get<double>()) * 1000,
              static_cast<double>(end) + 20e3);
    busy += e["dur"].get<double>();
  }
  EXPECT_EQ(kernels, kKernels * kReplays);
  std::cout << kernels << " kernels, " << busy << " us of "
            << static_cast<double>(end - begin) / 1e3 << " us on the host's clock\n";
  stop_device_trace();
  trace::stop();
  cudaGraphExecDestroy(replay);
  cudaGraphDestroy(graph);
  cudaFree(memory);
  cudaStreamDestroy(s);
}

}  // namespace
}  // namespace drover::cuda
