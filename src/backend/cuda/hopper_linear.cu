// Hopper linears: repacking at load, the choice of a configuration, the launch.
#include <algorithm>
#include <cstdio>

#include "backend/cuda/hopper_kernel.cuh"
#include "backend/cuda/hopper_split.h"

namespace drover::cuda {
namespace {

constexpr int kSharedLimit = 227 * 1024;       // a block alone on a multiprocessor
constexpr int kSharedLimitOfTwo = 113 * 1024;  // 1 KiB of each is the system's
constexpr uint64_t kEvictFirst = 0x12f0000000000000, kEvictNormal = 0x1000000000000000;

__device__ int code_of(const RepackSource& f, int64_t row, int64_t col) {
  const int64_t i = row * f.cols + col;
  return (f.codes[i / 2] >> (i % 2 * 4)) & 15;
}

// A nibble of 2 m + s for c = q - 8: s with m = -c - 1, or m = c.
__device__ uint32_t signed_nibble(int q) {
  return static_cast<uint32_t>(q < 8 ? (7 - q) * 2 + 1 : (q - 8) * 2);
}

// Where a row of the stack comes from: its row of the part that begins at `row_begin`, or -1.
__device__ int64_t row_of_part(const HopperWeights& w, const RepackSource& f, int64_t row_begin,
                               int64_t row) {
  if (w.gated) {  // the gate begins at 0, the up projection behind it
    if (row / 8 % 2 != (row_begin > 0 ? 1 : 0)) return -1;
    row = row / 16 * 8 + row % 8;
  } else {
    row -= row_begin;
  }
  return row >= 0 && row < f.rows ? row : -1;
}

// A thread makes one word of a record: of 64-row tile, block of columns, word of 1,024. Words of a
// thread of the warpgroup are [2 packs, 128 threads, 4 words]. e4m3, A registers of the k32 step j:
// word 2 j has row g (low nibbles of the bytes) and row g + 8 (high) at columns 4 (lane % 4) on,
// word 2 j + 1 the same 16 columns further. bf16, k16 step j: word j, nibbles i and i + 4 the pair
// of register i.
__global__ void repack_records(RepackSource f, int64_t row_begin, HopperWeights w) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int word = static_cast<int>(i % 1024), thread = word / 4 % 128;
  const int64_t begin = w.gated ? 0 : row_begin, end = w.gated ? w.rows : row_begin + f.rows;
  const int64_t block = i / 1024 % w.blocks, half = begin / 64 + i / 1024 / w.blocks;
  if (half > (end - 1) / 64) return;
  const int j = word / 512 * 4 + word % 4;  // of the thread's 8 words
  const int64_t row = half * 64 + thread / 32 * 16 + thread % 32 / 4;
  const int lane = thread % 4;
  uint32_t bits = 0;
  for (int e = 0; e < 8; ++e) {
    int64_t r, c;
    int shift;
    if (w.fp8) {
      r = row + e / 4 * 8, c = j / 2 * 32 + j % 2 * 16 + lane * 4 + e % 4;
      shift = e % 4 * 8 + e / 4 * 4;
    } else {  // register e / 2, half e % 2
      r = row + e / 2 % 2 * 8, c = j * 16 + e / 4 * 8 + lane * 2 + e % 2;
      shift = e / 2 * 4 + e % 2 * 16;
    }
    r = row_of_part(w, f, row_begin, r);
    if (r < 0) continue;
    const int q = code_of(f, r, block * 128 + c);
    bits |= (w.fp8 ? signed_nibble(q) : static_cast<uint32_t>(q)) << shift;
  }
  auto* record =
      reinterpret_cast<uint32_t*>(static_cast<char*>(w.records) +
                                  ((half / 2 * w.blocks + block) * 2 + half % 2) * kHopperRecord);
  // Parts of a stack may share a record: only bits of this part's rows are added.
  atomicOr(record + word, bits);
}

// Scales of rows g and g + 8 of a warp are the halves of a word.
__global__ void repack_record_scales(RepackSource f, int64_t row_begin, HopperWeights w) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= f.rows * w.blocks) return;
  const int64_t of_part = i / w.blocks, block = i % w.blocks;
  const int64_t row =
      w.gated ? of_part / 8 * 16 + (row_begin > 0 ? 8 : 0) + of_part % 8 : row_begin + of_part;
  const int64_t half = row / 64;
  auto* record = static_cast<char*>(w.records) +
                 ((half / 2 * w.blocks + block) * 2 + half % 2) * kHopperRecord;
  const int64_t at = row % 64 / 16 * 16 + row % 8 * 2 + row % 16 / 8;
  reinterpret_cast<uint16_t*>(record + 4096)[at] = f.scales[i];
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// Through the runtime, so that nothing links with libcuda (it is not there where there is no GPU).
Encode encoder() {
  static const Encode found = [] {
    void* p = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &p, 12000,
                                                           cudaEnableDefault, &result);
#else
    const cudaError_t e =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &p, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(
        e == cudaSuccess && result == cudaDriverEntryPointSuccess ? p : nullptr);
  }();
  return found;
}

