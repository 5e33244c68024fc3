// out [M tokens, N] = x [M, K] * W^T on Hopper, for INT4 codes in symmetric groups of 128 columns.
//
// Operands are swapped: weight rows are wgmma's M, tokens its N, so that weights are the operand
// that comes from registers and codes become e4m3 or bf16 numbers on their way there, exactly:
//   e4m3: the byte n in 0..16 is the number n * 2^-9. A nibble is 2 m + s; with s it stands for
//     -(m + 1), else for m; (nibble + s * 0x81) is the byte of that times 2^-8. Three instructions
//     for four codes, one more for every other four. 2^8 goes into the tokens' scale.
//   bf16: 0x4300 | q is the number 128 + q; minus 136. Two or three instructions for two codes.
// (Swapping for the register operand: CUTLASS's mixed-input GEMM, example 55.)
//
// The sum of a group of 128 columns is made by the tensor cores, and added to the total in f32
// after a multiplication by the group's scale, as DeepGEMM does for FP8: tensor cores keep about 14
// bits of an FP8 sum, so they are never left with more than one group.
//
// A block is a producer warp and two consumer warpgroups, each with 64 weight rows and all of the
// block's tokens: while one adds a group to its totals, the other's wgmma runs. The ring in shared
// memory has a block of 128 columns a slot: records of weights as 1D bulk copies, tokens through a
// tensor map with the 128-byte swizzle, rows past M as zeros (up to 8 tokens of e4m3 by warps,
// those that there are). A consumer unpacks its next 16 registers of A while wgmma works on the
// last ones: of bf16 hopper_steps.cuh, of up to 16 tokens of e4m3 hopper_pairs.cuh (two blocks of
// columns a slot), of more hopper_rounds.cuh and of 256 hopper_parts.cuh. In a cluster of two each
// block fetches half of the tokens for both.
//
// A worker (block or cluster) does whole tiles in waves, the token tile running fastest, so that
// weights come from memory once and tokens stay in L2; tiles left over may be cut by columns
// (hopper_split.h; stream-K: Osama et al. arXiv 2301.03598). A shared tile's partial sums go to the
// workspace, and the warpgroup that comes last adds them in the order of columns: nobody waits, and
// the result does not depend on who came last.
//
// Bytes: codes and scales once from memory (0.516 byte a weight), x once for each 128 weight
// rows from L2, out once.
//
// Measured on an H100 (copy 2,441 GB/s; the four linears of a Llama-2-70B layer in a graph, each
// launched under the one before, bursts; ms, in brackets cuBLASLt with FP8 weights in other runs):
//   M                     1      16            32     64            128           256          512
//   W4A8                  0.163  0.163 (0.40)  0.167  0.176 (0.36)  0.234 (0.34)  0.40 (0.41)  0.84
//   share of copy         110 %  110 %         108 %  102 %         77 %
//   W4A16 (split before)  0.181  0.179                0.246         0.394         0.68
//   M                     1024
//   W4A8                  1.57 (1.47)
//   W4A16 (split before)  3.04
// The same of W4A8 on an H200, where copies of as many bytes take 0.104: M = 1 0.117, M = 16 0.123
// (as hopper_steps.cuh goes 0.1325 and 0.134; tokens by the copy engine 0.119 and 0.123, by warps
// 0.117 and 0.125), M = 32 0.125 (as hopper_steps.cuh goes 0.143), M = 64 0.150.
//
// Errors of W4A8 over |y|: 4.9e-5 before rounding to bf16, mean 7e-7 and largest 5e-6 of the sum of
// |terms| at K = 8192; with bf16 inputs 1e-7.
//
// Under load (700 W; clocks of 1,300 to 1,500 MHz; ms, in brackets cuBLASLt with FP8 weights in the
// same run), split as before: M = 256 0.487 (0.447), 512 0.898 (0.785), 1,024 1.662 (1.496), 2,048
// 3.213 (3.057); on an H200, in tiles of 256 tokens, 0.449 (0.413), 0.830 (0.762), 1.631 (1.481),
// 3.248 (2.902), on another 0.448 (0.427), 0.822 (0.784), 768 1.242 (1.125).
//
// What limits large M: energy. On an H200 tensor cores work two thirds of the time at M = 2,048,
// cuBLASLt's 84 % at a lower clock; but ways that need fewer cycles and no fewer instructions gain
// nothing under load: sums of half a tile by turns, so that a warpgroup's wgmmas run under its own
// additions, keep the tensor cores busy 99 % of the time without unpacking (two warpgroups that
// multiply and add by turns: 77 %), and lose 2 % of a sustained launch. What pays is less work:
// tokens fetched once for two blocks (3 to 4 %), codes unpacked once for 256 tokens
// (hopper_parts.cuh). Did not pay: 256 weight rows a block; issuing by turns; 192 tokens (3.37 ms
// where 160 take 3.21). Lost much: 128 x 256 tiles with all of a block's sums, which spill; an
// arrival with .release.cluster, which fences memory (3.7); divisions in the producer; registers of
// A made between two wgmmas, which then wait for each other (pin).
#pragma once

