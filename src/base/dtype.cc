#include "base/dtype.h"

namespace drover {

const char* to_string(WeightFormat f) {
  switch (f) {
    case WeightFormat::kInt4:
      return "int4";
    case WeightFormat::kInt8:
      return "int8";
    case WeightFormat::kF16:
      return "f16";
    case WeightFormat::kBf16:
      return "bf16";
    case WeightFormat::kF32:
      return "f32";
  }
  return "unknown weight format";
}

const char* to_string(Dtype t) {
  switch (t) {
    case Dtype::kF32:
      return "f32";
    case Dtype::kF16:
      return "f16";
    case Dtype::kBf16:
      return "bf16";
    case Dtype::kFp8E4m3:
      return "fp8_e4m3";
    case Dtype::kI32:
      return "i32";
    case Dtype::kI8:
      return "i8";
    case Dtype::kU8:
      return "u8";
  }
  return "unknown type";
}

const char* to_string(ZeroKind z) {
  switch (z) {
    case ZeroKind::kSymmetric:
      return "symmetric";
    case ZeroKind::kZeroPoints:
      return "zero_points";
    case ZeroKind::kMinimums:
      return "minimums";
  }
  return "unknown zero kind";
}

}  // namespace drover
