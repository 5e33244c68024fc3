// Repacking of quantized weights at load, and the choice of a configuration for a linear.
#include <cuda_fp8.h>

#include <algorithm>

#include "backend/cuda/linear_kernel.cuh"

namespace drover::cuda {

void linear_int4_g32(int, const LinearArgs&, const LinearConfig&, int64_t, cudaStream_t);
void linear_int4_g64(int, const LinearArgs&, const LinearConfig&, int64_t, cudaStream_t);
void linear_int4_g128(int, const LinearArgs&, const LinearConfig&, int64_t, cudaStream_t);
void linear_int8(int, int, const LinearArgs&, const LinearConfig&, int64_t, cudaStream_t);

namespace {

__device__ uint32_t code(const RepackSource& f, int64_t row, int64_t col) {
  const int64_t i = row * f.cols + col;
  return f.bits == 4 ? (f.codes[i / 2] >> (i % 2 * 4)) & 15u : f.codes[i];
}

// One thread a code of the store: rows and columns that are padding stay zero.
// Element (row r, column c) of a 16 x 16 step is in lane (r % 8) * 4 + (c % 8) / 2, register
// r / 8 + c / 8 * 2, half c % 2.
__global__ void repack_codes(RepackSource f, int64_t row_begin, QuantizedWeights w) {
  const int64_t words_a_row = w.blocks * 8;  // k16 steps
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  // A thread makes one lane's word(s) of one step: tile, step, lane.
  const int64_t lane = i % 32, step = i / 32 % words_a_row, tile = i / 32 / words_a_row;
  const int64_t first_tile = row_begin / 16;
  const int64_t last_tile = (row_begin + f.rows - 1) / 16;
  if (first_tile + tile > last_tile) return;
  const int64_t t = first_tile + tile, block = step / 8, s = step % 8;
  uint32_t words[2] = {0, 0};
  for (int e = 0; e < 8; ++e) {
    const int reg = e / 2, half = e % 2;
    const int64_t row = t * 16 + lane / 4 + reg % 2 * 8 - row_begin;
    const int64_t col = step * 16 + lane % 4 * 2 + reg / 2 * 8 + half;
    if (row < 0 || row >= f.rows || col >= f.cols) continue;
    const uint32_t q = code(f, row, col);
    if (f.bits == 4)
      words[0] |= q << (reg * 4 + half * 16);
    else
      words[reg / 2] |= q << (reg % 2 * 16 + half * 8);
  }
  auto* to = static_cast<uint32_t*>(const_cast<void*>(w.codes));
  const int64_t at = t * w.blocks + block;
  // Parts of a stack may share a tile: only bits of this part's rows are added.
  if (f.bits == 4) {
    atomicOr(&to[((at * 2 + s / 4) * 32 + lane) * 4 + s % 4], words[0]);
  } else {
    atomicOr(&to[((at * 4 + s / 2) * 32 + lane) * 4 + s % 2 * 2], words[0]);
    atomicOr(&to[((at * 4 + s / 2) * 32 + lane) * 4 + s % 2 * 2 + 1], words[1]);
  }
}

__global__ void repack_scales(RepackSource f, int64_t row_begin, QuantizedWeights w) {
  const int64_t groups = f.cols / f.group, padded = w.blocks * (128 / f.group);
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= f.rows * groups) return;
  const int64_t row = row_begin + i / groups, g = i % groups;
  const int64_t at = (((row / 16) * padded + g) * 8 + row % 8) * 2 + row % 16 / 8;
  reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(w.scales))[at] = f.scales[i];
  if (w.zero == 0) return;
  uint16_t offset;
  if (w.zero == 2) {
    offset = f.minimums[i];
  } else {
    const float z = f.zero == 1 ? static_cast<float>(f.zeros[i]) : f.bits == 4 ? 8.0f : 0.0f;
    offset = static_cast<uint16_t>(__float_as_uint(z) >> 16);  // small integers are exact
  }
  reinterpret_cast<uint16_t*>(const_cast<uint32_t*>(w.offsets))[at] = offset;
}

