// The rows of a step on the device: one buffer, one upload.
#pragma once

#include <vector>

#include "engine/device_array.h"
#include "engine/slots.h"

namespace drover {

class StepArrays {
 public:
  StepArrays(Backend& backend, int32_t max_rows);
  // Of the device's buffer.
  static size_t bytes(int32_t rows) {
    return (6 * static_cast<size_t>(rows) + 1) * sizeof(int32_t) + static_cast<size_t>(rows);
  }

  // Fills and uploads the arrays of `rows` rows, those past the layout's as padding: a slot of -1,
  // which samples nothing. Addresses depend on `rows` alone, so that a replayed step finds them.
  void upload(const StepLayout& layout, int32_t rows);

  const int32_t* row_slot() const { return at(0); }
  const int32_t* row_position() const { return at(1); }
  const int32_t* select() const { return at(2); }       // rows whose best token is sampled
  const int32_t* sample_slot() const { return at(3); }  // where that token belongs, -1: nowhere
  const int32_t* sample_position() const { return at(4); }
  const int32_t* chunk_row() const { return at(5); }  // [chunks + 1]
  const uint8_t* forbid_eos() const { return reinterpret_cast<const uint8_t*>(at(6) + 1); }

 private:
  const int32_t* at(int32_t array) const {
    return reinterpret_cast<const int32_t*>(device_.data()) + array * int64_t{rows_};
  }

  DeviceArray<std::byte> device_;
  std::vector<std::byte> host_;
  int32_t rows_ = 0;
};

}  // namespace drover
