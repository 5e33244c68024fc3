#include "engine/step_arrays.h"

#include <algorithm>

namespace drover {

StepArrays::StepArrays(Backend& backend, int32_t max_rows)
    : device_(backend, bytes(max_rows), "step rows"), host_(bytes(max_rows)) {}

void StepArrays::upload(const StepLayout& layout, int32_t rows) {
  rows_ = rows;
  auto* const ints = reinterpret_cast<int32_t*>(host_.data());
  const auto array = [&](int32_t i) { return ints + i * int64_t{rows}; };
  const auto padding = static_cast<size_t>(rows - layout.rows());
  std::fill_n(std::copy(layout.row_slot.begin(), layout.row_slot.end(), array(0)), padding, -1);
  std::fill_n(std::copy(layout.row_position.begin(), layout.row_position.end(), array(1)), padding,
              0);
  int32_t* const chunk_row = array(5);
  const auto chunks = layout.chunk_row.size();
  std::copy(layout.chunk_row.begin(), layout.chunk_row.end(), chunk_row);
  for (size_t i = 0; i < padding; ++i) {
    chunk_row[chunks + i] = layout.rows() + static_cast<int32_t>(i) + 1;
  }
  auto* const forbid = reinterpret_cast<uint8_t*>(array(6) + 1);
  size_t n = 0;
  for (const WantedRow& w : layout.wanted) {
    array(2)[n] = w.row;
    array(3)[n] = w.slot;
    array(4)[n] = w.position;
    forbid[n++] = w.first ? 1 : 0;
  }
  for (; n < static_cast<size_t>(rows); ++n) {
    array(2)[n] = 0;
    array(3)[n] = -1;
    array(4)[n] = 0;
    forbid[n] = 0;
  }
  device_.upload(std::span<const std::byte>(host_).first(bytes(rows)));
}

}  // namespace drover