#include <type_traits>

#include "backend/cuda/hopper_finish.cuh"
#include "backend/cuda/hopper_pairs.cuh"
#include "backend/cuda/hopper_parts.cuh"
#include "backend/cuda/hopper_rounds.cuh"
#include "backend/cuda/hopper_steps.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Kernel {
  using Tile = T;
  using Many = std::conditional_t<(T::kTokens == 256), Parts<T>, Rounds<T>>;
  using OfFp8 = std::conditional_t<T::kPairs, Pairs<T>, Many>;
  using Sums = std::conditional_t<T::kFp8, OfFp8, Steps<T>>;

  // One thread. Its time for a slot is latency that nothing hides, so that divisions are a
  // segment's, not a slot's.
  struct Producer {
    const Args& a;
    const CUtensorMap* map;
    const typename T::Shared& sh;
    uint32_t rank;

    // Where a segment's weights begin.
    __device__ const char* records(const Segment& s) const {
      const int tile = s.tile / a.token_tiles * T::kCluster + static_cast<int>(rank);
      return a.records + (int64_t{tile} * a.blocks + s.begin) * T::kWBytes;
    }
    __device__ void weights(int slot, const char* from, int blocks) const {
      const uint32_t full = sh.full + slot * 8, to = sh.w + slot * T::kWSlot;
      barrier_expect(full, blocks * ((T::kCopied ? 0 : T::kXBytes) + T::kWBytes));
      bulk_copy(to, from, blocks * T::kWBytes, full, a.policy);
    }
    __device__ void tokens(int slot, int token, int block, int blocks) const {
      const uint32_t full = sh.full + slot * 8;
#pragma unroll
      for (int h = 0; h < T::kBlocks * T::kHalves; ++h) {
        if (T::kBlocks > 1 && h >= blocks) break;
        const uint32_t to = sh.x + slot * T::kXSlot + h * T::kTokens * 128;
        const int column = block * 128 + h * (128 / T::kHalves);
        if constexpr (T::kCluster == 1)
          tensor_copy(to, map, column, token, full);
        else
          tensor_multicast(to + rank * (T::kTokens / T::kCluster * 128), map, column,
                           token + static_cast<int>(rank) * (T::kTokens / T::kCluster), full,
                           (1 << T::kCluster) - 1);
      }
    }
  };

  __device__ static int blocks_of_slot(const Segment& s, int k) {
    return T::kBlocks == 1 ? 1 : min(T::kBlocks, s.end - k);
  }

  // The first weights are on their way before the launch before has ended.
  __device__ static void produce(const Producer& p, int worker) {
    const Args& a = p.a;
    const int stages = T::kUnrolled ? T::kSlots : a.stages;
    prefetch_map(p.map);
    int ahead = 0;
    Segment s;
    for (Walk walk(a, worker); ahead < stages && walk.next(a, s);) {
      const char* from = p.records(s);
      for (int k = s.begin; k < s.end && ahead < stages; k += T::kBlocks, from += T::kWSlot)
        p.weights(ahead++, from, blocks_of_slot(s, k));
      if (T::kUnrolled) break;
    }
    if (!T::kCopied) dependency_wait();
    typename T::Slot slot;
    uint32_t phases = ~0u;
    for (Walk walk(a, worker); walk.next(a, s);) {
      const char* from = p.records(s);
      const int token = s.tile % a.token_tiles * T::kTokens;
      if (T::kUnrolled) slot.index = 0;
      for (int k = s.begin; k < s.end; k += T::kBlocks, from += T::kWSlot) {
        const int blocks = blocks_of_slot(s, k);
        if (T::kUnrolled) slot.phase = (phases >> slot.index & 1) ^ 1;
        if (ahead > 0) {
          --ahead;
        } else {
          barrier_wait(p.sh.empty + slot.index * 8, slot.phase ^ 1);
          p.weights(slot.index, from, blocks);
        }
        if (!T::kCopied) p.tokens(slot.index, token, k, blocks);
        phases ^= 1u << slot.index;
        slot.next(stages);
      }
    }
  }

  // Where a launch waits for memory (kCopied), tokens do not go through the copy engine, which
  // would take them up behind the ring's weights: three warps copy them, a slot each in turn.
  __device__ static void copy_tokens(const Args& a, const typename T::Shared& sh, int worker) {
    constexpr int kWarps = 3, kChunks = 8 * T::kBlocks;  // 16 bytes, of a token in a slot
    const int warp = static_cast<int>(threadIdx.x) / 32 - 1, lane = threadIdx.x % 32;
    dependency_wait();
    const int chunk = lane % kChunks, half = chunk / 8;
    const auto* in = static_cast<const char*>(a.in);
    const int64_t width = int64_t{a.blocks} * 128;
    typename T::Slot slot;
    int turn = 0;
    Segment s;
    for (Walk walk(a, worker); walk.next(a, s);) {
      const int token = s.tile % a.token_tiles * T::kTokens;
      for (int k = s.begin; k < s.end; k += T::kBlocks, slot.next(a.stages)) {
        const bool mine = turn == warp;
        turn = turn + 1 == kWarps ? 0 : turn + 1;
        if (!mine) continue;
        barrier_wait(sh.empty + slot.index * 8, slot.phase ^ 1);
        // Rows past the last are not written: a sum is of its own token only.
        if (k + half < s.end) {
          const uint32_t to = sh.x + slot.index * T::kXSlot + half * T::kXBytes;
          const char* from = in + int64_t{k} * 128 + chunk * 16;
          for (int t = lane / kChunks; t < min(T::kTokens, a.rows - token); t += 32 / kChunks)
            copy_bytes(to + t * 128 + (chunk % 8 ^ t % 8) * 16, from + (token + t) * width);
        }
        copies_wait();
        written_for_wgmma();
        __syncwarp();
        if (lane == 0) barrier_arrive(sh.full + slot.index * 8);
      }
    }
  }

  __device__ static void consume(const Args& a, const typename T::Shared& sh, int worker,
                                 uint32_t rank) {
    const typename T::Consumer me;
    dependency_wait();
    Sums sums(me, sh);
    Segment s;
    for (Walk walk(a, worker); walk.next(a, s);) {
      float total[T::kSums];
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) total[i] = 0;
      Finish<T>::fetch_scales(a, sh, me, s.tile);
      sums.sum(a, sh, me, s, total);
      const bool whole = s.begin == 0 && s.end == a.blocks;
      if (whole || Finish<T>::add_partials(a, sh, me, worker, rank, s, total))
        Finish<T>::finish(a, sh, me, rank, s.tile, total);
    }
  }

  __device__ static void run(const Args& a, const CUtensorMap* map, char* shared) {
    const typename T::Shared sh(shared_address(shared), a.stages);
    const uint32_t rank = T::kCluster > 1 ? cluster_rank() : 0;
    const int worker = static_cast<int>(blockIdx.x) / T::kCluster;
    if constexpr (T::kUnrolled && T::Fixed::kThere) {
      if (sh.x != T::Fixed::kX || sh.empty != T::Fixed::kEmpty) __trap();
    }
    if (threadIdx.x == 0) {
      for (int i = 0; i < a.stages; ++i) {
        barrier_init(sh.full + i * 8, T::kCopied ? 2 : 1);
        barrier_init(sh.empty + i * 8,
                     8 * T::kCluster);  // a warp of either warpgroup, either block
      }
      barrier_init_fence();
    }
    if constexpr (T::kCluster > 1)
      cluster_sync();
    else
      __syncthreads();
    dependency_launch();
    if (threadIdx.x < 128) {
      fewer_registers<T::kProducerRegisters>();
      if (threadIdx.x == 0) produce({a, map, sh, rank}, worker);
      if (T::kCopied && threadIdx.x >= 32) copy_tokens(a, sh, worker);
    } else {
      more_registers<T::kConsumerRegisters>();
      consume(a, sh, worker, rank);
    }
    // The other block's arrivals come to this one's barriers.
    if constexpr (T::kCluster > 1) {
      __syncwarp();
      cluster_sync();
    }
  }
};

