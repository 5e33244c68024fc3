// Number formats: FP8 e4m3 (OCP "e4m3fn"), bfloat16, IEEE half; and expansion of weight tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/dtype.h"

namespace drover {

// FP8 e4m3, OCP 8-bit floating point specification 1.0: bias 7, no infinities, NaN = S.1111.111,
// largest 448, smallest subnormal 2^-9. Rounds to nearest even; saturates to +-448; NaN stays NaN.
uint8_t fp8_from_float(float x) noexcept;
float fp8_to_float(uint8_t code) noexcept;
// The 256 values, for table look-up.
const float* fp8_table() noexcept;

// bfloat16: round to nearest even; NaN stays NaN.
uint16_t bf16_from_float(float x) noexcept;
float bf16_to_float(uint16_t bits) noexcept;

// IEEE binary16: round to nearest even, subnormals kept, overflow to infinity.
uint16_t f16_from_float(float x) noexcept;
float f16_to_float(uint16_t bits) noexcept;

// out [cols]: row `row` of `w` as 32-bit floats, in stored column order (permutation not applied).
void dequantize_row(const WeightTensor& w, int64_t row, std::span<float> out);

}  // namespace drover
