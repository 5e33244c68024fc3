// How the tiles of a Hopper linear are given to workers: whole ones in waves, and those of a wave
// that is not full cut by columns. Plain C++, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace drover::cuda {

struct TileSplit {
  int workers = 1;      // in the grid
  int whole_tiles = 0;  // the first ones, by one worker each
  // The rest, whose blocks of columns lie in one row, cut into equal shares for the first
  // split_workers of the grid. Each has a block or more.
  int split_tiles = 0, split_workers = 0;
  double blocks = 0;  // estimated time, in blocks of columns of one tile
};

// What a split may use and what it costs.
struct SplitLimits {
  int64_t partials = 0;  // partial tiles that the workspace has room for; a share needs two
  int64_t counters = 0;  // tiles that may be split
  // Blocks of columns that summing up a tile of two parts takes as long as; stream-K takes three
  // times that: workers end within two tiles, and tiles have three parts.
  double fix_up = 0;
};

// tiles of `blocks` blocks of columns each on at most `workers` workers: what is estimated to take
// least of
//   whole tiles in waves;
//   whole waves, and each tile of the last in as many equal parts as there are workers for it: one
//     part a worker, all parts of a tile of one length;
//   whole waves but the last full one, and the rest in equal shares for all (stream-K): every
//     worker is busy to the end, but most begin or end within two tiles.
inline TileSplit split_tiles(int tiles, int blocks, int workers, const SplitLimits& limits) {
  const int waves = tiles / workers, left = tiles % workers;
  TileSplit best{std::min(tiles, workers), tiles, 0, 0,
                 static_cast<double>(waves + (left > 0 ? 1 : 0)) * blocks};
  const auto offer = [&](const TileSplit& s) {
    if (int64_t{s.split_workers} * 2 <= limits.partials && s.split_tiles <= limits.counters &&
        s.blocks < best.blocks)
      best = s;
  };
  if (left == 0) return best;
  for (int parts = workers / left; parts > 1; --parts)
    if (blocks % parts == 0 && blocks / parts >= 4) {
      offer({waves > 0 ? workers : left * parts, waves * workers, left, left * parts,
             waves * blocks + blocks / parts + limits.fix_up});
      break;
    }
  const int rest = left + (waves > 0 ? workers : 0);
  const int64_t units = int64_t{rest} * blocks;
  // Four blocks a worker or more.
  const int sharing = waves > 0 ? workers : static_cast<int>(std::min<int64_t>(units / 4, workers));
  if (sharing > 1 && units < int64_t{1} << 31)
    offer({waves > 0 ? workers : sharing, tiles - rest, rest, sharing,
           static_cast<double>(int64_t{tiles} * blocks) / sharing + 3 * limits.fix_up});
  return best;
}

}  // namespace drover::cuda
