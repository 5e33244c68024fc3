// How tiles of a Hopper linear are given to workers, without a GPU: every block of columns of every
// tile is summed exactly once, and what the kernel takes for granted of segments holds.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>
#include <vector>

#include "backend/cuda/hopper_split.h"
#include "backend/cuda/hopper_walk.cuh"

namespace drover::cuda {
namespace {

hopper::Args args_of(const TileSplit& s, int blocks) {
  hopper::Args a{};
  a.blocks = blocks, a.workers = s.workers, a.whole_tiles = s.whole_tiles;
  hopper::split_among(a, s.split_tiles, s.split_workers);
  return a;
}

// The most blocks that a worker has; what is wrong with a split fails the test.
int most_blocks(const TileSplit& s, int tiles, int blocks) {
  const hopper::Args a = args_of(s, blocks);
  std::vector<std::vector<int>> times(static_cast<size_t>(tiles),
                                      std::vector<int>(static_cast<size_t>(blocks)));
  std::map<int, std::set<int>> sharers;  // of a split tile
  int most = 0;
  // Equal parts of one length: a worker has one.
  const bool equal = s.split_workers > 0 && s.split_workers % s.split_tiles == 0 &&
                     blocks % (s.split_workers / s.split_tiles) == 0;
  for (int w = 0; w < s.workers; ++w) {
    int mine = 0, shared = 0;
    std::set<int> half;  // which of its two partial tiles a worker has used
    hopper::Segment g;
    for (hopper::Walk walk(a, w); walk.next(a, g);) {
      EXPECT_LT(g.begin, g.end);
      for (int k = g.begin; k < g.end; ++k)
        ++times.at(static_cast<size_t>(g.tile)).at(static_cast<size_t>(k));
      mine += g.end - g.begin;
      shared += g.tile >= s.whole_tiles ? 1 : 0;
      if (g.begin == 0 && g.end == blocks) continue;
      EXPECT_GE(g.tile, s.whole_tiles);
      const int first = (g.tile - s.whole_tiles) * blocks;
      EXPECT_TRUE(half.insert(hopper::Walk::share(a, w) >= first ? 0 : 1).second)
          << "worker " << w << " leaves two parts in one place";
      sharers[g.tile].insert(w);
    }
    // Less than two tiles of the last full wave and the rest; places in the workspace by worker.
    EXPECT_LE(shared, equal ? 1 : 3);
    EXPECT_TRUE(shared == 0 || w < s.split_workers);
    most = std::max(most, mine);
  }
  for (const auto& tile : times)
    for (const int n : tile) EXPECT_EQ(n, 1);
  for (const auto& [tile, who] : sharers) {
    const int first = (tile - s.whole_tiles) * blocks;
    EXPECT_EQ(hopper::Walk::sharer(a, first), *who.begin());
    EXPECT_EQ(hopper::Walk::sharer(a, first + blocks - 1), *who.rbegin());
    EXPECT_EQ(static_cast<int>(who.size()), *who.rbegin() - *who.begin() + 1);
  }
  return most;
}

constexpr SplitLimits kRoomy{1 << 20, 1 << 20, 6};

TEST(TileSplit, CoversEveryBlockOnce) {
  std::mt19937 random(std::random_device{}());
  const auto pick = [&](int from, int to) {
    return std::uniform_int_distribution<int>(from, to)(random);
  };
  for (int i = 0; i < 400; ++i) {
    const int tiles = pick(1, pick(0, 1) ? 40 : 700), blocks = pick(1, 90), workers = pick(1, 140);
    SplitLimits limits = kRoomy;
    limits.fix_up = pick(0, 12);
    if (pick(0, 2) == 0) limits.partials = pick(0, 2 * workers);
    if (pick(0, 2) == 0) limits.counters = pick(0, 2 * workers);
    SCOPED_TRACE(testing::Message() << tiles << " tiles of " << blocks << " blocks on " << workers
                                    << " workers, fix-up " << limits.fix_up << ", room for "
                                    << limits.partials << " and " << limits.counters);
    const TileSplit s = split_tiles(tiles, blocks, workers, limits);
    EXPECT_LE(s.workers, workers);
    EXPECT_LE(s.split_workers, s.workers);
    EXPECT_EQ(s.whole_tiles + s.split_tiles, tiles);
    EXPECT_LE(2 * s.split_workers, limits.partials);
    EXPECT_LE(s.split_tiles, limits.counters);
    const int most = most_blocks(s, tiles, blocks);
    // The estimate is of the busiest worker, and never worse than whole tiles.
    EXPECT_LE(s.blocks, (tiles + workers - 1) / workers * blocks);
    EXPECT_LE(most, s.blocks + 1);
  }
}

TEST(TileSplit, Llama70bLayersOn132) {
  // o and down of few tokens: two workers a tile, one part each.
  TileSplit s = split_tiles(64, 64, 132, kRoomy);
  EXPECT_EQ(s.workers, 128);
  EXPECT_EQ(s.split_workers, 128);
  EXPECT_EQ(most_blocks(s, 64, 64), 32);
  // gate_up: three waves, the 52 tiles left by two workers each.
  s = split_tiles(448, 64, 132, kRoomy);
  EXPECT_EQ(s.whole_tiles, 396);
  EXPECT_EQ(s.split_workers, 104);
  // A wave that is nearly full stays whole, as do tiles where splitting costs more than it saves.
  s = split_tiles(128, 64, 132, kRoomy);
  EXPECT_EQ(s.whole_tiles, 128);
  s = split_tiles(80, 64, 132, {1 << 20, 1 << 20, 13});
  EXPECT_EQ(s.split_tiles, 0);
}

TEST(TileSplit, WithoutRoomNothingIsSplit) {
  for (const SplitLimits& limits : {SplitLimits{0, 1 << 20, 0}, SplitLimits{1 << 20, 0, 0}}) {
    const TileSplit s = split_tiles(64, 64, 132, limits);
    EXPECT_EQ(s.whole_tiles, 64);
    EXPECT_EQ(s.split_tiles, 0);
    EXPECT_EQ(most_blocks(s, 64, 64), 64);
  }
}

}  // namespace
}  // namespace drover::cuda
