#include "choose_backend.h"

#include <fmt/format.h>

#include <algorithm>

#include "backend/cpu/cpu_backend.h"
#include "backend/tuning.h"
#include "base/log.h"
#ifdef DROVER_HAVE_CUDA
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/cupti_trace.h"
#include "base/trace.h"
#endif

namespace drover {

namespace {

Dtype input_type(const std::string& name) {
  if (name == "bf16") return Dtype::kBf16;
  if (name == "fp8") return Dtype::kFp8E4m3;
  if (name == "f32") return Dtype::kF32;
  DROVER_FAIL(ExitCode::kUsage, "--activations {}: expected auto, bf16, fp8 or f32", name);
}

// Empty where the subcommand has no such option, too.
std::string tuning_file(const Options& options) {
  const auto found = options.values().find("tuning");
  return found == options.values().end() ? "" : found->second;
}

BackendChoice choose_cpu(const Options& options, const PlacedRank& placement, World& world) {
  BackendChoice c;
  DROVER_CHECK(tuning_file(options).empty(), ExitCode::kUsage,
               "--tuning {}: it is of GPUs' kernels, and this runs on the CPU: leave it out",
               tuning_file(options));
  c.threads = static_cast<int>(options.integer("threads", 0, 4096));
  if (c.threads == 0) c.threads = placement.mine.threads;
  c.load_threads = std::min(4, c.threads);
  c.activations = options.text("activations");
  if (c.activations == "auto") c.activations = "bf16";
  c.backend = make_cpu_backend({.linear_type = input_type(c.activations), .threads = c.threads});
  c.make_comm = [&world](Interrupt& i, Progress* p, double s) { return world.make_comm(i, p, s); };
  return c;
}

#ifdef DROVER_HAVE_CUDA

Tuning tuning_of(const Options& options, const std::string& gpu) {
  const std::string file = tuning_file(options);
  if (file.empty()) return {};
  Tuning t = read_tuning(file);
  check_gpu(t, file, gpu);
  log::info("linears run as {} says: {} choices for {}", file, t.choices.size(), t.gpu);
  return t;
}

BackendChoice choose_cuda(const Options& options, const PlacedRank& placement, World& world) {
  BackendChoice c;
  c.gpu = true;
  const int device = placement.device;
  c.load_threads = std::clamp(placement.mine.threads / 2, 1, 8);
  c.activations = options.text("activations");
  // W4A8 needs FP8 tensor cores that keep codes exact: Hopper.
  if (c.activations == "auto") c.activations = cuda_capability(device) >= 90 ? "fp8" : "bf16";
  const Dtype inputs = input_type(c.activations);
  DROVER_CHECK(inputs != Dtype::kF32, ExitCode::kUsage,
               "--activations f32 is the CPU's: a GPU has bf16 and fp8");
  c.gpu_name = cuda_device_name(device);
  c.backend = make_cuda_backend(
      {.device = device, .inputs = inputs, .tuning = tuning_of(options, c.gpu_name)});
  void* const stream = c.backend->stream();
  c.make_comm = [&world, shared = placement.gpu_shared, stream](Interrupt& i, Progress* p,
                                                                double s) {
    return shared ? world.make_staged_comm(i, p, s, stream) : world.make_nccl_comm(i, p, s, stream);
  };
  return c;
}

#endif

}  // namespace

BackendChoice choose_backend(const Options& options, const PlacedRank& placement, World& world) {
#ifdef DROVER_HAVE_CUDA
  if (placement.gpu) return choose_cuda(options, placement, world);
#endif
  return choose_cpu(options, placement, world);
}

void end_device_trace() {
#ifdef DROVER_HAVE_CUDA
  if (trace::on()) cuda::stop_device_trace();
#endif
}

std::string backend_versions() {
#ifdef DROVER_HAVE_CUDA
  return "cpu, cuda";
#else
  return "cpu";
#endif
}

}  // namespace drover
