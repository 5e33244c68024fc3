// Writers of what linears read: norm, silu_gate, gather_columns, and attention's output on its way
// to e4m3. Each writes rows of bf16, or e4m3 codes with a scale a row (backend.h, LinearInput):
// what is quantized is the row of bf16 that would have been written.
//
// All are bound by memory. Bytes a row: norm features * (2 + 2 in, 2 out, and 2 or 1 out),
// silu_gate features * (4 in, 2 or 1 out), gather_columns and quantize_rows columns * (2 in, 2 or 1
// out).
// A row stays in registers (PACKS packs of 8 a thread) from the first read until its scale is
// known, so that nothing is read twice: one block a row of up to 8,192 features; for longer ones a
// cluster of up to 8 blocks, which tell each other their largest (sm_90), or one block with more
// registers. Rows that fit neither, and rows of no multiple of 8 features (VEC = 1), are read again
// from the caches (PACKS = 0).
//
// Measured on an H200 (copies 4,276 GB/s), to e4m3: norm of 8,192 features, 1,024 and 2,048
// rows, 16.7 and 39.9 us (82 and 69 %), with 512 threads a row 20.6 and 46.5. Measured on an H100
// (copy 3,018 GB/s) with 1, 64 and 1,024 rows, launches included: norm of 8,192 features 4.3, 4.7
// and 26.9 us (83 %), to e4m3 5.2, 5.4 and 27.7 us (70 %); silu_gate of 28,672 features 3.7, 4.9
// and 64.7 us (90 %), to e4m3 6.0, 8.8 and 71.7 us (68 %). Versions of the last: clusters at 1,024
// rows too 81.6 us; one block a row always, one a multiprocessor, 8.8, 9.3 and 86.3 us.
#include <algorithm>
#include <type_traits>

#include "backend/cuda/dependent_launch.cuh"
#include "backend/cuda/input_rows.cuh"
#include "backend/cuda/kernels.h"