hopper::Entry find_kernel(bool fp8, const HopperVariant& v) {
  return fp8 ? hopper::find_fp8(v) : hopper::find_bf16(v);
}

}  // namespace

bool hopper_fits(int compute_capability_major, int bits, int group, bool symmetric, int64_t cols) {
  return compute_capability_major == 9 && bits == 4 && group == 128 && symmetric && cols % 128 == 0;
}

HopperWeights hopper_shape(bool fp8, bool bf16_scales, int64_t rows, int64_t cols) {
  HopperWeights w;
  w.fp8 = fp8, w.bf16_scales = bf16_scales, w.rows = rows, w.cols = cols;
  w.tiles = static_cast<int>((rows + 255) / 256) * 2;
  w.blocks = static_cast<int>(cols / 128);
  return w;
}

bool hopper_gates(int64_t rows) { return rows % 16 == 0; }

size_t hopper_bytes(const HopperWeights& w) {
  return static_cast<size_t>(w.tiles) * static_cast<size_t>(w.blocks) * 2 * kHopperRecord;
}

void hopper_repack(const RepackSource& from, int64_t row_begin, const HopperWeights& to,
                   cudaStream_t s) {
  if (from.rows == 0) return;
  const int64_t begin = to.gated ? 0 : row_begin, end = to.gated ? to.rows : row_begin + from.rows;
  const int64_t halves = (end - 1) / 64 - begin / 64 + 1;
  const int64_t words = halves * to.blocks * 1024, scales = from.rows * to.blocks;
  repack_records<<<static_cast<unsigned>(words / 256), 256, 0, s>>>(from, row_begin, to);
  repack_record_scales<<<static_cast<unsigned>((scales + 255) / 256), 256, 0, s>>>(from, row_begin,
                                                                                   to);
}

HopperConfig plan_hopper(const HopperWeights& w, int64_t rows, const Workspace& work,
                         const HopperVariant& v) {
  HopperConfig c;
  c.variant = v;
  const hopper::Entry kernel = find_kernel(w.fp8, v);
  const int limit = v.per_sm == 1 ? kSharedLimit : kSharedLimitOfTwo;
  c.token_tiles = static_cast<int>((rows + v.tokens - 1) / v.tokens);
  c.weight_tiles = (w.tiles + v.cluster - 1) / v.cluster;
  // Measured (DECISIONS): 4,000 cycles where a block takes 500, 8,000 where it takes 700.
  const SplitLimits limits{
      v.split && kernel.partials > 0
          ? static_cast<int64_t>(work.partial_count / static_cast<size_t>(kernel.partials))
          : 0,
      static_cast<int64_t>(work.counter_count) / (2 * v.cluster), v.tokens <= 64 ? 6.0 : 11.0};
  const TileSplit split =
      split_tiles(c.token_tiles * c.weight_tiles, w.blocks,
                  std::max(1, work.multiprocessors * v.per_sm / v.cluster), limits);
  c.workers = split.workers, c.whole_tiles = split.whole_tiles, c.blocks = split.blocks;
  c.split_tiles = split.split_tiles, c.split_workers = split.split_workers;
  c.stages = kernel.slots > 0 ? kernel.slots
                              : std::min(v.max_stages / kernel.blocks,
                                         (limit - kernel.fixed_bytes) / kernel.slot_bytes);
  c.shared_bytes = kernel.fixed_bytes + c.stages * kernel.slot_bytes;
  return c;
}

// Measured on an H100 (hopper_linear_bench, and a trace of decode steps).
// Few tokens: a block takes a little more than half of the shared memory: room for a small kernel
// beside it, but not for a second block of its own, which the first multiprocessors got where a
// launch came while a norm still ran on another (gate_up of one row 104 us, else 83). bf16 inputs
// want two blocks, to unpack in time (M = 1 0.182 ms, else 0.194).
// Many tokens of e4m3: the time of a tile's block of columns beside that of 128 tokens is told
// below, as it is under load, where what is unpacked for 256 tokens pays (H200, 512 rows: 0.82 ms
// in tiles of 256, 0.90 of 128 in clusters, 0.92 without; 256 rows 0.448, 0.466, 0.469; bursts from
// a cool chip say otherwise).
HopperConfig choose_hopper(const HopperWeights& w, int64_t rows, const Workspace& work) {
  HopperVariant v;
  v.tokens = rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128;
  if (v.tokens <= 16 && w.fp8) v.max_stages = 12;
  if (v.tokens <= 32 && !w.fp8) v.per_sm = 2;
  if (w.fp8 && rows > 128) {
    struct Way {
      HopperVariant variant;
      double of_tile;  // time of a block of columns
    };
    static constexpr Way kWays[] = {{{128, 2}, 1}, {{160, 2}, 1.105}, {{256, 1}, 1.79}};
    HopperConfig best;
    for (const Way& way : kWays) {
      HopperConfig c = plan_hopper(w, rows, work, way.variant);
      c.blocks *= way.of_tile;
      if (best.workers == 0 || c.blocks < best.blocks) best = c;
    }
    return best;
  }
  if (rows >= 1024 && !w.fp8) v.cluster = 2;  // 4.48, else 4.61
  return plan_hopper(w, rows, work, v);
}

