// Operations on rows of activations, logits and tokens, all bound by memory; those that write what
// linears read are in inputs.cu. One block a row.
//   embed            rows * features * (code + 2) bytes
//   argmax           rows * vocabulary * 4 bytes, 16 a thread where the vocabulary is a multiple of
//   4 move_pages       twice the pages' bytes
// Rows whose slot is negative are padding: embed writes zeros for them, store_tokens nothing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace {

using Bf16 = __nv_bfloat16;

__device__ float wide16(uint16_t bits, bool bf16) {
  return bf16 ? __uint_as_float(uint32_t{bits} << 16) : __half2float(__ushort_as_half(bits));
}

// Weight formats by their number in base/dtype.h: int4, int8, f16, bf16, f32.
__device__ float stored(const StoredTable& t, int64_t row, int64_t col) {
  const int64_t i = row * t.cols + col;
  if (t.format == 4) return reinterpret_cast<const float*>(t.codes)[i];
  if (t.format >= 2) return wide16(reinterpret_cast<const uint16_t*>(t.codes)[i], t.format == 3);
  const int64_t g = row * (t.cols / t.group) + col / t.group;
  float q;
  if (t.format == 0)
    q = static_cast<float>((t.codes[i / 2] >> (i % 2 * 4)) & 15) - (t.zero == 0 ? 8.0f : 0.0f);
  else
    q = static_cast<float>(static_cast<int8_t>(t.codes[i]));
  if (t.zero == 1) q -= static_cast<float>(t.zeros[g]);
  const float w = wide16(t.scales[g], t.bf16_scales) * q;
  return t.zero == 2 ? w + wide16(t.minimums[g], t.bf16_scales) : w;
}

__global__ void embed_kernel(StoredTable t, int64_t vocab_begin, const int32_t* tokens,
                             int64_t max_tokens, const int32_t* slot, const int32_t* position,
                             Bf16* out) {
  const int64_t r = blockIdx.x;
  const bool padding = slot[r] < 0;
  const int64_t row = padding ? -1 : tokens[slot[r] * max_tokens + position[r]] - vocab_begin;
  const bool here = row >= 0 && row < t.rows;
  for (int64_t c = threadIdx.x; c < t.cols; c += blockDim.x)
    out[r * t.cols + c] = __float2bfloat16_rn(here ? stored(t, row, c) : 0.0f);
}

__global__ void to_bf16_kernel(int format, const void* in, Bf16* out, size_t count) {
  StoredTable t;
  t.format = format, t.cols = 0, t.codes = static_cast<const uint8_t*>(in);
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    out[i] = __float2bfloat16_rn(stored(t, 0, static_cast<int64_t>(i)));
}

__global__ void add_kernel(Bf16* residual, const Bf16* delta, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    residual[i] = __float2bfloat16_rn(__bfloat162float(residual[i]) + __bfloat162float(delta[i]));
}

__device__ bool better(const TokenCandidate& a, const TokenCandidate& b) {
  if (b.token < 0 || a.token < 0) return b.token < 0 && a.token >= 0;
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

template <int VEC>
__global__ void __launch_bounds__(1024)
    argmax_kernel(const float* logits, int64_t vocab_begin, int64_t vocab_count,
                  const uint8_t* forbid_eos, const int32_t* eos_ids, int32_t eos_count,
                  TokenCandidate* out) {
  const int64_t r = blockIdx.x;
  const int32_t ends = forbid_eos != nullptr && forbid_eos[r] ? eos_count : 0;
  TokenCandidate best{-INFINITY, -1};
  const auto look = [&](float logit, int64_t i) {
    // A NaN compares false; an id after one that is as good never wins. -inf may be the first.
    if (!(logit > best.logit || (best.token < 0 && logit == best.logit))) return;
    const auto token = static_cast<int32_t>(vocab_begin + i);
    bool allowed = true;
    for (int32_t e = 0; e < ends; ++e) allowed &= eos_ids[e] != token;
    if (allowed) best = {logit, token};
  };
  if constexpr (VEC == 4) {
    const auto* row = reinterpret_cast<const float4*>(logits + r * vocab_count);
    const auto packs = static_cast<int>(vocab_count / 4), step = static_cast<int>(blockDim.x);
    for (int first = static_cast<int>(threadIdx.x); first < packs; first += 4 * step) {
      float4 x[4];  // on their way together
#pragma unroll
      for (int k = 0; k < 4; ++k)
        x[k] = first + k * step < packs ? __ldg(row + first + k * step)
                                        : make_float4(NAN, NAN, NAN, NAN);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // Most packs hold nothing better: one branch for four.
        if (best.token >= 0 && !(fmaxf(fmaxf(x[k].x, x[k].y), fmaxf(x[k].z, x[k].w)) > best.logit))
          continue;
        const int64_t i = int64_t{4} * (first + k * step);
        look(x[k].x, i), look(x[k].y, i + 1), look(x[k].z, i + 2), look(x[k].w, i + 3);
      }
    }
  } else {
    for (int64_t i = threadIdx.x; i < vocab_count; i += blockDim.x)
      look(logits[r * vocab_count + i], i);
  }
  __shared__ TokenCandidate warps[32];
  const auto reduce = [&] {
    for (int i = 16; i > 0; i /= 2) {
      const TokenCandidate c{__shfl_xor_sync(~0u, best.logit, i),
                             __shfl_xor_sync(~0u, best.token, i)};
      if (better(c, best)) best = c;
    }
  };
  reduce();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : TokenCandidate{-INFINITY, -1};
  reduce();
  if (threadIdx.x == 0) out[r] = best;
}

