// Replicas that get their weights from the first one: it reads the store, the others only learn
// what each tensor is, and receive the device's memory as the first one's backend laid it out.
#pragma once

#include <memory>

#include "comm/comm.h"
#include "model/weights.h"

namespace drover {

// `replicas`: over host memory, the ranks that own the same shard, rank 0 of it in the first
// replica; outlives the source. read() is collective there, in the same order everywhere. On the
// other ranks it gives tensors whose bytes are awaited (WeightRecipe::awaited), but for vectors
// and permutations. Decoder::share then fills them.
std::unique_ptr<WeightSource> share_weights(std::unique_ptr<WeightSource> source, Comm& replicas);

}  // namespace drover
