// Which device a rank computes on, and what its communicators go over. The one place that knows
// that there is more than one backend.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "backend/backend.h"
#include "base/options.h"
#include "choose_placement.h"
#include "comm/world.h"

namespace drover {

struct BackendChoice {
  std::unique_ptr<Backend> backend;
  std::string activations;  // inputs of linears: "bf16", "fp8", "f32"
  int threads = 1;          // of a CPU rank
  int load_threads = 1;     // that read and check weights ahead
  bool gpu = false;
  std::string gpu_name;  // "NVIDIA H100 80GB HBM3"; empty on the CPU
  // The communicator over all ranks for device memory.
  std::function<std::unique_ptr<Comm>(Interrupt&, Progress*, double seconds)> make_comm;
};

// --activations and --threads, on the device and cores of the placement. Throws kUsage or
// kEnvironment.
BackendChoice choose_backend(const Options& options, const PlacedRank& placement, World& world);

// Hands what the device recorded to base/trace. With the device idle.
void end_device_trace();

// Libraries of the backends in this build, for `drover --version`.
std::string backend_versions();

}  // namespace drover
