#include "base/formats.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "base/error.h"

namespace drover {
namespace {

struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool infinities;  // IEEE; else e4m3fn: only the all-ones code is NaN
};
constexpr Format kFp8{4, 3, 7, false};
constexpr Format kF16{5, 10, 15, true};
constexpr Format kBf16{8, 7, 127, true};

// By the definition, in doubles.
double value_of(const Format& f, int code) {
  const int top = (1 << f.exponent_bits) - 1;
  const int mantissa = code & ((1 << f.mantissa_bits) - 1);
  const int exponent = (code >> f.mantissa_bits) & top;
  const double sign = (code >> (f.exponent_bits + f.mantissa_bits)) & 1 ? -1.0 : 1.0;
  if (f.infinities && exponent == top) {
    return mantissa == 0 ? sign * INFINITY : std::nan("");
  }
  if (!f.infinities && exponent == top && mantissa == (1 << f.mantissa_bits) - 1) {
    return std::nan("");
  }
  const double fraction = std::ldexp(mantissa, -f.mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - f.bias);
  return sign * std::ldexp(1.0 + fraction, exponent - f.bias);
}

template <typename Decode>
void check_decoding(const Format& f, int codes, Decode decode) {
  for (int code = 0; code < codes; ++code) {
    const double want = value_of(f, code);
    const double got = decode(code);
    if (std::isnan(want)) {
      ASSERT_TRUE(std::isnan(got)) << code;
    } else {
      ASSERT_EQ(got, want) << code;
      ASSERT_EQ(std::signbit(got), std::signbit(want)) << code;
    }
  }
}

// Between each finite code c and c + 1: the midpoint goes to the even code, its float neighbours
// to the nearer one. `finite` is the largest finite code.
template <typename Encode>
void check_rounding(const Format& f, int finite, Encode encode) {
  const int sign_bit = 1 << (f.exponent_bits + f.mantissa_bits);
  for (int sign : {0, sign_bit}) {
    for (int c = 0; c <= finite; ++c) {
      ASSERT_EQ(encode(static_cast<float>(value_of(f, c | sign))), c | sign);
      if (c == finite) break;
      const double mid = (value_of(f, c | sign) + value_of(f, (c + 1) | sign)) / 2;
      const auto at = static_cast<float>(mid);
      // bf16's lowest midpoint is a float subnormal still, so every midpoint is a float.
      ASSERT_EQ(static_cast<double>(at), mid) << c;
      ASSERT_EQ(encode(at), (c % 2 == 0 ? c : c + 1) | sign) << c;
      const float away = sign ? -INFINITY : INFINITY;
      ASSERT_EQ(encode(std::nextafter(at, 0.0f)), c | sign) << c;
      ASSERT_EQ(encode(std::nextafter(at, away)), (c + 1) | sign) << c;
    }
  }
}

TEST(Fp8, AllCodesMeanWhatTheDefinitionSays) {
  check_decoding(kFp8, 256, [](int c) { return fp8_to_float(static_cast<uint8_t>(c)); });
  check_decoding(kFp8, 256, [](int c) { return fp8_table()[c]; });
  EXPECT_EQ(fp8_to_float(0x7e), 448.0f);
  EXPECT_EQ(fp8_to_float(0x01), std::ldexp(1.0f, -9));
}

TEST(Fp8, RoundsToNearestEvenEverywhere) { check_rounding(kFp8, 0x7e, fp8_from_float); }

TEST(Fp8, SaturatesAndKeepsNan) {
  for (float x : {448.0f, 449.0f, 463.9f, 464.0f, 465.0f, 480.0f, 1e6f, 3.4e38f, INFINITY}) {
    EXPECT_EQ(fp8_from_float(x), 0x7e) << x;
    EXPECT_EQ(fp8_from_float(-x), 0xfe) << x;
  }
  EXPECT_EQ(fp8_from_float(std::nanf("")) & 0x7f, 0x7f);
  EXPECT_EQ(fp8_from_float(-std::nanf("")) & 0x7f, 0x7f);
  EXPECT_EQ(fp8_from_float(0.0f), 0x00);
  EXPECT_EQ(fp8_from_float(-0.0f), 0x80);
  EXPECT_EQ(fp8_from_float(std::ldexp(1.0f, -10)), 0x00);  // half the smallest: to even
  EXPECT_EQ(fp8_from_float(std::ldexp(1.001f, -10)), 0x01);
  EXPECT_EQ(fp8_from_float(std::ldexp(3.0f, -10)), 0x02);
  EXPECT_EQ(fp8_from_float(std::numeric_limits<float>::denorm_min()), 0x00);
}

TEST(Fp8, RandomFloatsGoToTheNearestCode) {
  std::vector<double> values;
  for (int c = 0; c <= 0x7e; ++c) values.push_back(value_of(kFp8, c));
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = std::ldexp(static_cast<float>(random() % 65536) / 65536.0f + 1e-9f,
                               static_cast<int>(random() % 24) - 13);
    const double got = fp8_to_float(fp8_from_float(x));
    double best = INFINITY;
    for (double v : values) best = std::min(best, std::abs(v - x));
    ASSERT_EQ(std::abs(got - x), best) << x;
  }
}

