#include "size_engine.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "engine/kv_cache.h"

namespace drover {

namespace {

// What is not given depends on the device.
struct Defaults {
  int32_t slots, step_tokens, chunk_tokens;
  int64_t logit_rows;  // of one block: all of a large step's would be much memory
};
constexpr Defaults kCpuDefaults{64, 256, 128, 128};
constexpr Defaults kGpuDefaults{2048, 2048, 2048, 512};

// A GPU's sequences: so many that the KV cache holds them at a length which is usual for answers.
constexpr int64_t kUsualTokens = 480;

// Bytes that cannot be known before: measured on an H200, rounded up.
constexpr size_t kGraphBytes = size_t{1} << 30;
constexpr size_t kCommBytes = size_t{1} << 30;  // NCCL's buffers, all communicators
constexpr size_t kWorkspaceBytes = size_t{256} << 20;

WorkerLimits worker_limits(const Options& options, const ReplicaLimits& l) {
  return {.slots = l.slots,
          .groups = l.groups,
          .max_positions = l.max_positions,
          .step_tokens = l.step_tokens,
          .page_tokens = l.page_tokens,
          .pages = l.pages,
          .step_seconds = options.number("step-seconds", 1, 1e6),
          .replay = options.flag("graphs")};
}

class Sizing {
 public:
  Sizing(const Options& options, const Architecture& arch, const Shard& shard, int group,
         const Grid& grid, const DeviceFacts& device)
      : options_(options),
        arch_(arch),
        shard_(shard),
        group_(group),
        grid_(grid),
        device_(device) {}

  EngineSizes run() {
    scheduler();
    cache();
    plan();
    pages();
    return sizes_;
  }

 private:
  int32_t number(const char* name, int64_t least, int64_t most) const {
    return static_cast<int32_t>(options_.integer(name, least, most));
  }
  int32_t or_default(const char* name, int64_t most, int32_t value) const {
    const int32_t given = number(name, 0, most);
    return given == 0 ? value : given;
  }

  void scheduler() {
    const Defaults d = device_.gpu ? kGpuDefaults : kCpuDefaults;
    ReplicaLimits& l = sizes_.limits;
    l.slots = or_default("max-sequences", 1 << 20, d.slots);
    l.page_tokens = number("page-tokens", 1, 4096);
    const int32_t length = number("max-length", 0, 1 << 24);
    DROVER_CHECK(length <= arch_.max_positions, ExitCode::kUsage,
                 "--max-length {}: the model allows {} positions", length, arch_.max_positions);
    l.max_positions = length == 0 ? arch_.max_positions : length;
    const int32_t groups = number("groups", 0, 1024);
    l.groups = groups == 0 ? grid_.pp : groups;
    DROVER_CHECK(l.groups >= grid_.pp, ExitCode::kUsage,
                 "--groups {}: {} pipeline stages need at least as many groups of sequences",
                 l.groups, grid_.pp);
    l.step_tokens = or_default("step-tokens", 1 << 20, d.step_tokens);
    l.chunk_tokens = or_default("chunk-tokens", 1 << 20, std::min(d.chunk_tokens, l.step_tokens));
    const std::string batching = options_.text("batching");
    DROVER_CHECK(batching == "continuous" || batching == "static", ExitCode::kUsage,
                 "--batching {}: expected continuous or static", batching);
    l.batching = batching == "static" ? Batching::kStatic : Batching::kContinuous;
    sizes_.logit_rows = std::min<int64_t>(l.step_tokens, d.logit_rows);
  }

  void cache() {
    sizes_.kv = {.format = kv_format(options_.text("kv")),
                 .pages = 0,
                 .page_tokens = sizes_.limits.page_tokens,
                 .kv_heads = static_cast<int32_t>(shard_.kv_heads.size()),
                 .head_size = arch_.head_size};
    sizes_.page_bytes = KvCache::page_bytes(sizes_.kv, shard_.layers.size());
  }

