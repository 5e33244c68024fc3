// A build without NCCL.
#include "base/error.h"
#include "comm/gpu_comm.h"
#include "comm/world.h"

namespace drover {

bool has_nccl() { return false; }
std::string nccl_version() { return "none"; }
void abort_all_nccl(double) noexcept {}
std::string nccl_async_error() noexcept { return {}; }
void prepare_nccl_environment() {}

std::unique_ptr<Comm> make_nccl_comm(const NcclPlace& place, Interrupt&, Progress*,
                                     const std::function<void(void*, size_t)>&) {
  if (place.size == 1) return make_solo_comm();
  DROVER_FAIL(ExitCode::kEnvironment,
              "this drover was built without NCCL, which {} GPU ranks need: install NCCL 2.18 or "
              "later with its nccl.h and build with -DDROVER_CUDA=ON again",
              place.size);
}

}  // namespace drover
