// Synthetic weights, made where they are used: 36 GB in 0.06 s on an H100 (580 to 640 GB/s), where
// one thread of the host makes 0.4 GB/s.
#include <algorithm>

#include "backend/cuda/device_weights.h"

namespace drover::cuda {
namespace {

__device__ uint64_t mix(uint64_t x) {  // as in model/synthetic.cc
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Bytes [at, at + 8) of the stream, the first lowest.
__device__ uint64_t random_bytes(uint64_t seed, uint64_t at) {
  const uint64_t word = mix(seed + at / 8);
  const int shift = static_cast<int>(at % 8) * 8;
  return shift == 0 ? word : word >> shift | mix(seed + at / 8 + 1) << (64 - shift);
}

template <int kBits>
struct Element {
  using Type = uint8_t;
};
template <>
struct Element<16> {
  using Type = uint16_t;
};
template <>
struct Element<32> {
  using Type = uint32_t;
};

// A warp a row, 16 bytes a thread and turn.
template <int kBits>
__global__ void __launch_bounds__(256)
    make_random_kernel(const __grid_constant__ RandomMatrix m, uint8_t* out) {
  constexpr int kElements = 128 / kBits;  // in 16 bytes
  __shared__ typename Element<kBits>::Type table[256];
  const int thread = static_cast<int>(threadIdx.y * 32 + threadIdx.x);
  table[thread] = static_cast<typename Element<kBits>::Type>(m.table[thread]);
  __syncthreads();
  const int64_t row_bytes = m.cols * kBits / 8, turns = (row_bytes + 15) / 16;
  const bool whole = row_bytes % 16 == 0;
  for (int64_t r = int64_t{blockIdx.x} * 8 + threadIdx.y; r < m.rows; r += int64_t{gridDim.x} * 8) {
    uint8_t* row = out + r * row_bytes;
    const int64_t begin = (m.row_begin + r) * m.all_cols + m.col_begin;
    for (int64_t turn = threadIdx.x; turn < turns; turn += 32) {
      uint32_t packed[4] = {};
      uint64_t random = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (e % 8 == 0)
          random = random_bytes(m.seed, static_cast<uint64_t>(begin + turn * kElements + e));
        const uint32_t value = table[random >> (8 * (e % 8)) & 0xff];
        packed[e * kBits / 32] |= value << (e * kBits % 32);
      }
      if (whole) {
        reinterpret_cast<uint4*>(row)[turn] = {packed[0], packed[1], packed[2], packed[3]};
      } else {
#pragma unroll
        for (int b = 0; b < 16; ++b) {
          if (turn * 16 + b < row_bytes)
            row[turn * 16 + b] = static_cast<uint8_t>(packed[b / 4] >> (8 * (b % 4)));
        }
      }
    }
  }
}

}  // namespace

void make_random(const RandomMatrix& m, void* out, cudaStream_t s) {
  if (m.rows == 0 || m.cols == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((m.rows + 7) / 8, 4096));
  const dim3 threads(32, 8);
  auto* to = static_cast<uint8_t*>(out);
  switch (m.bits) {
    case 4:
      make_random_kernel<4><<<blocks, threads, 0, s>>>(m, to);
      break;
    case 8:
      make_random_kernel<8><<<blocks, threads, 0, s>>>(m, to);
      break;
    case 16:
      make_random_kernel<16><<<blocks, threads, 0, s>>>(m, to);
      break;
    default:
      make_random_kernel<32><<<blocks, threads, 0, s>>>(m, to);
  }
}

}  // namespace drover::cuda