__global__ void merge_kernel(const TokenCandidate* candidates, int32_t shards, int64_t rows,
                             int32_t* ids) {
  const int64_t r = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (r >= rows) return;
  TokenCandidate best = candidates[r];
  for (int32_t s = 1; s < shards; ++s)
    if (better(candidates[s * rows + r], best)) best = candidates[s * rows + r];
  ids[r] = best.token;
}

__global__ void store_kernel(const int32_t* ids, const int32_t* slot, const int32_t* position,
                             int64_t rows, int32_t* tokens, int64_t max_tokens) {
  const int64_t r = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (r < rows && slot[r] >= 0) tokens[slot[r] * max_tokens + position[r]] = ids[r];
}

// Block (page, layer): packed [count, all_layers, k | v | k_scale | v_scale].
__global__ void pages_kernel(const __grid_constant__ PagePools pools, int first_layer,
                             int all_layers, size_t value_words, size_t scale_words,
                             const int32_t* pages, uint32_t* packed, bool gather) {
  const size_t page_words = 2 * (value_words + scale_words);
  const auto page = static_cast<size_t>(pages[blockIdx.x]);
  uint32_t* at = packed + (size_t{blockIdx.x} * all_layers + first_layer + blockIdx.y) * page_words;
  for (int part = 0; part < 4; ++part) {
    const size_t words = part < 2 ? value_words : scale_words;
    if (words == 0) continue;
    uint32_t* pool = pools.part[blockIdx.y][part] + page * words;
    for (size_t i = threadIdx.x; i < words; i += blockDim.x)
      gather ? at[i] = pool[i] : pool[i] = at[i];
    at += words;
  }
}

unsigned blocks_for(size_t count) {
  return static_cast<unsigned>(std::min<size_t>((count + 255) / 256, 4096));
}
// A block's threads for this many packs of work: whole warps.
unsigned threads_for(int64_t packs, unsigned most) {
  return std::min(most, static_cast<unsigned>((std::max<int64_t>(packs, 1) + 31) / 32 * 32));
}

}  // namespace

void embed(const StoredTable& table, int64_t vocab_begin, const int32_t* tokens, int64_t max_tokens,
           const int32_t* row_slot, const int32_t* row_position, int32_t rows, void* out,
           cudaStream_t s) {
  if (rows == 0) return;
  embed_kernel<<<rows, 256, 0, s>>>(table, vocab_begin, tokens, max_tokens, row_slot, row_position,
                                    static_cast<Bf16*>(out));
}

void to_bf16(int format, const void* in, void* out, size_t count, cudaStream_t s) {
  if (count == 0) return;
  to_bf16_kernel<<<blocks_for(count), 256, 0, s>>>(format, in, static_cast<Bf16*>(out), count);
}

void add_rows(void* residual, const void* delta, size_t count, cudaStream_t s) {
  if (count == 0) return;
  add_kernel<<<blocks_for(count), 256, 0, s>>>(static_cast<Bf16*>(residual),
                                               static_cast<const Bf16*>(delta), count);
}

void argmax(const float* logits, int64_t rows, int64_t vocab_begin, int64_t vocab_count,
            const uint8_t* forbid_eos, const int32_t* eos_ids, int32_t eos_count,
            TokenCandidate* out, cudaStream_t s) {
  if (rows == 0) return;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(rows), threads_for(vocab_count / 4, 1024), 0, s>>>(
        logits, vocab_begin, vocab_count, forbid_eos, eos_ids, eos_count, out);
  };
  vocab_count % 4 == 0 ? launch(argmax_kernel<4>) : launch(argmax_kernel<1>);
}

void merge_argmax(const TokenCandidate* candidates, int32_t shards, int64_t rows, int32_t* ids,
                  cudaStream_t s) {
  if (rows == 0) return;
  merge_kernel<<<static_cast<unsigned>((rows + 127) / 128), 128, 0, s>>>(candidates, shards, rows,
                                                                         ids);
}

void store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position, int64_t rows,
                  int32_t* tokens, int64_t max_tokens, cudaStream_t s) {
  if (rows == 0) return;
  store_kernel<<<static_cast<unsigned>((rows + 127) / 128), 128, 0, s>>>(ids, slot, position, rows,
                                                                         tokens, max_tokens);
}

void move_pages(const PagePools& pools, int layers, int first_layer, int all_layers,
                size_t value_words, size_t scale_words, const int32_t* pages, int32_t count,
                uint32_t* packed, bool gather, cudaStream_t s) {
  if (count == 0 || layers == 0) return;
  const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(layers));
  pages_kernel<<<grid, 256, 0, s>>>(pools, first_layer, all_layers, value_words, scale_words, pages,
                                    packed, gather);
}

}  // namespace drover::cuda
