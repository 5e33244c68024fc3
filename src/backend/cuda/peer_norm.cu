// The sum of all ranks' parts of some rows, the residual and the norm in one kernel, over memory
// that all ranks' GPUs reach (comm/comm.h, PeerMemory): for few rows, where a sum of NCCL is
// latency. A block a row, as norm's (inputs.cu), with the same order of sums.
//
// Each rank writes its part into the memory of every other and waits for theirs in its own: one
// way over the link, no flags. A word (two bf16) that is all ones has not come yet; a part that has
// such a word sends another NaN. (Lamport, "A fast mutual exclusion algorithm", TOCS 1987, waited
// at values so; TensorRT-LLM's one-shot sum does.) Who has read a word sets it to all ones again.
//
// A rank's memory is a header and two halves of [ranks, rows, features]; calls use the halves by
// turns, and the header counts them on the device, so that graphs replay. Why two are enough: rank
// B writes into A's half h again two calls later, in call k + 2. Its call k + 1 has ended then, so
// that A's parts of k + 1 had come; A wrote them after its call k had ended, and with it the
// reading and clearing of h. And a word is written once a call and only then read as data, so
// nothing is torn, whatever the width of a store on its way.
//
// Blocks of a row wait for the same row's blocks of the peers, and write before they wait; the
// grid fits the device at once (peer_sums). So nobody waits for a block that cannot start.
//
// Bytes a row and peer: 2 * features out, as many in. The parts are added in rank order in f32.
#include <algorithm>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/input_rows.cuh"
#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace {

using namespace input_rows;

constexpr int kPacks = 2;             // of a thread
constexpr uint32_t kNothing = ~0u;    // a word that has not come
constexpr uint32_t kLook = 1024;      // polls between two looks at `stop`, some 0.4 ms
enum { kCalls, kArrived, kRunning };  // words of the header; kArrived counts down from all ones

struct PeerRows {
  Bf16* residual;
  const Bf16* delta;
  const float* weight;  // null: no norm
  float epsilon;
  void* out;
  float* scale;  // null: bf16
  int64_t features;
  Peers peers;
};

// Past the first-level cache, which does not see what others write.
__device__ uint4 load_far(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ void store_far(void* p, const uint4& v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ bool complete(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)) != kNothing; }
__device__ uint32_t sendable(uint32_t word) { return word == kNothing ? 0xffff7fffu : word; }

__device__ void add_words(const uint4& v, float (&sum)[8], bool first) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float low = __uint_as_float(words[j] << 16),
                high = __uint_as_float(words[j] & 0xffff0000u);
    sum[2 * j] = first ? low : sum[2 * j] + low;
    sum[2 * j + 1] = first ? high : sum[2 * j + 1] + high;
  }
}

// Asked to stop, no later call waits either.
__device__ bool stopped(const Peers& peers, uint32_t* header) {
  uint32_t word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(peers.stop) : "memory");
  if (word != 0) atomicExch(header + kRunning, 0);
  return word != 0;
}

