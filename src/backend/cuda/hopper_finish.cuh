// What becomes of a tile's totals: shared tiles are summed up by who comes last, rows of the output
// are written.
#pragma once

#include "backend/cuda/hopper_tile.cuh"

namespace drover::cuda::hopper {

template <typename T>
struct Finish {
  using Shared = typename T::Shared;
  using Consumer = typename T::Consumer;

  // The tile's tokens' scales are on their way while it is summed: from memory when they are
  // needed, a few at a time as there are registers, they took 4 % of a launch with 1,024 tokens.
  __device__ static void fetch_scales(const Args& a, const Shared& sh, const Consumer& me,
                                      int tile) {
    if constexpr (T::kFp8) {
      copies_wait();  // an unfinished tile's, which nobody waited for
      const int first = tile % a.token_tiles * T::kTokens;
      for (int i = me.thread; i < T::kTokens; i += 128) {
        const bool there = first + i < a.rows;
        copy_float(sh.scales + me.group * T::kScaleBytes + i * 4,
                   a.in_scale + (there ? first + i : 0), there);
      }
    }
  }

  // Floats of a worker's partial tile: [workers, 2, blocks of the cluster, warpgroup, sums / 4,
  // thread] float4.
  static constexpr int kPartials = T::kCluster * 2 * T::kSums * 128;

