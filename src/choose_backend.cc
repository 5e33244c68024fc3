#include "choose_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "base/host.h"
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

BackendChoice choose_cpu(const Options& options, World& world) {
  BackendChoice c;
  c.threads = static_cast<int>(options.integer("threads", 0, 4096));
  if (c.threads == 0) {
    // mpirun may have bound each rank to cores of its own, or let all of them use every core.
    c.threads = std::min(usable_cores(), std::max(1, host_cores() / world.local_size()));
  }
  c.load_threads = std::min(4, c.threads);
  c.activations = options.text("activations");
  if (c.activations == "auto") c.activations = "bf16";
  c.backend = make_cpu_backend({.linear_type = input_type(c.activations), .threads = c.threads});
  c.make_comm = [&world](Interrupt& i, Progress* p, double s) { return world.make_comm(i, p, s); };
  return c;
}

#ifdef DROVER_HAVE_CUDA

struct GpuClaim {
  char id[40];  // UUID of the GPU this rank takes
};

// Ranks of a host take its GPUs in order. A rank that sees one GPU only takes that.
int choose_gpu(const Options& options, World& world, Interrupt& interrupt, bool& shared) {
  const int count = cuda_device_count();
  const bool share = options.flag("share-gpu");
  DROVER_CHECK(count == 1 || share || world.local_size() <= count, ExitCode::kUsage,
               "{} ranks on host {}, which has {} GPUs: start as many ranks a host as it has GPUs "
               "(mpirun --map-by ppr:{}:node), or say --share-gpu (slow: their communication "
               "goes through the host's memory)",
               world.local_size(), world.peers()[static_cast<size_t>(world.rank())].host, count,
               count);
  const int device = world.local_rank() % count;
  GpuClaim mine{};
  const std::string id = cuda_device_uuid(device);
  std::memcpy(mine.id, id.data(), std::min(id.size(), sizeof(mine.id)));
  std::vector<GpuClaim> claims(static_cast<size_t>(world.size()));
  world.make_comm(interrupt, nullptr, 120)->all_gather(&mine, claims.data(), sizeof(mine), nullptr);
  const auto& peers = world.peers();
  shared = false;
  for (size_t a = 0; a < claims.size(); ++a) {
    for (size_t b = a + 1; b < claims.size(); ++b) {
      if (peers[a].host != peers[b].host || std::memcmp(&claims[a], &claims[b], sizeof(mine)) != 0)
        continue;
      DROVER_CHECK(share, ExitCode::kUsage,
                   "ranks {} and {} would share the GPU {} of host {}: give each rank a GPU of its "
                   "own (fewer ranks, or the launcher's GPU binding), or say --share-gpu (slow: "
                   "their communication goes through the host's memory)",
                   a, b, std::string(claims[a].id, strnlen(claims[a].id, sizeof(mine))),
                   peers[a].host);
      shared = true;
    }
  }
  return device;
}

BackendChoice choose_cuda(const Options& options, World& world, Interrupt& interrupt) {
  BackendChoice c;
  c.gpu = true;
  bool shared = false;
  const int device = choose_gpu(options, world, interrupt, shared);
  c.load_threads = std::clamp(usable_cores() / world.local_size() / 2, 1, 8);
  c.activations = options.text("activations");
  // W4A8 needs FP8 tensor cores that keep codes exact: Hopper.
  if (c.activations == "auto") c.activations = cuda_capability(device) >= 90 ? "fp8" : "bf16";
  const Dtype inputs = input_type(c.activations);
  DROVER_CHECK(inputs != Dtype::kF32, ExitCode::kUsage,
               "--activations f32 is the CPU's: a GPU has bf16 and fp8");
  c.backend = make_cuda_backend({.device = device, .inputs = inputs});
  void* const stream = c.backend->stream();
  c.make_comm = [&world, shared, stream](Interrupt& i, Progress* p, double s) {
    return shared ? world.make_staged_comm(i, p, s, stream) : world.make_nccl_comm(i, p, s, stream);
  };
  return c;
}

#endif

}  // namespace

BackendChoice choose_backend(const Options& options, World& world,
                             [[maybe_unused]] Interrupt& interrupt) {
  const std::string name = options.text("backend");
  DROVER_CHECK(name == "auto" || name == "cpu" || name == "cuda", ExitCode::kUsage,
               "--backend {}: expected auto, cpu or cuda", name);
  if (name == "cpu") return choose_cpu(options, world);
#ifdef DROVER_HAVE_CUDA
  // Before the first call of CUDA, so that all of it is seen.
  if (trace::on()) {
    const std::string unseen = cuda::start_device_trace();
    if (!unseen.empty()) log::warn("{}: the trace has whole steps of the GPU only", unseen);
  }
  // All ranks alike: a host without a GPU decides for everybody.
  const std::string problem = cuda_problem();
  const bool everywhere = world.agree_min(problem.empty() ? 1 : 0, interrupt, 120) == 1;
  if (everywhere) return choose_cuda(options, world, interrupt);
  const std::string why =
      problem.empty() ? "a rank on another host has no usable GPU (its log says why)" : problem;
  DROVER_CHECK(name == "auto", ExitCode::kEnvironment, "--backend cuda: {}", why);
  log::info("--backend auto takes the CPU: {}", why);
#else
  DROVER_CHECK(name == "auto", ExitCode::kUsage,
               "--backend cuda: this build has the cpu backend only (cmake said why: it found no "
               "CUDA, or no NCCL)");
#endif
  return choose_cpu(options, world);
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