template <typename K>
__global__ void __launch_bounds__(K::Tile::kBound, K::Tile::kPerSm)
    linear_kernel(const __grid_constant__ Args a, const __grid_constant__ CUtensorMap map) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared[];
  K::run(a, &map, shared);
#endif
}

template <typename K, int CLUSTER>
cudaError_t launch(const Args& a, const CUtensorMap& map, const HopperConfig& c, cudaStream_t s) {
  // Raised once to what the device has; the attribute is the function's, not the call's.
  static const cudaError_t raised = cudaFuncSetAttribute(
      linear_kernel<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
  if (raised != cudaSuccess) return raised;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (CLUSTER > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = CLUSTER;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (c.variant.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(c.workers * CLUSTER));
  launch.blockDim = dim3(K::Tile::kThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(c.shared_bytes);
  launch.stream = s;
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, linear_kernel<K>, a, map);
}

// What a launch needs to know of a kernel.
struct Entry {
  cudaError_t (*launch)(const Args&, const CUtensorMap&, const HopperConfig&,
                        cudaStream_t) = nullptr;
  int slot_bytes = 0, fixed_bytes = 0, partials = 0;
  int slots = 0;   // 0: as many as there is room for
  int blocks = 1;  // of columns in a slot
};
template <bool FP8, int TOKENS, int CLUSTER, int PER_SM>
Entry entry() {
  using T = Tile<FP8, TOKENS, CLUSTER, PER_SM>;
  return {&launch<Kernel<T>, CLUSTER>, T::slot_bytes(), T::fixed_bytes(),
          Finish<T>::kPartials,        T::kSlots,       T::kBlocks};
}

// The kernel of a variant; its launch is null when there is none. One file each (build time).
Entry find_fp8(const HopperVariant& v);
Entry find_bf16(const HopperVariant& v);

template <bool FP8>
Entry find(const HopperVariant& v) {
  const int what = v.tokens * 10 + v.cluster;
  constexpr int kOfFew = FP8 ? 1 : 2;  // two blocks of e4m3 would be too many registers
  if (what == 81) return entry<FP8, 8, 1, kOfFew>();
  if (what == 161) return entry<FP8, 16, 1, kOfFew>();
  if (what == 321) return entry<FP8, 32, 1, kOfFew>();
  if (what == 641) return entry<FP8, 64, 1, 1>();
  if (what == 1281) return entry<FP8, 128, 1, 1>();
  if (what == 1282) return entry<FP8, 128, 2, 1>();
  if constexpr (FP8) {
    if (what == 1601) return entry<FP8, 160, 1, 1>();
    if (what == 1602) return entry<FP8, 160, 2, 1>();
    if (what == 2561) return entry<FP8, 256, 1, 1>();
  }
  return {};
}

}  // namespace drover::cuda::hopper
