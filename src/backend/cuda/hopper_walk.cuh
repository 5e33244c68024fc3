// What a launch of a Hopper linear is told, and which tiles a worker of it does.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DROVER_ANYWHERE __host__ __device__
#else
#define DROVER_ANYWHERE  // in tests
#endif

namespace drover::cuda::hopper {

struct Args {
  const char* records;
  const void* in;
  const float* in_scale;  // [M], null for bf16
  void* out;
  float* partials;
  uint32_t* counters;
  int rows;  // M
  int64_t n;
  int blocks;  // of 128 columns
  int token_tiles, whole_tiles, split_tiles;
  int workers, split_workers;  // hopper_split.h
  int share, longer;  // blocks of a share of the split tiles, of the first so many one more
  int stages;
  uint64_t policy;  // of L2, for weights
  bool f32_out, bf16_scales, gated;
};

// Equal shares of `tiles` split tiles for `workers` workers.
inline void split_among(Args& a, int tiles, int workers) {
  a.split_tiles = tiles, a.split_workers = workers;
  if (workers > 0) a.share = tiles * a.blocks / workers, a.longer = tiles * a.blocks % workers;
}

// A worker's run of columns of one tile.
struct Segment {
  int tile, begin, end;
};

// The segments of a worker, in order.
class Walk {
 public:
  DROVER_ANYWHERE Walk(const Args& a, int worker)
      : tile_(worker), at_(share(a, worker)), end_(share(a, worker + 1)) {}
  DROVER_ANYWHERE bool next(const Args& a, Segment& s) {
    if (tile_ < a.whole_tiles) {
      s = {tile_, 0, a.blocks};
      tile_ += a.workers;
      return true;
    }
    if (at_ >= end_) return false;
    const int tile = at_ / a.blocks, first = tile * a.blocks;
    const int stop = end_ < first + a.blocks ? end_ : first + a.blocks;
    s = {a.whole_tiles + tile, at_ - first, stop - first};
    at_ = stop;
    return true;
  }
  // Where a worker's share of the split tiles' blocks begins.
  DROVER_ANYWHERE static int share(const Args& a, int worker) {
    const int w = worker < a.split_workers ? worker : a.split_workers;
    return w * a.share + (w < a.longer ? w : a.longer);
  }
  // Whose share a block of the split tiles is in.
  DROVER_ANYWHERE static int sharer(const Args& a, int block) {
    const int longer = a.longer * (a.share + 1);
    return block < longer ? block / (a.share + 1) : a.longer + (block - longer) / a.share;
  }

 private:
  int tile_, at_, end_;
};

}  // namespace drover::cuda::hopper
