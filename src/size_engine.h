// The sizes of the scheduler, the worker and the KV cache, from the options and the device's
// memory.
#pragma once

#include "backend/backend.h"
#include "base/options.h"
#include "comm/grid.h"
#include "comm/world.h"
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
  MemoryPlan plan;
};

// Collective. Logs the plan on a GPU. Throws kUsage for sizes that cannot work, kEnvironment when
// the device is too small, naming a grid that would fit.
EngineSizes size_engine(const Options& options, const Architecture& arch, const Shard& shard,
                        int group, const Grid& grid, const Backend& backend, bool gpu, World& world,
                        Interrupt& interrupt);

}  // namespace drover