namespace drover::cuda {
namespace {

using namespace input_rows;

struct NormRows {
  Bf16* residual;
  const Bf16* delta;
  const float* weight;
  float epsilon;
  const int32_t* select;
};

template <int VEC, int PACKS, bool FP8>
__global__ void __launch_bounds__(threads_bound(PACKS), 2) write_kernel(NormRows a, Output out) {
  dependency_launch();
  // With few rows their time is latencies, one after the other: weights come before the row does.
  Weights<VEC> weights[PACKS > 0 && PACKS <= 2 ? PACKS : 1];
  if constexpr (PACKS > 0 && PACKS <= 2)
    each<VEC, PACKS>(out, [&](int k, int p) { weights[k].load(a.weight, p); });
  dependency_wait();
  const int64_t i = row_of_block(out), r = a.select ? a.select[i] : i;
  auto* x = reinterpret_cast<Pack<VEC>*>(a.residual + r * out.features);
  const auto* d =
      a.delta ? reinterpret_cast<const Pack<VEC>*>(a.delta + r * out.features) : nullptr;
  Pack<VEC> held[PACKS > 0 ? PACKS : 1];
  float squares = 0;
  each<VEC, PACKS>(out, [&](int k, int p) {
    Pack<VEC> v = x[p];
    if (d) x[p] = v = added(v, d[p]);
    add_squares(v, squares);
    held[k] = v;
  });
  const float scale = norm_scale(squares, out.features, a.epsilon);
  write_row<VEC, PACKS, FP8>(out, i, [&](int k, int p) {
    Weights<VEC> late;
    if constexpr (PACKS == 0 || PACKS > 2) late.load(a.weight, p);
    const Weights<VEC>& w = PACKS == 0 || PACKS > 2 ? late : weights[k];
    return scaled(PACKS > 0 ? held[k] : x[p], scale, w);
  });
}

template <int VEC>
__device__ Pack<VEC> gated(const Pack<VEC>& g, const Pack<VEC>& u) {
  float y[VEC];
#pragma unroll
  for (int j = 0; j < VEC; ++j) {
    const float x = __bfloat162float(g.x[j]);
    // Above 2^126 the fast division gives 0, which is what is left of the product there.
    const float silu = __fdividef(x, 1.0f + __expf(-x));
    y[j] = silu * __bfloat162float(u.x[j]);
  }
  return rounded(y);
}

struct GateRows {
  const Bf16* in;
};

template <int VEC, int PACKS, bool FP8>
__global__ void __launch_bounds__(threads_bound(PACKS), 2) write_kernel(GateRows a, Output out) {
  dependency_launch();
  dependency_wait();
  const int64_t r = row_of_block(out);
  const auto* gate = reinterpret_cast<const Pack<VEC>*>(a.in + r * 2 * out.features);
  const auto* up = reinterpret_cast<const Pack<VEC>*>(a.in + r * 2 * out.features + out.features);
  write_row<VEC, PACKS, FP8>(out, r, [&](int, int p) { return gated<VEC>(gate[p], up[p]); });
}

struct PlainRows {
  const Bf16* in;
  int64_t stride;
};

template <int VEC, int PACKS, bool FP8>
__global__ void __launch_bounds__(threads_bound(PACKS), 2) write_kernel(PlainRows a, Output out) {
  dependency_launch();
  dependency_wait();
  const int64_t r = row_of_block(out);
  const auto* in = reinterpret_cast<const Pack<VEC>*>(a.in + r * a.stride);
  write_row<VEC, PACKS, FP8>(out, r, [&](int, int p) { return in[p]; });
}

struct GatedRows {
  const Bf16* in;
};

template <int VEC, int PACKS, bool FP8>
__global__ void __launch_bounds__(threads_bound(PACKS), 2) write_kernel(GatedRows a, Output out) {
  dependency_launch();
  dependency_wait();
  const int64_t r = row_of_block(out);
  const auto* in = reinterpret_cast<const Pack<VEC>*>(a.in + r * out.features);
  write_row<VEC, PACKS, FP8>(out, r, [&](int, int p) { return in[p]; });
}

struct GatheredRows {
  const Bf16* in;  // [segments, rows, segment_cols]
  int64_t segment_cols;
  const int32_t* index;
};

template <int VEC, int PACKS, bool FP8>
__global__ void __launch_bounds__(threads_bound(PACKS), 2)
    write_kernel(GatheredRows a, Output out) {
  dependency_launch();
  dependency_wait();
  const int64_t r = row_of_block(out), rows = gridDim.x / out.parts;
  const auto segment_cols = static_cast<int32_t>(a.segment_cols);
  write_row<VEC, PACKS, FP8>(out, r, [&](int, int p) {
    Pack<VEC> y;
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      const int32_t column = __ldg(a.index + p * VEC + j), segment = column / segment_cols;
      y.x[j] = a.in[(segment * rows + r) * segment_cols + (column - segment * segment_cols)];
    }
    return y;
  });
}

// A plain row of silu_gate needs no other block's help: many blocks a row, so that few rows are
// fast too.
template <int VEC>
__global__ void silu_kernel(const Bf16* in, Bf16* out, int64_t features) {
  dependency_launch();
  dependency_wait();
  const int64_t r = blockIdx.x;
  const auto* gate = reinterpret_cast<const Pack<VEC>*>(in + r * 2 * features);
  const auto* up = reinterpret_cast<const Pack<VEC>*>(in + r * 2 * features + features);
  auto* o = reinterpret_cast<Pack<VEC>*>(out + r * features);
  for (int64_t p = blockIdx.y * int64_t{blockDim.x} + threadIdx.x; p < features / VEC;
       p += int64_t{gridDim.y} * blockDim.x)
    o[p] = gated<VEC>(gate[p], up[p]);
}

template <int VEC, int PACKS, typename Source>
void launch(const Source& a, const Output& out, int64_t rows, int packs_a_thread, cudaStream_t s) {
  const int64_t packs = out.features / VEC;
  const auto blocks = static_cast<unsigned>(rows), block = row_threads(packs, packs_a_thread);
  using Kernel = void (*)(Source, Output);
  launch_dependent(out.scale != nullptr ? Kernel{write_kernel<VEC, PACKS, true>}
                                        : Kernel{write_kernel<VEC, PACKS, false>},
                   blocks, block, 0, s, 1, a, out);
}

// Few rows: eight multiprocessors for each.
template <typename Source>
void launch_cluster(const Source& a, Output out, int64_t rows, cudaStream_t s) {
  const int64_t packs = out.features / 8;
  out.parts = 8;
  const int64_t of_part = (packs + out.parts - 1) / out.parts;
  launch_dependent(static_cast<void (*)(Source, Output)>(write_kernel<8, 2, true>),
                   static_cast<unsigned>(rows * out.parts),
                   static_cast<unsigned>(((of_part + 1) / 2 + 31) / 32 * 32), 0, s,
                   static_cast<unsigned>(out.parts), a, out);
}

template <typename Source>
void write(const Source& a, const Output& out, int64_t rows, cudaStream_t s) {
  if (rows == 0) return;
  if (out.features % 8 != 0) return launch<1, 0>(a, out, rows, 1, s);
  // Many rows: half as many threads each, so that a multiprocessor has four at once.
  if (out.features <= 2 * 8 * kThreads && rows >= 512) return launch<8, 4>(a, out, rows, 4, s);
  if (out.features <= 2 * 8 * kThreads) return launch<8, 2>(a, out, rows, 2, s);
  // A norm's sum of squares is of one block.
  if constexpr (!std::is_same_v<Source, NormRows>)
    if (out.scale != nullptr && out.features <= 8 * 2 * 8 * kThreads && rows <= 128 &&
        has_dependent_launch())  // and clusters
      return launch_cluster(a, out, rows, s);
  if (out.features <= 8 * 8 * threads_bound(8)) return launch<8, 8>(a, out, rows, 8, s);
  launch<8, 0>(a, out, rows, 1, s);
}

}  // namespace

