// The sizes of the scheduler, the worker and the KV cache, from the options and the device's
// memory.
#pragma once

#include "backend/backend.h"
#include "base/options.h"
#include "comm/grid.h"
#include "comm/world.h"
#include "engine/decoder.h"
#include "engine/worker.h"
#include "memory_plan.h"
#include "model/shard.h"
#include "sched/scheduler.h"

namespace drover {

struct EngineSizes {
  ReplicaLimits limits;
  WorkerLimits worker;
  KvShape kv;  // of this rank; as many pages as the poorest rank can hold
  int64_t logit_rows = 0;
  size_t page_bytes = 0;  // of a page over this rank's layers
  MemoryPlan plan;
};

// What sizes depend on of a rank and its device.
struct DeviceFacts {
  bool gpu = false;
  size_t free_bytes = 0;  // of the GPU; on the CPU the host's memory
  int rank = 0;           // for messages
  int local_ranks = 1;    // ranks of this host
  RowLayout rows;
};
DeviceFacts gpu_facts(size_t free_bytes, int rank, int local_ranks);  // of any GPU

// Of a run that asks for nothing else: slots, step_tokens and chunk_tokens.
ReplicaLimits default_limits(bool gpu);

// The sizes of one rank, pages as many as it could hold by itself: no ranks, no device. What
// `drover plan` tells. Throws as size_engine does.
EngineSizes size_shard(const Options& options, const Architecture& arch, const Shard& shard,
                       int group, const Grid& grid, const DeviceFacts& device);
// The rest of them once the ranks have agreed on the pages of the poorest one.
void settle_pages(EngineSizes& sizes, const Options& options, bool gpu, int32_t pages);

// Collective. Logs the plan on a GPU. Throws kUsage for sizes that cannot work, kEnvironment when
// the device is too small, naming a grid that would fit.
EngineSizes size_engine(const Options& options, const Architecture& arch, const Shard& shard,
                        int group, const Grid& grid, const Backend& backend, bool gpu, World& world,
                        Interrupt& interrupt);

}  // namespace drover
