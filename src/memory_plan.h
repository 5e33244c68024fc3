// What a rank will allocate on its device, told and checked before any of it is allocated.
#pragma once

#include <string>

#include "backend/backend.h"
#include "comm/grid.h"
#include "engine/worker.h"
#include "model/weights.h"

namespace drover {

struct MemoryPlan {
  // Bytes.
  size_t budget = 0;     // of the device's free memory, what drover may take
  size_t weights = 0;    // from the architecture; tables are taken for 16-bit ones
  size_t buffers = 0;    // activations, logits, token buffers, page tables
  size_t workspace = 0;  // of the backend
  size_t graphs = 0;     // recorded steps
  size_t comm = 0;       // of the communicators
  size_t kv = 0;         // what is left, or what was asked for

  size_t without_kv() const { return weights + buffers + workspace + graphs + comm; }
  // "weights 34.1 GiB, KV 88.0 GiB (563,200 tokens, ...), ..."
  std::string text(size_t page_bytes, const KvShape& kv, int32_t sequences) const;
};

// Bytes of the weights of one rank's shard.
size_t shard_weight_bytes(const Architecture& arch, const Shard& shard, int group);

// "--tp 2 --pp 1": the smallest grid of a replica whose ranks would hold the weights, these
// buffers and `kv` bytes of KV cache in `budget`; "none of up to 64 ranks" when there is none.
std::string grid_that_fits(const Architecture& arch, int group, size_t budget, size_t rest);

}  // namespace drover