__global__ void widen_e4m3(const uint4* in, uint4* out, size_t count) {
  const size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x;
  if (i >= count) return;
  const uint4 v = in[i];
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t wide[8];
  for (int j = 0; j < 8; ++j) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(words[j / 2] >> (j % 2 * 16));
    const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    const __nv_bfloat162 b = __float22bfloat162_rn(__half22float2(__half2(h)));
    wide[j] = *reinterpret_cast<const uint32_t*>(&b);
  }
  out[2 * i] = {wide[0], wide[1], wide[2], wide[3]};
  out[2 * i + 1] = {wide[4], wide[5], wide[6], wide[7]};
}

}  // namespace

void e4m3_to_bf16(const void* in, void* out, size_t count, cudaStream_t s) {
  const size_t packs = count / 16;
  if (packs == 0) return;
  widen_e4m3<<<static_cast<unsigned>((packs + 255) / 256), 256, 0, s>>>(
      static_cast<const uint4*>(in), static_cast<uint4*>(out), packs);
}

void repacked_bytes(const QuantizedWeights& w, size_t bytes[3]) {
  const auto padded = static_cast<size_t>(w.tiles * w.blocks) * 16 * 128;
  bytes[0] = padded * static_cast<size_t>(w.bits) / 8;
  bytes[1] = padded / static_cast<size_t>(w.group) * 2;
  bytes[2] = w.zero == 0 ? 0 : bytes[1];
}

void repack(const RepackSource& from, int64_t row_begin, const QuantizedWeights& to,
            cudaStream_t s) {
  if (from.rows == 0) return;
  const int64_t tiles = (row_begin + from.rows - 1) / 16 - row_begin / 16 + 1;
  const int64_t words = tiles * to.blocks * 8 * 32, scales = from.rows * (from.cols / from.group);
  repack_codes<<<static_cast<unsigned>((words + 255) / 256), 256, 0, s>>>(from, row_begin, to);
  repack_scales<<<static_cast<unsigned>((scales + 255) / 256), 256, 0, s>>>(from, row_begin, to);
}

LinearConfig choose_linear(const QuantizedWeights& w, int64_t rows, const Workspace& work) {
  LinearConfig c;
  c.tokens_tile = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
  if (w.bits == 8) c.tokens_tile = rows <= 16 ? 16 : 64;
  c.chunks = static_cast<int>((w.blocks + w.chunk - 1) / w.chunk);
  const int64_t token_tiles = (rows + c.tokens_tile - 1) / c.tokens_tile;
  const int64_t tiles = token_tiles * (w.tiles / kTilesOfBlock);
  const auto partials = static_cast<size_t>(token_tiles * c.tokens_tile * w.tiles * 16 * c.chunks);
  // Large tiles fill a multiprocessor alone; small ones need several blocks to have enough in
  // flight.
  const int64_t enough =
      c.tokens_tile >= 64 ? work.multiprocessors * 3 / 4 : work.multiprocessors * 3;
  c.split = c.chunks > 1 && tiles < enough && partials <= work.partial_count &&
            static_cast<size_t>(tiles) <= work.counter_count;
  return c;
}

void quantized_linear(const QuantizedWeights& w, const LinearConfig& c, const void* in,
                      const float* in_scale, void* out, int64_t rows, bool f32_out,
                      const Workspace& work, cudaStream_t s) {
  if (rows == 0) return;
  LinearArgs a;
  a.codes = static_cast<const uint4*>(w.codes), a.scales = w.scales, a.offsets = w.offsets;
  a.x = static_cast<const __nv_bfloat16*>(in), a.x_scale = in_scale, a.out = out;
  a.partials = work.partials, a.counters = work.counters;
  a.rows = rows, a.n = w.rows, a.k = w.cols;
  a.blocks = static_cast<int>(w.blocks), a.chunk = w.chunk, a.chunks = c.chunks;
  a.f32_out = f32_out, a.bf16_scales = w.bf16_scales;
  if (w.bits == 8) return linear_int8(w.group, w.zero, a, c, w.tiles, s);
  if (w.group == 32) return linear_int4_g32(w.zero, a, c, w.tiles, s);
  if (w.group == 64) return linear_int4_g64(w.zero, a, c, w.tiles, s);
  linear_int4_g128(w.zero, a, c, w.tiles, s);
}

}  // namespace drover::cuda
