// Launches of the CUDA backend's kernels. Plain types only, so that device code never meets fmt.
// A launch returns no error: the caller asks cudaGetLastError (cuda_check.h). Shapes are as in
// backend/backend.h; activations are bf16 (uint16_t), row-major.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace drover::cuda {

// How an embedding row is stored, as in base/dtype.h's WeightTensor.
struct StoredTable {
  int format = 0;  // WeightFormat
  int zero = 0;    // ZeroKind
  int group = 0;
  bool bf16_scales = false;
  int64_t rows = 0, cols = 0;
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint8_t* zeros = nullptr;
  const uint16_t* minimums = nullptr;
};

void embed(const StoredTable& table, int64_t vocab_begin, const int32_t* tokens, int64_t max_tokens,
           const int32_t* row_slot, const int32_t* row_position, int32_t rows, void* out,
           cudaStream_t s);
// A float tensor (format: WeightFormat kF16, kBf16 or kF32) to bf16.
void to_bf16(int format, const void* in, void* out, size_t count, cudaStream_t s);

void add_rows(void* residual, const void* delta, size_t count, cudaStream_t s);
// Where out_scale is given, out is e4m3 with a scale a row (backend.h, LinearInput).
void norm(void* residual, const void* delta, const float* weight, void* out, float* out_scale,
          int64_t features, float epsilon, const int32_t* select, int64_t out_rows, cudaStream_t s);

// norm over the sum of all ranks' delta (peer_norm.cu). 2 to kMostPeers ranks, rows of a multiple
// of 8 and of up to kPeerFeatures features, peers.rows of them at most; memory of kPeerHeader bytes
// and [2, ranks, peers.rows, features] bf16.
inline constexpr int kMostPeers = 8;
inline constexpr int64_t kPeerFeatures = 8192;
inline constexpr size_t kPeerHeader = 256;
struct Peers {
  int rank = 0, size = 0;
  int64_t rows = 0;  // room
  void* memory[kMostPeers] = {};
  const uint32_t* stop = nullptr;
};
void peer_norm(const Peers& peers, void* residual, const void* delta, const float* weight,
               void* out, float* out_scale, int64_t rows, int64_t features, float epsilon,
               cudaStream_t s);
void silu_gate(const void* in, void* out, float* out_scale, int64_t rows, int64_t features,
               cudaStream_t s);
void gather_columns(const void* in, int64_t segment_cols, const int32_t* index, void* out,
                    float* out_scale, int64_t rows, int64_t cols, cudaStream_t s);

// out [rows, features] e4m3 and out_scale [rows] of rows of bf16 that begin `stride` elements
// apart.
void quantize_rows(const void* in, int64_t stride, void* out, float* out_scale, int64_t rows,
                   int64_t features, cudaStream_t s);
// Likewise of rows that follow each other; by its name a trace tells whose they are.
void quantize_gated(const void* in, void* out, float* out_scale, int64_t rows, int64_t features,
                    cudaStream_t s);

struct TokenCandidate {  // drover::Candidate
  float logit;
  int32_t token;
};
void argmax(const float* logits, int64_t rows, int64_t vocab_begin, int64_t vocab_count,
            const uint8_t* forbid_eos, const int32_t* eos_ids, int32_t eos_count,
            TokenCandidate* out, cudaStream_t s);
void merge_argmax(const TokenCandidate* candidates, int32_t shards, int64_t rows, int32_t* ids,
                  cudaStream_t s);
void store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position, int64_t rows,
                  int32_t* tokens, int64_t max_tokens, cudaStream_t s);

enum KvType : int { kKvFp8 = 0, kKvBf16 = 1, kKvF32 = 2 };  // as KvFormat

struct Cache {
  int type = kKvFp8;
  int page_tokens = 16, kv_heads = 0, head_size = 0;
  void* k = nullptr;
  void* v = nullptr;
  float* k_scale = nullptr;
  float* v_scale = nullptr;
};