// MOST: ranks at most.
template <int MOST, bool FP8>
__global__ void __launch_bounds__(MOST > 2 ? kThreads : threads_bound(kPacks), MOST > 2 ? 1 : 2)
    peer_norm_kernel(const __grid_constant__ PeerRows a) {
  dependency_launch();
  const Output out{a.out, a.scale, a.features};  // one block a row, which the compiler sees
  const int64_t r = row_of_block(out);
  const Peers& peers = a.peers;
  Weights<8> weights[kPacks];
  if (a.weight != nullptr)
    each<8, kPacks>(out, [&](int k, int p) { weights[k].load(a.weight, p); });
  dependency_wait();
  auto* header = static_cast<uint32_t*>(peers.memory[peers.rank]);
  const uint4 state = load_far(header);
  auto* x = reinterpret_cast<uint4*>(a.residual + r * out.features);
  const auto* part = reinterpret_cast<const uint4*>(a.delta + r * out.features);
  uint4 mine[kPacks], before[kPacks], got[kPacks][MOST - 1];
  each<8, kPacks>(out, [&](int k, int p) { mine[k] = part[p], before[k] = x[p]; });

  // f(i, q) for the other ranks q, the i-th of them.
  const auto others = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < MOST - 1; ++i)
      if (i < peers.size - 1) f(i, i < peers.rank ? i : i + 1);
  };
  // The k-th pack of this thread in the memory of rank `at`, from rank `from`.
  const auto row_bytes = static_cast<uint32_t>(out.features) * 2;
  const uint32_t part_bytes = row_bytes * static_cast<uint32_t>(peers.rows);
  const uint32_t begin = kPeerHeader + state.x % 2 * peers.size * part_bytes +
                         static_cast<uint32_t>(r) * row_bytes + threadIdx.x * 16;
  const auto place = [&](void* at, int from, int k) {
    return static_cast<char*>(at) + (begin + from * part_bytes + k * blockDim.x * 16);
  };
  others([&](int, int q) {
    void* const to = peers.memory[q];
    each<8, kPacks>(out, [&](int k, int) {
      store_far(place(to, peers.rank, k), make_uint4(sendable(mine[k].x), sendable(mine[k].y),
                                                     sendable(mine[k].z), sendable(mine[k].w)));
    });
  });
  for (uint32_t polls = 1;; ++polls) {
    others([&](int i, int q) {  // all on their way together
      each<8, kPacks>(out, [&](int k, int) { got[k][i] = load_far(place(header, q, k)); });
    });
    bool there = true;
    others([&](int i, int) {
      each<8, kPacks>(out, [&](int k, int) { there = there && complete(got[k][i]); });
    });
    if (there || state.z != kNothing) break;
    if (polls % kLook == 0 && stopped(peers, header)) break;
  }

  Pack<8> held[kPacks];
  float squares = 0;
  each<8, kPacks>(out, [&](int k, int p) {
    float sum[8];
#pragma unroll
    for (int q = 0; q < MOST; ++q) {
      if (q >= peers.size) break;
      uint4 v = mine[k];
      if (q < MOST - 1 && q < peers.rank) v = got[k][q < MOST - 1 ? q : 0];
      if (q > 0 && q > peers.rank) v = got[k][q > 0 ? q - 1 : 0];
      add_words(v, sum, q == 0);
    }
    held[k] = added(__builtin_bit_cast(Pack<8>, before[k]), rounded(sum));
    x[p] = __builtin_bit_cast(uint4, held[k]);
    add_squares(held[k], squares);
    others([&](int, int q) {
      store_far(place(header, q, k), make_uint4(kNothing, kNothing, kNothing, kNothing));
    });
  });
  const float scale = norm_scale(squares, out.features, a.epsilon);
  // All threads of the block have looked at the header. The last block counts the call.
  uint32_t arrived = 0;  // looked at later: it takes a while
  if (threadIdx.x == 0) arrived = atomicSub(header + kArrived, 1u);
  if (a.weight != nullptr)
    write_row<8, kPacks, FP8>(out, r,
                              [&](int k, int) { return scaled(held[k], scale, weights[k]); });
  if (threadIdx.x == 0 && arrived == ~(gridDim.x - 1)) {
    header[kArrived] = ~0u;
    header[kCalls] = state.x + 1;
  }
}

template <int MOST>
void launch(const PeerRows& a, int64_t rows, cudaStream_t s) {
  launch_dependent(
      a.scale != nullptr ? peer_norm_kernel<MOST, true> : peer_norm_kernel<MOST, false>,
      static_cast<unsigned>(rows), row_threads(a.features / 8, kPacks), 0, s, 1, a);
}

}  // namespace

void peer_norm(const Peers& peers, void* residual, const void* delta, const float* weight,
               void* out, float* out_scale, int64_t rows, int64_t features, float epsilon,
               cudaStream_t s) {
  if (rows == 0) return;
  const PeerRows a{static_cast<Bf16*>(residual),
                   static_cast<const Bf16*>(delta),
                   weight,
                   epsilon,
                   out,
                   out_scale,
                   features,
                   peers};
  if (peers.size <= 2) return launch<2>(a, rows, s);
  if (peers.size <= 4) return launch<4>(a, rows, s);
  launch<8>(a, rows, s);
}

}  // namespace drover::cuda
