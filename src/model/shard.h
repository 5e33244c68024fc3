// Which part of a model one rank owns. Pure arithmetic.
#pragma once

#include <cstdint>
#include <string>

#include "model/architecture.h"

namespace drover {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};

struct Shard {
  int32_t tp = 1, tp_slot = 0;
  int32_t pp = 1, stage = 0;
  Range layers;  // of this stage
  Range heads;   // query heads
  Range kv_heads;
  Range intermediate;  // features of the gated MLP
  // Rows of the embedding and of the output layer; ceil split, the last may be short.
  Range vocab;
  bool first() const { return stage == 0; }
  bool last() const { return stage == pp - 1; }
};

// group: the quantization group along K, which row-parallel splits (o, down) must not cut; 0: none.
// Layers are split evenly, the remainder to the earlier stages but the last one first loses
// (it has the output layer). Throws kUsage; the message lists the tp (or pp) that would work.
Shard make_shard(const Architecture& a, int tp, int tp_slot, int pp, int stage, int group);

// Weights of one layer's linears on this rank: q, k, v, o, gate, up and down.
int64_t layer_weights(const Architecture& a, const Shard& shard);

// Throws kUsage unless the whole grid works.
void check_grid(const Architecture& a, int tp, int pp, int group);

}  // namespace drover
