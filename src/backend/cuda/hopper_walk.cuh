// What a launch of a Hopper linear is told, and which tiles a worker of it does.
#pragma once

#include <cstdint>

namespace drover::cuda::hopper {

struct Args {
  const char* records;
  const float* in_scale;  // [M], null for bf16
  void* out;
  float* partials;
  uint32_t* counters;
  int rows;  // M
  int64_t n;
  int blocks;  // of 128 columns
  int token_tiles, whole_tiles, split_tiles;
  int workers, stages;
  uint64_t policy;  // of L2, for weights
  bool f32_out, bf16_scales, gated;
};

// A worker's run of columns of one tile.
struct Segment {
  int tile, begin, end;
};

// The segments of a worker, in order.
class Walk {
 public:
  __device__ Walk(const Args& a, int worker) : tile_(worker) {
    const int units = a.split_tiles * a.blocks;
    at_ = share(a, worker, units), end_ = share(a, worker + 1, units);
  }
  __device__ bool next(const Args& a, Segment& s) {
    if (tile_ < a.whole_tiles) {
      s = {tile_, 0, a.blocks};
      tile_ += a.workers;
      return true;
    }
    if (at_ >= end_) return false;
    const int tile = at_ / a.blocks, first = tile * a.blocks;
    const int stop = min(end_, first + a.blocks);
    s = {a.whole_tiles + tile, at_ - first, stop - first};
    at_ = stop;
    return true;
  }
  // Where a worker's share of the split tiles' blocks begins.
  __device__ static int share(const Args& a, int worker, int units) {
    return worker * units / a.workers;  // below 2^31 (plan_hopper)
  }

 private:
  int tile_, at_, end_;
};

}  // namespace drover::cuda::hopper
