#include "base/formats.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace drover {
namespace {

constexpr uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
constexpr float float_of(uint32_t u) { return std::bit_cast<float>(u); }

constexpr std::array<float, 256> make_fp8_table() {
  std::array<float, 256> t{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    float v = exponent == 0 ? static_cast<float>(mantissa) : static_cast<float>(8 + mantissa);
    const int power = (exponent == 0 ? 1 : exponent) - 7 - 3;
    for (int i = 0; i < power; ++i) v *= 2.0f;
    for (int i = 0; i > power; --i) v *= 0.5f;
    if ((code & 0x7f) == 0x7f) v = float_of(0x7fc00000u);
    t[code] = (code & 0x80) ? float_of(bits_of(v) | 0x80000000u) : v;
  }
  return t;
}
constexpr std::array<float, 256> kFp8 = make_fp8_table();

}  // namespace

uint8_t fp8_from_float(float x) noexcept {
  const uint32_t u = bits_of(x);
  const uint8_t sign = static_cast<uint8_t>((u >> 24) & 0x80);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7f;
  if (a >= bits_of(448.0f)) return sign | 0x7e;
  if (a < bits_of(0x1p-6f)) {
    // Added to 2^14, whose last place is worth 2^-9, the value is rounded by the hardware.
    return sign | static_cast<uint8_t>(bits_of(float_of(a) + 0x1p14f) - bits_of(0x1p14f));
  }
  a += 0x7ffffu + ((a >> 20) & 1);
  return sign | static_cast<uint8_t>((a >> 20) - ((127 - 7) << 3));
}

float fp8_to_float(uint8_t code) noexcept { return kFp8[code]; }
const float* fp8_table() noexcept { return kFp8.data(); }

uint16_t bf16_from_float(float x) noexcept {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

float bf16_to_float(uint16_t bits) noexcept { return float_of(uint32_t{bits} << 16); }

uint16_t f16_from_float(float x) noexcept {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return sign | 0x7e00 | static_cast<uint16_t>((a >> 13) & 0x3ff);
  if (a >= bits_of(65520.0f)) return sign | 0x7c00;
  if (a < bits_of(0x1p-14f)) {
    return sign | static_cast<uint16_t>(bits_of(float_of(a) + 0.5f) - bits_of(0.5f));
  }
  a += 0xfffu + ((a >> 13) & 1);
  return sign | static_cast<uint16_t>((a >> 13) - ((127 - 15) << 10));
}

float f16_to_float(uint16_t bits) noexcept {
  const uint32_t sign = (uint32_t{bits} & 0x8000u) << 16;
  const uint32_t a = (uint32_t{bits} & 0x7fffu) << 13;
  if ((bits & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000u | a);
  // The multiplication moves the exponent and normalizes subnormals, exactly.
  return float_of(sign | bits_of(float_of(a) * 0x1p112f));
}

namespace {

float scale_to_float(Dtype t, uint16_t bits) {
  return t == Dtype::kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
}

void dequantize_groups(const WeightTensor& w, int64_t row, float* out) {
  const int64_t groups = w.cols / w.group;
  const bool int4 = w.format == WeightFormat::kInt4;
  const uint8_t* codes = w.codes.data() + row * (int4 ? w.cols / 2 : w.cols);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t at = row * groups + g;
    const float scale = scale_to_float(w.scale_dtype, w.scales[at]);
    float zero = int4 ? 8.0f : 0.0f;
    float minimum = 0.0f;
    if (w.zero == ZeroKind::kZeroPoints) zero = w.zeros[at];
    if (w.zero == ZeroKind::kMinimums) {
      zero = 0.0f;
      minimum = scale_to_float(w.scale_dtype, w.minimums[at]);
    }
    for (int64_t j = g * w.group; j < (g + 1) * w.group; ++j) {
      const float q = int4 ? static_cast<float>((codes[j / 2] >> (j % 2 * 4)) & 15)
                           : static_cast<float>(static_cast<int8_t>(codes[j]));
      out[j] = scale * (q - zero) + minimum;
    }
  }
}

}  // namespace

void dequantize_row(const WeightTensor& w, int64_t row, std::span<float> out) {
  DROVER_CHECK_EQ(static_cast<int64_t>(out.size()), w.cols);
  DROVER_CHECK(row >= 0 && row < w.rows, ExitCode::kInternal, "row {} of {} rows", row, w.rows);
  switch (w.format) {
    case WeightFormat::kInt4:
    case WeightFormat::kInt8:
      dequantize_groups(w, row, out.data());
      return;
    case WeightFormat::kF32:
      std::memcpy(out.data(), w.codes.data() + row * w.cols * 4, w.cols * 4);
      return;
    case WeightFormat::kF16:
    case WeightFormat::kBf16:
      for (int64_t j = 0; j < w.cols; ++j) {
        uint16_t bits;
        std::memcpy(&bits, w.codes.data() + (row * w.cols + j) * 2, 2);
        out[j] = w.format == WeightFormat::kBf16 ? bf16_to_float(bits) : f16_to_float(bits);
      }
      return;
  }
}

}  // namespace drover
