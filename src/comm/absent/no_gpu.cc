// A build without CUDA.
#include "base/error.h"
#include "comm/device.h"
#include "comm/gpu_comm.h"

namespace drover {

namespace {
[[noreturn]] void fail() {
  DROVER_FAIL(ExitCode::kEnvironment,
              "this drover was built without CUDA: build it with -DDROVER_CUDA=ON for GPU ranks");
}
}  // namespace

int comm_gpu_count() noexcept { return 0; }
std::unique_ptr<CommDevice> make_gpu_device(int, const Interrupt&, double) { fail(); }
std::unique_ptr<Comm> make_solo_comm() { fail(); }
std::unique_ptr<Comm> make_staged_comm(std::unique_ptr<Comm>, Interrupt&, double,
                                       const std::function<void()>&) {
  fail();
}

}  // namespace drover
