#include <cstdlib>
#include <cstring>
#include <new>

#include "comm/device.h"

namespace drover {

namespace {

class HostDevice final : public CommDevice {
 public:
  std::string name() const override { return "cpu"; }
  void* stream() override { return nullptr; }
  void* alloc(size_t bytes) override {
    void* p = std::calloc(bytes == 0 ? 1 : bytes, 1);
    if (p == nullptr) throw std::bad_alloc();
    return p;
  }
  void free(void* p) noexcept override { std::free(p); }
  void copy_in(void* device, const void* host, size_t bytes) override {
    std::memcpy(device, host, bytes);
  }
  void copy_out(void* host, const void* device, size_t bytes) override {
    std::memcpy(host, device, bytes);
  }
  double time(const std::function<void()>& calls) override {
    const auto begin = Clock::now();
    calls();
    return std::chrono::duration<double, std::micro>(Clock::now() - begin).count();
  }
  std::function<void()> record(const std::function<void()>&) override { return nullptr; }
};

}  // namespace

std::unique_ptr<CommDevice> make_host_device() { return std::make_unique<HostDevice>(); }

}  // namespace drover