void norm(void* residual, const void* delta, const float* weight, void* out, float* out_scale,
          int64_t features, float epsilon, const int32_t* select, int64_t out_rows,
          cudaStream_t s) {
  const NormRows a{static_cast<Bf16*>(residual), static_cast<const Bf16*>(delta), weight, epsilon,
                   select};
  write(a, {out, out_scale, features}, out_rows, s);
}

void silu_gate(const void* in, void* out, float* out_scale, int64_t rows, int64_t features,
               cudaStream_t s) {
  if (rows == 0) return;
  if (out_scale != nullptr)
    return write(GateRows{static_cast<const Bf16*>(in)}, {out, out_scale, features}, rows, s);
  const auto launch_plain = [&](auto kernel, int vec) {
    const int64_t packs = features / vec;
    const dim3 grid(static_cast<unsigned>(rows),
                    static_cast<unsigned>(std::min<int64_t>((packs + 255) / 256, 64)));
    launch_dependent(kernel, grid, 256, 0, s, 1, static_cast<const Bf16*>(in),
                     static_cast<Bf16*>(out), features);
  };
  features % 8 == 0 ? launch_plain(silu_kernel<8>, 8) : launch_plain(silu_kernel<1>, 1);
}

void gather_columns(const void* in, int64_t segment_cols, const int32_t* index, void* out,
                    float* out_scale, int64_t rows, int64_t cols, cudaStream_t s) {
  write(GatheredRows{static_cast<const Bf16*>(in), segment_cols, index}, {out, out_scale, cols},
        rows, s);
}

void quantize_rows(const void* in, int64_t stride, void* out, float* out_scale, int64_t rows,
                   int64_t features, cudaStream_t s) {
  write(PlainRows{static_cast<const Bf16*>(in), stride}, {out, out_scale, features}, rows, s);
}

void quantize_gated(const void* in, void* out, float* out_scale, int64_t rows, int64_t features,
                    cudaStream_t s) {
  write(GatedRows{static_cast<const Bf16*>(in)}, {out, out_scale, features}, rows, s);
}

}  // namespace drover::cuda