bool hopper_has(bool fp8, const HopperVariant& v) {
  // find_kernel looks at tokens and clusters only.
  const bool two = v.tokens <= 32 && !fp8;
  const bool fits = (v.cluster == 1 || v.cluster == 2) && v.max_stages >= 4 &&
                    (v.per_sm == 1 || (v.per_sm == 2 && two));
  return fits && find_kernel(fp8, v).launch != nullptr;
}

std::vector<HopperVariant> hopper_variants(bool fp8, int64_t rows) {
  std::vector<HopperVariant> all;
  for (const int tokens : {8, 16, 32, 64, 128, 160, 256}) {
    // Padding less than half of the tile, and not many small tiles over the same weights.
    if ((tokens > 8 && rows * 2 <= tokens) || (tokens < 128 && rows > tokens * 2)) continue;
    for (const int cluster : {1, 2})
      for (const int per_sm : {1, 2})
        for (const int stages : {32, 12, 11, 8})
          for (const bool split : {true, false}) {
            const HopperVariant v{tokens, cluster, per_sm, stages, split};
            // Of large tiles the ring is as long as there is room, or fixed.
            const bool chosen = fp8 ? tokens <= 16 : tokens <= 32;
            if ((chosen || stages == 32) && hopper_has(fp8, v)) all.push_back(v);
          }
  }
  return all;
}

bool same_launch(const HopperConfig& a, const HopperConfig& b) {
  return a.variant.tokens == b.variant.tokens && a.variant.cluster == b.variant.cluster &&
         a.variant.per_sm == b.variant.per_sm && a.variant.dependent == b.variant.dependent &&
         a.stages == b.stages && a.workers == b.workers && a.whole_tiles == b.whole_tiles &&
         a.split_tiles == b.split_tiles && a.split_workers == b.split_workers;
}

int describe(const HopperConfig& c, char* to, size_t room) {
  const HopperVariant& v = c.variant;
  return std::snprintf(
      to, room,
      "128x%d cluster %d, %d a multiprocessor, %d stages, %d workers: %d whole tiles, "
      "%d split into %d",
      v.tokens, v.cluster, v.per_sm, c.stages, c.workers, c.whole_tiles, c.split_tiles,
      c.split_workers);
}

bool hopper_linear(const HopperWeights& w, const HopperConfig& c, const void* in,
                   const float* in_scale, void* out, int64_t rows, bool f32_out,
                   const Workspace& work, cudaStream_t s) {
  const HopperVariant& v = c.variant;
  const hopper::Entry kernel = find_kernel(w.fp8, v);
  const Encode encode = encoder();
  if (kernel.launch == nullptr || encode == nullptr) return false;
  CUtensorMap map;
  const auto bytes = static_cast<cuuint64_t>(w.fp8 ? 1 : 2);
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(w.cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(w.cols) * bytes};
  const cuuint32_t box[2] = {w.fp8 ? 128u : 64u, static_cast<cuuint32_t>(v.tokens / v.cluster)};
  const cuuint32_t steps[2] = {1, 1};
  if (encode(&map, w.fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
             const_cast<void*>(in), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    return false;
  hopper::Args a{};
  a.records = static_cast<const char*>(w.records), a.in = in, a.in_scale = in_scale, a.out = out;
  a.partials = work.partials, a.counters = work.counters;
  a.rows = static_cast<int>(rows), a.n = w.rows, a.blocks = w.blocks;
  a.token_tiles = c.token_tiles, a.whole_tiles = c.whole_tiles;
  a.workers = c.workers, a.stages = c.stages;
  split_among(a, c.split_tiles, c.split_workers);
  a.policy = c.token_tiles == 1 ? kEvictFirst : kEvictNormal;
  a.f32_out = f32_out, a.bf16_scales = w.bf16_scales, a.gated = w.gated;
  kernel.launch(a, map, c, s);
  return true;
}

}  // namespace drover::cuda
