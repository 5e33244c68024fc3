#include "memory_plan.h"

#include <fmt/format.h>

#include "base/error.h"

namespace drover {

namespace {

double gib(size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); }

}  // namespace

std::string MemoryPlan::text(size_t page_bytes, const KvShape& shape, int32_t sequences) const {
  const auto pages = static_cast<int64_t>(shape.pages);
  return fmt::format(
      "weights {:.2f} GiB, KV {:.2f} GiB ({} tokens in pages of {}, {} sequences at once), "
      "buffers {:.2f}, workspace {:.2f}, graphs {:.2f}, communication {:.2f}; together {:.2f} of "
      "{:.2f} GiB",
      gib(weights), gib(static_cast<size_t>(pages) * page_bytes), pages * shape.page_tokens,
      shape.page_tokens, sequences, gib(buffers), gib(workspace), gib(graphs), gib(comm),
      gib(without_kv() + static_cast<size_t>(pages) * page_bytes), gib(budget));
}

size_t shard_weight_bytes(const Architecture& a, const Shard& shard, int group) {
  const auto hidden = static_cast<size_t>(a.hidden);
  const auto elements = static_cast<size_t>(layer_weights(a, shard));
  // Quantized: half a byte, and a 16-bit scale (and zero point or minimum at the most) a group.
  const size_t layer =
      group > 0 ? elements / 2 + elements / static_cast<size_t>(group) * 2 : elements * 2;
  const size_t table = static_cast<size_t>(shard.vocab.size()) * hidden * 2;
  return static_cast<size_t>(shard.layers.size()) * (layer + 2 * hidden * sizeof(float)) +
         (shard.first() ? table : 0) + (shard.last() ? table : 0);
}

std::string grid_that_fits(const Architecture& arch, int group, size_t budget, size_t rest) {
  for (int ranks = 1; ranks <= 64; ranks *= 2) {
    for (int tp = 1; tp <= ranks && tp <= 8; tp *= 2) {
      const int pp = ranks / tp;
      try {
        check_grid(arch, tp, pp, group);
        size_t most = 0;
        for (int stage = 0; stage < pp; ++stage) {
          most = std::max(
              most, shard_weight_bytes(arch, make_shard(arch, tp, 0, pp, stage, group), group));
        }
        if (most + rest <= budget) {
          return fmt::format("--tp {} --pp {} (mpirun -np {})", tp, pp, ranks);
        }
      } catch (const Error&) {
        // A grid that this model cannot have.
      }
    }
  }
  return "none of up to 64 ranks";
}

}  // namespace drover
