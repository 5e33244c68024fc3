// Linears of INT4 weights in symmetric groups of 128 columns on Hopper (sm_90a), inputs in bf16
// (W4A16) or e4m3 with a scale a row (W4A8). hopper_kernel.cuh tells how. Plain types only.
//
// descriptor (HopperWeights, rows) -> configuration (choose_hopper, or plan_hopper for a variant of
// one's own) -> launch (hopper_linear). Results are the same for the same weights, rows and
// configuration, bit for bit; they may differ between configurations, so between row counts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/cuda/kernels.h"

namespace drover::cuda {

// Records [tiles of 128 rows, blocks of 128 columns, 2 halves of 64 rows], each 4,096 bytes of
// codes and 128 of scales in the order that threads want them. Padding rows have scales of 0.
struct HopperWeights {
  bool fp8 = false;  // codes are encoded for e4m3 inputs, else for bf16
  bool bf16_scales = false;
  bool gated = false;          // rows are by turns eight of a gate and eight of an up projection;
                               // what is written is silu(gate) * up, half as many features
  int64_t rows = 0, cols = 0;  // N, K; K a multiple of 128
  int tiles = 0;               // of 128 rows, an even number
  int blocks = 0;              // of 128 columns
  void* records = nullptr;
};
inline constexpr int kHopperRecord = 4096 + 128;  // bytes

// Whether this device has the kernels and the format is theirs.
bool hopper_fits(int compute_capability_major, int bits, int group, bool symmetric, int64_t cols);
HopperWeights hopper_shape(bool fp8, bool bf16_scales, int64_t rows, int64_t cols);
size_t hopper_bytes(const HopperWeights& w);
// Whether a stack of so many rows, half of them the gate's, may be gated.
bool hopper_gates(int64_t rows);
// One part of a stack from row `row_begin` of it on; records are zero before the first part.
void hopper_repack(const RepackSource& from, int64_t row_begin, const HopperWeights& to,
                   cudaStream_t s);

// What may be tuned.
struct HopperVariant {
  int tokens = 0;       // a block's tokens: 8, 16, 32, 64, 128, or 160 or 256 of e4m3
  int cluster = 1;      // blocks that share their tokens by multicast: 1, or 2 (128, 160)
  int per_sm = 1;       // blocks a multiprocessor: 1, or 2 of bf16 up to 32 tokens
  int max_stages = 32;  // blocks of columns in the ring; from 32 tokens of e4m3 on a ring is fixed
  bool split = true;    // share tiles that do not fill a wave out by columns
  bool dependent =
      true;  // programmatic dependent launch: weights come before the launch before ends
};

struct HopperConfig {
  HopperVariant variant;
  int stages = 0;        // ring slots, each one or two blocks of 128 columns
  int shared_bytes = 0;  // a thread block
  int workers = 0;       // clusters in the grid
  int token_tiles = 0, weight_tiles = 0;
  int whole_tiles = 0;                     // tiles done by one worker each, in waves
  int split_tiles = 0, split_workers = 0;  // the rest, their columns in equal shares
  double blocks = 0;                       // estimated time, in blocks of columns
};
HopperConfig plan_hopper(const HopperWeights& w, int64_t rows, const Workspace& work,
                         const HopperVariant& variant);
HopperConfig choose_hopper(const HopperWeights& w, int64_t rows, const Workspace& work);
// Whether there is a kernel of it.
bool hopper_has(bool fp8, const HopperVariant& variant);
// Those that may be fastest at so many rows: tiles that fit them, or nearly, and all limits.
std::vector<HopperVariant> hopper_variants(bool fp8, int64_t rows);
// Whether two plans for the same weights and rows launch the same.
bool same_launch(const HopperConfig& a, const HopperConfig& b);
// "128x8 cluster 1, 1 a multiprocessor, 12 stages, 132 workers: 396 whole tiles, 52 split into
// 104", for a person.
int describe(const HopperConfig& c, char* to, size_t room);

// in [rows, cols] bf16, or e4m3 with in_scale [rows]; out [rows, w.rows] bf16 or f32, where w is
// gated [rows, w.rows / 2] bf16.
// False when the tensor map of `in` could not be made (never, if in is 16-byte aligned).
bool hopper_linear(const HopperWeights& w, const HopperConfig& c, const void* in,
                   const float* in_scale, void* out, int64_t rows, bool f32_out,
                   const Workspace& work, cudaStream_t s);

}  // namespace drover::cuda
