// The CPU backend's own loops: everything but the linears, which are oneDNN's. Compiled once per
// instruction set from kernels_impl.h and chosen at run time, so that one build runs everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend/backend.h"

namespace drover::cpu {

// Tokens of a page that attention reads at a time. Fixed by position, never by the chunk, so that a
// row's sums have the same order in every chunking.
inline constexpr int kTile = 16;
// Queries that share one pass over the cache.
inline constexpr int kQueries = 64;
inline constexpr int kMaxHeadSize = 256;

// One thread's working memory for attention.
struct alignas(64) AttentionScratch {
  float k[kTile * kMaxHeadSize];  // [token, head_size]
  float v[kTile * kMaxHeadSize];  // [token, head_size]
  float k_scale[kTile];
  float v_scale[kTile];
  float query[kQueries * kMaxHeadSize];  // scaled by 1/sqrt(head_size)
  float sum[kQueries * kMaxHeadSize];    // of probability * value
  float top[kQueries];                   // largest score so far
  float weight[kQueries];                // sum of probabilities
};

// Rows [row_begin, row_end) of one chunk, one KV head, query heads [group_begin, group_end) of it.
struct AttentionTask {
  const Backend::Attention* args = nullptr;
  const int32_t* pages = nullptr;     // of the sequence: [max_pages]
  const int32_t* position = nullptr;  // of each row of the step
  int32_t row_begin = 0, row_end = 0;
  int32_t kv_head = 0;
  int32_t group_begin = 0, group_end = 0;
};

struct Kernels {
  const char* name;  // "avx512"
  // residual += delta (delta may be null).
  void (*add)(float* residual, const float* delta, int64_t n);
  // out = x / sqrt(mean(x^2) + epsilon) * weight.
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t n, float epsilon);
  void (*silu_gate)(const float* gate, const float* up, float* out, int64_t n);
  // Rounds to nearest even; NaN stays NaN.
  void (*to_bf16)(const float* x, uint16_t* out, int64_t n);
  // The same rounding, kept as f32.
  void (*round_to_bf16)(const float* x, float* out, int64_t n);
  // Codes of x / scale; returns scale = amax / 448. A vector whose scale would not be a normal
  // number (all zeros) has scale 0 and codes 0; one with a NaN or infinity has scale NaN.
  float (*to_fp8)(const float* x, uint8_t* out, int64_t n);
  // x becomes what to_fp8's codes and scale stand for; returns the scale.
  float (*through_fp8)(float* x, int64_t n);
  // Index of the largest of x[0, n), the first of equals, NaN never; -1 when there is none.
  int64_t (*argmax)(const float* x, int64_t n);
  void (*attention)(const AttentionTask& task, AttentionScratch& scratch);
};

extern const Kernels kKernelsAvx512;  // x86-64-v4: avx512 f, bw, dq, vl
extern const Kernels kKernelsAvx2;    // x86-64-v3: avx2, fma, f16c
extern const Kernels kKernelsBase;    // x86-64

// The best of them within oneDNN's ISA limit (ONEDNN_MAX_CPU_ISA), so that one switch limits both.
const Kernels& choose_kernels();

}  // namespace drover::cpu