  // Leaves the sums of a shared tile in the workspace; true for the last to come, which then has
  // the sums of all. It is the end of a launch that waits for this, so: one thread fences for all
  // (the barrier makes their writes its own, and its reading theirs), and of two parts the last
  // keeps its own, since a + b is b + a to the bit.
  __device__ static bool add_partials(const Args& a, const Shared& sh, const Consumer& me,
                                      int worker, uint32_t rank, const Segment& s,
                                      float (&total)[T::kSums]) {
    constexpr int kOf = T::kSums / 4;  // float4 of a thread
    const int tile = s.tile - a.whole_tiles, first = tile * a.blocks;
    const auto place = [&](int w) {
      // A worker's share begins in one tile and ends in another or the same one.
      const int64_t slot = int64_t{w} * 2 + (Walk::share(a, w) >= first ? 0 : 1);
      return reinterpret_cast<float4*>(a.partials + slot * kPartials +
                                       (static_cast<int>(rank) * 2 + me.group) * T::kSums * 128) +
             me.thread;
    };
    float4* to = place(worker);
#pragma unroll
    for (int i = 0; i < kOf; ++i)
      __stcg(to + i * 128,
             make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]));
    const int from = Walk::sharer(a, first), end = Walk::sharer(a, first + a.blocks - 1) + 1;
    const uint32_t flag = sh.flags + me.group * 4;
    named_sync(1 + me.group, 128);
    if (me.thread == 0) {
      uint32_t* counter = a.counters + (tile * T::kCluster + static_cast<int>(rank)) * 2 + me.group;
      gpu_fence();
      const bool last = atomicAdd(counter, 1) + 1 == static_cast<uint32_t>(end - from);
      gpu_fence();
      if (last) *counter = 0;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(flag), "r"(static_cast<int>(last)) : "memory");
    }
    named_sync(1 + me.group, 128);
    if (load_shared_word(flag) == 0) return false;
    if (end - from == 2) {
      const float4* other = place(worker == from ? from + 1 : from);
#pragma unroll
      for (int i = 0; i < kOf; ++i) add(__ldcg(other + i * 128), total + 4 * i);
      return true;
    }
    // In the order of columns; of few tokens, parts are on their way together.
    constexpr int kTogether = kOf <= 4 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) total[i] = 0;
    for (int w = from; w < end; w += kTogether) {
      float4 part[kTogether][kOf];
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int i = 0; i < kOf; ++i)
          part[j][i] = w + j < end ? __ldcg(place(w + j) + i * 128) : float4{0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
#pragma unroll
        for (int i = 0; i < kOf; ++i) add(part[j][i], total + 4 * i);
    }
    return true;
  }
  __device__ static void add(float4 v, float* to) {
    to[0] += v.x, to[1] += v.y, to[2] += v.z, to[3] += v.w;
  }

  __device__ static uint32_t pack(float a, float b) {
    const __nv_bfloat162 r = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&r);
  }

  __device__ static void finish(const Args& a, const Shared& sh, const Consumer& me, uint32_t rank,
                                int tile, float (&total)[T::kSums]) {
    const int token = tile % a.token_tiles * T::kTokens;
    const int64_t row =
        int64_t{tile / a.token_tiles * T::kCluster + static_cast<int>(rank)} * 128 + me.group * 64;
    if constexpr (T::kFp8) {
      copies_wait();
      named_sync(1 + me.group, 128);
      const uint32_t scales = sh.scales + me.group * T::kScaleBytes + me.lane % 4 * 8;
#pragma unroll
      for (int j = 0; j < T::kTokens / 8; ++j) {
        const float2 scale = load_shared_pair(scales + j * 32);
#pragma unroll
        for (int i = 0; i < 4; ++i) total[4 * j + i] *= (i % 2 == 0 ? scale.x : scale.y) * 256.0f;
      }
    }
    // The next tile's scales may come once all have read these: the others begin with this, too.
    if (a.gated) {
      store_gated(a, sh, me, token, row, total);
    } else if (a.f32_out || a.n % 8 != 0) {
      named_sync(1 + me.group, 128);
      store_each(a, me, token, row, total);
    } else {
      store_rows(a, sh, me, token, row, total);
    }
  }

  // From the registers: logits, and widths that 16 bytes do not divide.
  __device__ static void store_each(const Args& a, const Consumer& me, int token, int64_t row,
                                    const float (&sums)[T::kSums]) {
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) {
      const int t = token + i / 4 * 8 + me.lane % 4 * 2 + i % 2;
      const int64_t r = row + me.warp * 16 + me.lane / 4 + i % 4 / 2 * 8;
      if (t >= a.rows || r >= a.n) continue;
      if (a.f32_out)
        static_cast<float*>(a.out)[t * a.n + r] = sums[i];
      else
        static_cast<__nv_bfloat16*>(a.out)[t * a.n + r] = __float2bfloat16_rn(sums[i]);
    }
  }

  // FEATURES of each token from shared memory, 16 bytes a thread, up to five on their way together.
  template <int FEATURES>
  __device__ static void store_chunk(const Args& a, uint32_t buffer, int thread, int token,
                                     int64_t feature, int64_t width) {
    constexpr int kOf = FEATURES / 8, kAll = T::kOutTokens * kOf, kEach = (kAll + 127) / 128;
    constexpr int kAtOnce = kEach % 5 == 0 ? 5 : kEach;
    static_assert(kAtOnce <= 5);
    const int64_t f = feature + thread % kOf * 8;
    auto* out = static_cast<__nv_bfloat16*>(a.out) + f;
#pragma unroll
    for (int k = 0; k < kEach; k += kAtOnce) {
      uint4 pieces[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = (k + i) * 128 + thread;
        if (piece < kAll)
          pieces[i] = load_shared(buffer + piece / kOf * T::kOutPitch + piece % kOf * 16);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int piece = (k + i) * 128 + thread, t = token + piece / kOf;
        if (piece < kAll && t < a.rows && f < width)
          *reinterpret_cast<uint4*>(out + t * width) = pieces[i];
      }
    }
  }

  // silu(gate) * up of both tokens of a thread's four sums, whose rows g are the gate's and g + 8
  // the up projection's; rounded as silu_gate (inputs.cu) has it from memory.
  __device__ static uint32_t gated(const float* d) {
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float x = __bfloat162float(__float2bfloat16_rn(d[i]));
      y[i] = __fdividef(x, 1.0f + __expf(-x)) * __bfloat162float(__float2bfloat16_rn(d[2 + i]));
    }
    return pack(y[0], y[1]);
  }

  // 32 features of a token.
  __device__ static void store_gated(const Args& a, const Shared& sh, const Consumer& me, int token,
                                     int64_t row, const float (&sums)[T::kSums]) {
    const uint32_t buffer = sh.out + me.group * T::kOutBytes;
    constexpr int kMatrices = T::kOutTokens / 8, kAtOnce = kMatrices < 4 ? kMatrices : 4;
    static_assert(kMatrices % kAtOnce == 0);
#pragma unroll
    for (int first = 0; first < T::kTokens; first += T::kOutTokens) {
      named_sync(1 + me.group, 128);
      const uint32_t to = buffer + me.warp * 16 + me.lane % (8 * kAtOnce) * T::kOutPitch;
#pragma unroll
      for (int j = 0; j < kMatrices; j += kAtOnce) {
        const float* d = sums + (first / 8 + j) * 4;
        if constexpr (kAtOnce == 1)
          store_transposed(to, gated(d));
        else if constexpr (kAtOnce == 2)
          store_transposed(to, gated(d), gated(d + 4));
        else
          store_transposed(to + j * 8 * T::kOutPitch, gated(d), gated(d + 4), gated(d + 8),
                           gated(d + 12));
      }
      named_sync(1 + me.group, 128);
      store_chunk<32>(a, buffer, me.thread, token + first, row / 2, a.n / 2);
    }
  }

  // Through shared memory: 64 features of a token are 128 bytes.
  __device__ static void store_rows(const Args& a, const Shared& sh, const Consumer& me, int token,
                                    int64_t row, const float (&sums)[T::kSums]) {
    const uint32_t buffer = sh.out + me.group * T::kOutBytes;
#pragma unroll
    for (int first = 0; first < T::kTokens; first += T::kOutTokens) {
      named_sync(1 + me.group, 128);
      const uint32_t to = buffer + me.warp * 32 + me.lane / 8 % 2 * 16;
#pragma unroll
      for (int j = 0; j < T::kOutTokens / 8; j += 2) {
        const float* d = sums + (first / 8 + j) * 4;
        if constexpr (T::kOutTokens == 8)
          store_transposed(to + me.lane % 8 * T::kOutPitch, pack(d[0], d[1]), pack(d[2], d[3]));
        else
          store_transposed(to + (j * 8 + me.lane / 16 * 8 + me.lane % 8) * T::kOutPitch,
                           pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
      }
      named_sync(1 + me.group, 128);
      store_chunk<64>(a, buffer, me.thread, token + first, row, a.n);
    }
  }
};

}  // namespace drover::cuda::hopper
