// What the operations mean, in plain double precision. Shares no code with any backend, nor with
// base/formats: a mistake would have to be made twice.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "backend/backend.h"
#include "base/dtype.h"

namespace drover::reference {

inline double half(uint16_t b) {
  const int sign = b >> 15, exponent = (b >> 10) & 31, mantissa = b & 1023;
  double v = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) v = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  return sign ? -v : v;
}

inline double bf16(uint16_t b) {
  const int sign = b >> 15, exponent = (b >> 7) & 255, mantissa = b & 127;
  double v =
      exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  if (exponent == 255) v = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  return sign ? -v : v;
}

inline double fp8(uint8_t b) {
  const int sign = b >> 7, exponent = (b >> 3) & 15, mantissa = b & 7;
  double v = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  if ((b & 127) == 127) v = std::nan("");
  return sign ? -v : v;
}

// To `bits` significant bits, ties to even (nearbyint's mode); exponents as of double.
inline double round_bits(double x, int bits) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  const double m = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(m, bits)), exponent - bits);
}
inline double round_bf16(double x) { return round_bits(x, 8); }

// The nearest e4m3 number: by trying them all.
inline double round_fp8(double x) {
  double best = 0, distance = std::numeric_limits<double>::infinity();
  int best_code = 0;
  for (int code = 0; code < 127; ++code) {
    const double v = fp8(static_cast<uint8_t>(code)), d = std::abs(std::abs(x) - v);
    if (d < distance || (d == distance && code % 2 == 0 && best_code % 2 == 1))
      best = v, distance = d, best_code = code;
  }
  return x < 0 ? -best : best;
}

inline double weight(const WeightTensor& w, int64_t row, int64_t col) {
  const size_t i = static_cast<size_t>(row * w.cols + col);
  const auto u16 = [&] { return static_cast<uint16_t>(w.codes[2 * i] | w.codes[2 * i + 1] << 8); };
  if (w.format == WeightFormat::kF16) return half(u16());
  if (w.format == WeightFormat::kBf16) return bf16(u16());
  if (w.format == WeightFormat::kF32) {
    float f;
    std::copy_n(w.codes.data() + 4 * i, 4, reinterpret_cast<uint8_t*>(&f));
    return f;
  }
  const size_t g = static_cast<size_t>(row * (w.cols / w.group) + col / w.group);
  const auto wide = [&](uint16_t b) { return w.scale_dtype == Dtype::kF16 ? half(b) : bf16(b); };
  const double s = wide(w.scales[g]);
  double q;
  if (w.format == WeightFormat::kInt4) {
    q = col % 2 == 0 ? w.codes[i / 2] & 15 : w.codes[i / 2] >> 4;
    if (w.zero == ZeroKind::kSymmetric) q -= 8;
  } else {
    q = static_cast<int8_t>(w.codes[i]);
  }
  if (w.zero == ZeroKind::kZeroPoints) q -= w.zeros[g];
  return s * q + (w.zero == ZeroKind::kMinimums ? wide(w.minimums[g]) : 0.0);
}

struct Sum {
  double value = 0;
  double magnitude = 0;  // sum of |terms|: what rounding errors of a sum are measured by
};

inline Sum dot(const double* a, const double* b, int64_t n) {
  Sum s;
  for (int64_t i = 0; i < n; ++i) {
    s.value += a[i] * b[i];
    s.magnitude += std::abs(a[i] * b[i]);
  }
  return s;
}

// row [n] in place; returns nothing: the textbook formula.
inline void rms_norm(const std::vector<double>& x, const float* w, double epsilon,
                     std::vector<double>& out) {
  double sum = 0;
  for (double v : x) sum += v * v;
  const double scale = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + epsilon);
  out.resize(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * w[i];
}

inline double silu(double x) { return x / (1.0 + std::exp(-x)); }

inline void rope(double* head, int64_t position, const float* frequencies, int dims,
                 bool half_pairing) {
  for (int i = 0; i < dims / 2; ++i) {
    const int a = half_pairing ? i : 2 * i, b = half_pairing ? i + dims / 2 : 2 * i + 1;
    const double angle = static_cast<double>(position) * static_cast<double>(frequencies[i]);
    const double x = head[a], y = head[b];
    head[a] = x * std::cos(angle) - y * std::sin(angle);
    head[b] = y * std::cos(angle) + x * std::sin(angle);
  }
}

// One element of a cache in host memory.
inline double cached(KvFormat format, const uint8_t* values, const float* scales, int64_t token,
                     int head_size, int i) {
  const int64_t at = token * head_size + i;
  if (format == KvFormat::kFp8) return fp8(values[at]) * static_cast<double>(scales[token]);
  if (format == KvFormat::kBf16)
    return bf16(static_cast<uint16_t>(values[2 * at] | values[2 * at + 1] << 8));
  float f;
  std::copy_n(values + 4 * at, 4, reinterpret_cast<uint8_t*>(&f));
  return f;
}

// One query head over keys, values [count, head_size]: softmax(q k / sqrt(d)) v. `magnitude` gets
// sum of p |v| for each output.
inline void attention(const double* q, const std::vector<double>& k, const std::vector<double>& v,
                      int64_t count, int d, std::vector<double>& out,
                      std::vector<double>& magnitude) {
  std::vector<double> p(static_cast<size_t>(count));
  double top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t t = 0; t < count; ++t) {
    p[t] = dot(q, k.data() + t * d, d).value / std::sqrt(static_cast<double>(d));
    top = std::max(top, p[t]);
  }
  for (double& x : p) sum += x = std::exp(x - top);
  out.assign(static_cast<size_t>(d), 0);
  magnitude.assign(static_cast<size_t>(d), 0);
  for (int64_t t = 0; t < count; ++t)
    for (int i = 0; i < d; ++i) {
      out[i] += p[t] / sum * v[t * d + i];
      magnitude[i] += p[t] / sum * std::abs(v[t * d + i]);
    }
}

}  // namespace drover::reference
