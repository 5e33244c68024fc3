// Found before tests/ops/reference.h when the operation tests are built for the GPU. What differs
// is what a weight is there: quantized ones are exact, float ones are rounded to bf16.
#pragma once

#define weight stored_weight
#include "../../ops/reference.h"
#undef weight

namespace drover::reference {

inline double weight(const WeightTensor& w, int64_t row, int64_t col) {
  const double x = stored_weight(w, row, col);
  const bool codes = w.format == WeightFormat::kInt4 || w.format == WeightFormat::kInt8;
  return codes ? x : round_bf16(x);
}

}  // namespace drover::reference