struct Rows {
  int32_t rows = 0, chunks = 0;
  int32_t decode_rows = 0;  // at the end
  const int32_t* slot = nullptr;
  const int32_t* position = nullptr;
  const int32_t* page_table = nullptr;
  int32_t max_pages = 0;
};

void rope_append(void* qkv, int32_t heads, const float* inverse_frequencies, int32_t rope_dims,
                 bool half_pairing, const Cache& cache, const Rows& rows, cudaStream_t s);

// f32 partial sums of linears and attention, and the counters that tell the last block of a tile.
// Counters are zero between launches. Used by one stream at a time.
struct Workspace {
  float* partials = nullptr;
  size_t partial_count = 0;
  uint32_t* counters = nullptr;
  size_t counter_count = 0;
  int multiprocessors = 0;
  bool hopper = false;  // its own kernels may be used
};

// Head sizes 16, 32, 64, 128, 256; any number of query heads a KV head. The last rows.decode_rows
// rows go as decode. With out_scale the queries in qkv do not survive. Rows of prefill get the same
// bits however prompts are cut into chunks; decode's bits are the same as prefill's, but for
// hopper_prefill's.
void attention(void* qkv, void* out, float* out_scale, int32_t heads, const Cache& cache,
               const Rows& rows, const Workspace& work, cudaStream_t s);

// Pages of up to kLayersALaunch layers, in words of 4 bytes.
inline constexpr int kLayersALaunch = 96;
struct PagePools {
  uint32_t* part[kLayersALaunch][4];  // k, v, k_scale, v_scale
};
void move_pages(const PagePools& pools, int layers, int first_layer, int all_layers,
                size_t value_words, size_t scale_words, const int32_t* pages, int32_t count,
                uint32_t* packed, bool gather, cudaStream_t s);

// A quantized weight matrix, repacked (linear_kernel.cuh tells the layout).
struct QuantizedWeights {
  int bits = 4;   // 4 or 8
  int group = 0;  // 32, 64, 128
  int zero = 0;   // 0: symmetric (g128 int4 only), 1: zero points, 2: minimums
  bool bf16_scales = false;
  int64_t rows = 0, cols = 0;
  int64_t tiles = 0;   // of 16 rows, a multiple of kTilesOfBlock
  int64_t blocks = 0;  // of 128 columns
  int chunk = 0;       // blocks whose sums form one chain, even; the order of sums depends on it
  const void* codes = nullptr;
  const uint32_t* scales = nullptr;
  const uint32_t* offsets = nullptr;  // zero points or minimums; null when symmetric
};
inline constexpr int kTilesOfBlock = 8;  // a thread block's weight rows: 128

// One part of a stacked matrix in the store's layout (device memory) into the repacked one, from
// row `row_begin` of the stack on.
struct RepackSource {
  int bits, group, zero;  // zero: ZeroKind
  int64_t rows, cols;
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;
  const uint16_t* minimums;
};
void repack(const RepackSource& from, int64_t row_begin, const QuantizedWeights& to,
            cudaStream_t s);
// Bytes of the three parts: codes, scales, offsets.
void repacked_bytes(const QuantizedWeights& w, size_t bytes[3]);

// descriptor -> configuration -> launch: what was chosen can be printed.
struct LinearConfig {
  int tokens_tile = 0;  // 8, 16, 32, 64, 128
  bool split = false;   // chunks of columns in blocks of their own, summed by the last one
  int chunks = 1;
};
LinearConfig choose_linear(const QuantizedWeights& w, int64_t rows, const Workspace& work);
// in_scale: null, or [rows], which the sums are multiplied by.
void quantized_linear(const QuantizedWeights& w, const LinearConfig& c, const void* in,
                      const float* in_scale, void* out, int64_t rows, bool f32_out,
                      const Workspace& work, cudaStream_t s);
// Exact. count is a multiple of 16.
void e4m3_to_bf16(const void* in, void* out, size_t count, cudaStream_t s);

}  // namespace drover::cuda