TEST(F16, AllCodesAndMidpoints) {
  check_decoding(kF16, 65536, [](int c) { return f16_to_float(static_cast<uint16_t>(c)); });
  check_rounding(kF16, 0x7bff, f16_from_float);
  EXPECT_EQ(f16_from_float(65519.99f), 0x7bff);
  EXPECT_EQ(f16_from_float(65520.0f), 0x7c00);
  EXPECT_EQ(f16_from_float(-1e30f), 0xfc00);
  EXPECT_EQ(f16_from_float(INFINITY), 0x7c00);
  EXPECT_TRUE(std::isnan(f16_to_float(f16_from_float(std::nanf("")))));
}

TEST(Bf16, AllCodesAndMidpoints) {
  check_decoding(kBf16, 65536, [](int c) { return bf16_to_float(static_cast<uint16_t>(c)); });
  check_rounding(kBf16, 0x7f7f, bf16_from_float);
  EXPECT_EQ(bf16_from_float(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(bf16_from_float(-INFINITY), 0xff80);
  // A NaN whose payload lies in the lower half must not become infinity.
  EXPECT_TRUE(std::isnan(bf16_to_float(bf16_from_float(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Dequantize, Int4OfEveryZeroKind) {
  for (ZeroKind zero : {ZeroKind::kSymmetric, ZeroKind::kZeroPoints, ZeroKind::kMinimums}) {
    for (Dtype scale : {Dtype::kF16, Dtype::kBf16}) {
      WeightTensor w;
      w.format = WeightFormat::kInt4;
      w.rows = 2;
      w.cols = 64;
      w.group = 32;
      w.zero = zero;
      w.scale_dtype = scale;
      for (int i = 0; i < 64; ++i) w.codes.push_back(static_cast<uint8_t>(i * 37 + 11));
      const auto bits = scale == Dtype::kF16 ? f16_from_float : bf16_from_float;
      for (float s : {0.5f, 0.25f, 2.0f, -1.0f}) w.scales.push_back(bits(s));
      if (zero == ZeroKind::kZeroPoints) w.zeros = {0, 7, 8, 16};
      if (zero == ZeroKind::kMinimums) {
        for (float m : {-4.0f, 1.5f, 0.0f, 3.0f}) w.minimums.push_back(bits(m));
      }
      const double scales[] = {0.5, 0.25, 2.0, -1.0};
      const double zeros[] = {0, 7, 8, 16};
      const double minimums[] = {-4.0, 1.5, 0.0, 3.0};
      for (int row = 0; row < 2; ++row) {
        std::vector<float> out(64);
        dequantize_row(w, row, out);
        for (int j = 0; j < 64; ++j) {
          const int byte = w.codes[row * 32 + j / 2];
          const double q = j % 2 ? byte / 16 : byte % 16;
          const int g = row * 2 + j / 32;
          const double want = zero == ZeroKind::kSymmetric    ? scales[g] * (q - 8)
                              : zero == ZeroKind::kZeroPoints ? scales[g] * (q - zeros[g])
                                                              : scales[g] * q + minimums[g];
          ASSERT_EQ(out[j], want) << row << ' ' << j;
        }
      }
    }
  }
}

TEST(Dequantize, Int8AndFloats) {
  WeightTensor w;
  w.format = WeightFormat::kInt8;
  w.rows = 1;
  w.cols = 32;
  w.group = 32;
  for (int i = 0; i < 32; ++i) w.codes.push_back(static_cast<uint8_t>(i * 8 - 128));
  w.scales = {f16_from_float(0.125f)};
  std::vector<float> out(32);
  dequantize_row(w, 0, out);
  for (int i = 0; i < 32; ++i) EXPECT_EQ(out[i], (i * 8 - 128) * 0.125f);

  const std::vector<float> values{0.0f, -1.5f, 3.0f, 1024.0f};
  for (WeightFormat f : {WeightFormat::kF32, WeightFormat::kF16, WeightFormat::kBf16}) {
    WeightTensor t;
    t.format = f;
    t.rows = 2;
    t.cols = 2;
    for (float v : values) {
      uint32_t bits = std::bit_cast<uint32_t>(v);
      int bytes = 4;
      if (f != WeightFormat::kF32) {
        bits = f == WeightFormat::kF16 ? f16_from_float(v) : bf16_from_float(v);
        bytes = 2;
      }
      for (int b = 0; b < bytes; ++b) t.codes.push_back(static_cast<uint8_t>(bits >> (8 * b)));
    }
    std::vector<float> row(2);
    dequantize_row(t, 1, row);
    EXPECT_EQ(row, (std::vector<float>{3.0f, 1024.0f})) << to_string(f);
    EXPECT_THROW(dequantize_row(t, 2, row), Error);
    EXPECT_THROW(dequantize_row(t, 0, out), Error);
  }
}

}  // namespace
}  // namespace drover
