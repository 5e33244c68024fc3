// Element types, and the host-side form of a weight tensor.
#pragma once

#include <cstddef>
#include <cstdint>
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

  size_t bytes() const {
    return codes.size() + scales.size() * 2 + zeros.size() + minimums.size() * 2 +
           permutation.size() * 4;
  }
};

const char* to_string(WeightFormat f);
const char* to_string(Dtype t);
const char* to_string(ZeroKind z);

}  // namespace drover
