// Random weights and activations of the Hopper linears' benches, made on the GPU.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                               \
  do {                                                                            \
    const cudaError_t e_ = (call);                                                \
    if (e_ != cudaSuccess) {                                                      \
      std::printf("%s: %s (line %d)\n", #call, cudaGetErrorString(e_), __LINE__); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

namespace {

__device__ uint32_t hash(uint64_t i, uint32_t seed) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1b54a32d192ed03ull;
  x ^= x >> 31, x *= 0xbf58476d1ce4e5b9ull, x ^= x >> 29, x *= 0x94d049bb133111ebull;
  return static_cast<uint32_t>(x >> 32);
}
__device__ float normal(uint64_t i, uint32_t seed) {
  const float u = (hash(i, seed) + 1.0f) * 0x1p-32f, v = hash(i, seed + 77) * 0x1p-32f;
  return sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
}
__device__ int bell(uint64_t i, uint32_t seed) {
  return min(15, max(0, static_cast<int>(rintf(8.0f + 2.6f * normal(i, seed)))));
}
__global__ void make_codes(uint8_t* to, size_t count, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    to[i] = static_cast<uint8_t>(bell(2 * i, seed) | bell(2 * i + 1, seed) << 4);
}
__global__ void make_scales(uint16_t* to, size_t count, uint32_t seed, bool bf16) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float s = 0.004f * (1.0f + hash(i, seed) * 0x1p-32f);
    const __half h = __float2half_rn(s);
    to[i] = bf16 ? static_cast<uint16_t>(__float_as_uint(s) >> 16)
                 : *reinterpret_cast<const uint16_t*>(&h);
  }
}
__global__ void make_x(void* to, float* scale, size_t count, size_t k, bool fp8, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const float x = normal(i, seed);
    if (fp8) {
      const __nv_fp8_e4m3 v(x * 110.0f);
      static_cast<uint8_t*>(to)[i] = *reinterpret_cast<const uint8_t*>(&v);
      if (i % k == 0) scale[i / k] = (1.0f + hash(i, seed + 5) * 0x1p-32f) / 110.0f;
    } else {
      static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(__float_as_uint(x) >> 16);
    }
  }
}

}  // namespace