  void plan() {
    MemoryPlan& p = sizes_.plan;
    const int64_t wanted = options_.bytes("kv-memory");
    if (!device_.gpu) {
      // A CPU rank's weights, which it unpacks, and buffers come from the same memory; it has
      // always been enough. 16 bits a weight for bf16, on CPUs that multiply them; else 32.
      const std::string activations = options_.text("activations");
      const size_t element = activations == "f32" || activations == "fp8" ? 4 : 2;
      p.weights = shard_weight_bytes(arch_, shard_, 0) / 2 * element;
      p.buffers = Decoder::buffer_bytes(arch_, shard_, device_.rows, sizes_.limits.step_tokens,
                                        sizes_.logit_rows);
      p.kv = wanted != 0 ? static_cast<size_t>(wanted)
                         : device_.free_bytes / 5 / static_cast<size_t>(device_.local_ranks);
      return;
    }
    const double fraction = options_.number("gpu-memory-fraction", 0.01, 1.0);
    p.budget = static_cast<size_t>(static_cast<double>(device_.free_bytes) * fraction);
    if (options_.flag("share-gpu")) p.budget /= static_cast<size_t>(device_.local_ranks);
    p.weights = shard_weight_bytes(arch_, shard_, group_);
    const WorkerLimits worker = worker_limits(options_, sizes_.limits);
    p.buffers = Decoder::buffer_bytes(arch_, shard_, device_.rows, sizes_.limits.step_tokens,
                                      sizes_.logit_rows) +
                Worker::buffer_bytes(worker);
    p.workspace = kWorkspaceBytes;
    p.graphs = worker.replay ? kGraphBytes : 0;
    p.comm = grid_.replica_ranks() > 1 ? kCommBytes : 0;
    const size_t least = std::max(2 * sizes_.page_bytes, static_cast<size_t>(wanted));
    if (p.without_kv() + least > p.budget) {
      const double gib = static_cast<double>(size_t{1} << 30);
      DROVER_FAIL(
          ExitCode::kEnvironment,
          "rank {}: the GPU has {:.1f} GiB for drover (--gpu-memory-fraction {}), but {} needs "
          "{:.1f} GiB for weights, {:.1f} for buffers and the like and {:.1f} for the KV cache; a "
          "grid that fits: {}; or lower --kv-memory, --step-tokens or --max-sequences",
          device_.rank, static_cast<double>(p.budget) / gib, fraction, grid_.text(),
          static_cast<double>(p.weights) / gib,
          static_cast<double>(p.without_kv() - p.weights) / gib, static_cast<double>(least) / gib,
          grid_that_fits(arch_, group_, p.budget, p.without_kv() - p.weights + least));
    }
    p.kv = wanted != 0 ? static_cast<size_t>(wanted) : p.budget - p.without_kv();
  }

  void pages() {
    ReplicaLimits& l = sizes_.limits;
    const int64_t per_sequence = l.max_positions / l.page_tokens + 2;
    const int64_t most = std::min<int64_t>(per_sequence * l.slots, INT32_MAX);
    l.pages = static_cast<int32_t>(std::min(
        most, static_cast<int64_t>(sizes_.plan.kv) / static_cast<int64_t>(sizes_.page_bytes)));
  }

  const Options& options_;
  const Architecture& arch_;
  const Shard& shard_;
  int group_;
  const Grid& grid_;
  const DeviceFacts& device_;
  EngineSizes sizes_;
};

}  // namespace

DeviceFacts gpu_facts(size_t free_bytes, int rank, int local_ranks) {
  const auto padded = [](int64_t rows) {
    return (rows + kGpuRowMultiple - 1) / kGpuRowMultiple * kGpuRowMultiple;
  };
  return {true, free_bytes, rank, local_ranks, {Dtype::kBf16, padded}};
}

ReplicaLimits default_limits(bool gpu) {
  const Defaults d = gpu ? kGpuDefaults : kCpuDefaults;
  return {.slots = d.slots, .step_tokens = d.step_tokens, .chunk_tokens = d.chunk_tokens};
}

EngineSizes size_shard(const Options& options, const Architecture& arch, const Shard& shard,
                       int group, const Grid& grid, const DeviceFacts& device) {
  return Sizing(options, arch, shard, group, grid, device).run();
}

void settle_pages(EngineSizes& sizes, const Options& options, bool gpu, int32_t pages) {
  ReplicaLimits& l = sizes.limits;
  DROVER_CHECK(pages >= 2, ExitCode::kUsage,
               "no room for one sequence: the KV cache has {} pages of {} tokens ({} bytes each on "
               "this rank); raise --kv-memory to {} at least",
               pages, l.page_tokens, sizes.page_bytes, 2 * sizes.page_bytes);
  l.pages = sizes.kv.pages = pages;
  if (gpu && !options.integer("max-sequences", 0, 1 << 20)) {
    const int64_t suited = int64_t{pages} * l.page_tokens / kUsualTokens;
    l.slots =
        static_cast<int32_t>(std::clamp<int64_t>(suited / l.groups * l.groups, l.groups, l.slots));
  }
  sizes.worker = worker_limits(options, l);
}

EngineSizes size_engine(const Options& options, const Architecture& arch, const Shard& shard,
                        int group, const Grid& grid, const Backend& backend, bool gpu, World& world,
                        Interrupt& interrupt) {
  const DeviceFacts device{gpu, backend.memory().free, world.rank(), world.local_size(),
                           row_layout(backend)};
  EngineSizes sizes = size_shard(options, arch, shard, group, grid, device);
  const int64_t pages = world.agree_min(sizes.limits.pages, interrupt, 600);
  settle_pages(sizes, options, gpu, static_cast<int32_t>(pages));
  if (gpu) {
    log::info("memory of this rank's GPU: {}",
              sizes.plan.text(sizes.page_bytes, sizes.kv, sizes.limits.slots));
  }
  return sizes;
}

}  // namespace drover
