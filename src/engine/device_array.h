// A typed device buffer with an owner.
#pragma once

#include <span>
#include <string_view>
#include <utility>

#include "backend/backend.h"

namespace drover {

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(Backend& backend, size_t count, std::string_view purpose)
      : backend_(&backend),
        data_(static_cast<T*>(backend.alloc((count ? count : 1) * sizeof(T), purpose))),
        count_(count) {}
  DeviceArray(DeviceArray&& o) noexcept { *this = std::move(o); }
  DeviceArray& operator=(DeviceArray&& o) noexcept {
    std::swap(backend_, o.backend_);
    std::swap(data_, o.data_);
    std::swap(count_, o.count_);
    return *this;
  }
  ~DeviceArray() {
    if (data_ != nullptr) backend_->free(data_);
  }
  T* data() const { return data_; }
  size_t size() const { return count_; }
  void upload(std::span<const T> host, size_t at = 0) const {
    if (!host.empty()) {
      backend_->copy_in(data_ + at, host.data(), host.size_bytes(), backend_->stream());
    }
  }

 private:
  Backend* backend_ = nullptr;
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace drover
