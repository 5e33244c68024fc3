// The instructions of sm_90a that the Hopper kernels use, one function each: mbarriers, bulk and
// tensor copies, wgmma with the A operand in registers. Addresses of shared memory are 32-bit
// shared-window addresses. PTX ISA 8.x, chapters "mbarrier", "cp.async.bulk" and "wgmma".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "backend/cuda/dependent_launch.cuh"

namespace drover::cuda::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the copy engine and to the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// On the same barrier of block `rank` of the cluster. Without `.release.cluster`, which would wait
// for memory at every arrival (half the speed): what is released is reads, and they have ended.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Whether it has come, without a wait: asked early, so that the answer is there when it is needed.
__device__ __forceinline__ bool barrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Bytes in order, 16-byte aligned, to this block.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void tensor_copy(uint32_t to, const CUtensorMap* map, int x, int y,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
// To the same place in every block of `mask`, each block's barrier counting its own bytes.
__device__ __forceinline__ void tensor_multicast(uint32_t to, const CUtensorMap* map, int x, int y,
                                                 uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(mask)
      : "memory");
}
// A float to shared memory, or a zero; this thread's copies are there after copies_wait().
__device__ __forceinline__ void copy_float(uint32_t to, const float* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(there ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from) {  // 16
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// What this thread has written to shared memory, for wgmma to read.
__device__ __forceinline__ void written_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
// Before and after a word that tells other blocks of what this one has written, or this one of
// theirs.
__device__ __forceinline__ void gpu_fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
// A barrier of some warps of a block; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// wgmma: D [64, n] f32 += A [64, k] (registers) * B [n, k]^T (shared memory). A and D registers of
// a wgmma are not touched from fence to the wait that ends it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Keeps the compiler from moving the makers of registers, or their uses, across this point. (Where
// it moves what makes A between two wgmmas, it must also wait between them.)
template <int COUNT>
__device__ __forceinline__ void pin(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int COUNT>
__device__ __forceinline__ void pin(uint32_t (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
// B: rows of 128 bytes, swizzled by 128 bytes, in groups of 8 rows (1,024 bytes, aligned to that).
// The k steps of 32 bytes are 2 apart in the descriptor.
__device__ constexpr uint64_t swizzled_descriptor(uint32_t address) {
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

#define DROVER_R4(a, b, c, d) "%" #a ",%" #b ",%" #c ",%" #d
#define DROVER_REGS4 DROVER_R4(0, 1, 2, 3)
#define DROVER_REGS8 DROVER_REGS4 "," DROVER_R4(4, 5, 6, 7)
#define DROVER_REGS16 DROVER_REGS8 "," DROVER_R4(8, 9, 10, 11) "," DROVER_R4(12, 13, 14, 15)
#define DROVER_REGS32                                                                      \
  DROVER_REGS16 "," DROVER_R4(16, 17, 18, 19) "," DROVER_R4(20, 21, 22, 23) "," DROVER_R4( \
      24, 25, 26, 27) "," DROVER_R4(28, 29, 30, 31)
#define DROVER_REGS64                                                                               \
  DROVER_REGS32 "," DROVER_R4(32, 33, 34, 35) "," DROVER_R4(36, 37, 38, 39) "," DROVER_R4(          \
      40, 41, 42,                                                                                   \
      43) "," DROVER_R4(44, 45, 46,                                                                 \
                        47) "," DROVER_R4(48, 49, 50,                                               \
                                          51) "," DROVER_R4(52, 53, 54,                             \
                                                            55) "," DROVER_R4(56, 57, 58,           \
                                                                              59) "," DROVER_R4(60, \
                                                                                                61, \
                                                                                                62, \
                                                                                                63)
#define DROVER_REGS80                                                                      \
  DROVER_REGS64 "," DROVER_R4(64, 65, 66, 67) "," DROVER_R4(68, 69, 70, 71) "," DROVER_R4( \
      72, 73, 74, 75) "," DROVER_R4(76, 77, 78, 79)
#define DROVER_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DROVER_D8(i) DROVER_D4(i), DROVER_D4(i + 4)
#define DROVER_D16(i) DROVER_D8(i), DROVER_D8(i + 8)
#define DROVER_D32(i) DROVER_D16(i), DROVER_D16(i + 16)
#define DROVER_D64(i) DROVER_D32(i), DROVER_D32(i + 32)
#define DROVER_D80(i) DROVER_D64(i), DROVER_D16(i + 64)
// Operands after the COUNT sums: four of A, B's descriptor, whether to add to D.
#define DROVER_WGMMA(N, COUNT, A0, A1, A2, A3, B, P)                                             \
  __device__ __forceinline__ void wgmma_e4m3(float(&d)[COUNT], const uint32_t* a, uint64_t b,    \
                                             bool add) {                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" DROVER_REGS##COUNT \
                 "}, {" DROVER_R4(A0, A1, A2, A3) "}, %" #B ", p, 1, 1;\n}"                      \
                 : DROVER_D##COUNT(0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                           \
                   "r"(static_cast<int>(add)));                                                  \
  }                                                                                              \
  __device__ __forceinline__ void wgmma_bf16(float(&d)[COUNT], const uint32_t* a, uint64_t b,    \
                                             bool add) {                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
                 ", 0;\n"                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" DROVER_REGS##COUNT \
                 "}, {" DROVER_R4(A0, A1, A2, A3) "}, %" #B ", p, 1, 1, 0;\n}"                   \
                 : DROVER_D##COUNT(0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                           \
                   "r"(static_cast<int>(add)));                                                  \
  }
DROVER_WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
DROVER_WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
DROVER_WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
DROVER_WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
DROVER_WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
DROVER_WGMMA(160, 80, 80, 81, 82, 83, 84, 85)
#undef DROVER_WGMMA

// Four 8 x 8 matrices of 16-bit elements, each transposed; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                                 uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(to), "r"(a),
               "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t to, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(a)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ __forceinline__ float2 load_shared_pair(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_word(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}

}  // namespace drover::cuda::hopper
