#include "model/shard.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/error.h"

namespace drover {
namespace {

// Why this many tensor-parallel ranks cannot share the model; empty when they can.
std::string tp_problem(const Architecture& a, int tp, int group) {
  const int64_t unit = std::max(group, 1);
  if (a.heads % tp != 0 || a.kv_heads % tp != 0) {
    return fmt::format("does not divide {} heads and {} KV heads", a.heads, a.kv_heads);
  }
  const int64_t attention = int64_t{a.heads} * a.head_size;
  if (attention % (tp * unit) != 0) {
    return fmt::format("cuts the {} columns of the attention's output within a group of {}",
                       attention, unit);
  }
  if (a.intermediate % (tp * unit) != 0) {
    return fmt::format("cuts the {} features of the MLP {}", a.intermediate,
                       group > 0 ? fmt::format("within a group of {}", unit) : "unevenly");
  }
  const int64_t rows = (int64_t{a.vocab} + tp - 1) / tp;
  if (rows * (tp - 1) >= a.vocab) {
    return fmt::format("leaves a rank without a part of the vocabulary of {}", a.vocab);
  }
  return {};
}

void check_tp(const Architecture& a, int tp, int group) {
  const std::string problem =
      tp < 1 ? std::string("is not a positive number") : tp_problem(a, tp, group);
  if (problem.empty()) return;
  std::vector<int> good;
  for (int t = 1; t <= a.kv_heads; ++t) {
    if (tp_problem(a, t, group).empty()) good.push_back(t);
  }
  DROVER_FAIL(ExitCode::kUsage, "tp {} {}; tp {} would work", tp, problem, fmt::join(good, " or "));
}

void check_pp(const Architecture& a, int pp) {
  DROVER_CHECK(pp >= 1 && pp <= a.layers, ExitCode::kUsage,
               "pp {} cannot share {} layers; pp 1 to {} would work", pp, a.layers, a.layers);
}

Range equal_part(int64_t size, int64_t parts, int64_t index) {
  const int64_t part = size / parts;
  return {index * part, (index + 1) * part};
}

}  // namespace

int64_t layer_weights(const Architecture& a, const Shard& shard) {
  const int64_t q = shard.heads.size() * a.head_size, kv = shard.kv_heads.size() * a.head_size;
  return int64_t{a.hidden} * (2 * q + 2 * kv + 3 * shard.intermediate.size());
}

void check_grid(const Architecture& a, int tp, int pp, int group) {
  check_tp(a, tp, group);
  check_pp(a, pp);
}

Shard make_shard(const Architecture& a, int tp, int tp_slot, int pp, int stage, int group) {
  check_grid(a, tp, pp, group);
  DROVER_CHECK(tp_slot >= 0 && tp_slot < tp && stage >= 0 && stage < pp, ExitCode::kUsage,
               "slot {} of tp {} and stage {} of pp {} do not exist", tp_slot, tp, stage, pp);
  Shard s;
  s.tp = tp;
  s.tp_slot = tp_slot;
  s.pp = pp;
  s.stage = stage;
  // The remainder is less than pp, so the last stage never gets a part of it.
  const int64_t even = a.layers / pp, more = a.layers % pp;
  s.layers.begin = stage * even + std::min<int64_t>(stage, more);
  s.layers.end = s.layers.begin + even + (stage < more ? 1 : 0);
  s.heads = equal_part(a.heads, tp, tp_slot);
  s.kv_heads = equal_part(a.kv_heads, tp, tp_slot);
  s.intermediate = equal_part(a.intermediate, tp, tp_slot);
  const int64_t rows = (int64_t{a.vocab} + tp - 1) / tp;
  s.vocab = {tp_slot * rows, std::min<int64_t>((tp_slot + 1) * rows, a.vocab)};
  return s;
}

}  // namespace drover
