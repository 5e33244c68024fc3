// Element types, and the host-side form of a weight tensor.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace drover {

enum class Dtype : uint8_t { kF32, kF16, kBf16, kFp8E4m3, kI32, kI8, kU8 };

constexpr size_t dtype_bytes(Dtype t) {
  switch (t) {
    case Dtype::kF32:
    case Dtype::kI32:
      return 4;
    case Dtype::kF16:
    case Dtype::kBf16:
      return 2;
    default:
      return 1;
  }
}

enum class WeightFormat : uint8_t { kInt4, kInt8, kF16, kBf16, kF32 };

// How a code q becomes a weight, s the scale of its group:
//   kSymmetric   w = s * (q - 8)        (int4)     w = s * q   (int8)
//   kZeroPoints  w = s * (q - z)        z an integer per group, 0..16
//   kMinimums    w = s * q + m          m a 16-bit float per group (GGUF Q4_1)
enum class ZeroKind : uint8_t { kSymmetric, kZeroPoints, kMinimums };

// Instead of bytes: how those of a symmetric tensor (or of a float one) follow from a seed, so that
// a device can make them itself. Element (r, c) of the tensor takes random byte
//   i = (row_begin + r) * all_cols + col_begin + c
// and is elements[byte]; the scale of (r, g) takes byte i / group of the stream of ~seed in the
// same way and is scales[byte]. Byte i of a stream is byte i % 8, from the lowest, of
// splitmix64(seed + i / 8) (model/synthetic.cc). Column bounds lie on group bounds.
struct WeightRecipe {
  uint64_t seed = 0;
  int64_t row_begin = 0, col_begin = 0;  // of the tensor in the whole one
  int64_t all_cols = 0;                  // of the whole one
  // Nothing is made: another replica's bytes will be put into the device's memory.
  bool awaited = false;
  std::array<uint32_t, 256> elements{};  // bit patterns: a code, or a float of the format
  std::array<uint16_t, 256> scales{};    // bit patterns
};

// A weight matrix, or the shard of one, in the neutral layout of the store (data/FORMAT.md).
// rows = output features (N), cols = input features (K), row-major. A vector (norm weight, bias)
// has rows = 1. Owns its bytes.
struct WeightTensor {
  WeightFormat format = WeightFormat::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
  int32_t group = 0;  // elements of K that share a scale: 32, 64 or 128; 0 for float formats
  ZeroKind zero = ZeroKind::kSymmetric;
  Dtype scale_dtype = Dtype::kF16;  // of scales and minimums: kF16 or kBf16
  std::vector<uint8_t> codes;       // int4 [rows, cols/2], low nibble = even column;
                                    // int8 [rows, cols]; floats: raw little-endian bytes
  std::vector<uint16_t> scales;     // [rows, cols/group] bit patterns
  std::vector<uint8_t> zeros;       // [rows, cols/group], kZeroPoints only
  std::vector<uint16_t> minimums;   // [rows, cols/group] bit patterns, kMinimums only
  // GPTQ act-order: stored column j multiplies input feature permutation[j]. Empty: identity.
  // In a column shard: the slice of the whole permutation that belongs to the stored columns.
  std::vector<int32_t> permutation;  // [cols]

  // Where it is given, codes and scales are empty: the bytes are still to be made. Only from a
  // WeightSource that was asked for it, and never of norms.
  std::shared_ptr<const WeightRecipe> recipe;

  size_t code_bytes() const {
    const auto elements = static_cast<size_t>(rows * cols);
    return format == WeightFormat::kInt4   ? elements / 2
           : format == WeightFormat::kInt8 ? elements
           : format == WeightFormat::kF32  ? elements * 4
                                           : elements * 2;
  }
  // Of scales, and of zeros or minimums where there are any.
  size_t groups() const { return group > 0 ? static_cast<size_t>(rows * (cols / group)) : 0; }
  size_t bytes() const {
    if (recipe) return code_bytes() + groups() * 2;
    return codes.size() + scales.size() * 2 + zeros.size() + minimums.size() * 2 +
           permutation.size() * 4;
  }
};

const char* to_string(WeightFormat f);
const char* to_string(Dtype t);
const char* to_string(ZeroKind z);

}  // namespace drover
