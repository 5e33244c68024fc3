#include "plan/cost_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/error.h"

namespace drover {

const char* rate_name(RateId id) {
  static const char* const names[] = {
      "read",          "flops",     "overlap",         "cache",        "pairs",
      "rows",          "per_layer", "per_step",        "sum_latency",  "sum_rate",
      "send_latency",  "send_rate", "net_sum_latency", "net_sum_rate", "net_send_latency",
      "net_send_rate", "share",     "peer_latency"};
  return names[id];
}

const char* to_string(Origin origin) {
  switch (origin) {
    case Origin::kMeasured:
      return "measured";
    case Origin::kFitted:
      return "fitted";
    default:
      return "guessed";
  }
}

double Rates::sigma(RateId id) const { return std::sqrt(covariance[id][id]); }

ShardShape shard_shape(const Architecture& a, const Shard& shard, const NumberSizes& sizes) {
  ShardShape s;
  const auto hidden = static_cast<double>(a.hidden);
  s.layers = static_cast<double>(shard.layers.size());
  s.layer_weights = static_cast<double>(layer_weights(a, shard));
  s.layer_bytes = s.layer_weights * sizes.layer_weight;
  if (shard.last()) s.output_weights = static_cast<double>(shard.vocab.size()) * hidden;
  s.output_bytes = s.output_weights * sizes.output_weight;
  s.kv_position = sizes.kv_head * static_cast<double>(shard.kv_heads.size());
  s.query_features = static_cast<double>(shard.heads.size()) * a.head_size;
  const double qkv =
      s.query_features + 2 * static_cast<double>(shard.kv_heads.size()) * a.head_size;
  // Two norms read and write the stream and its delta; rotation and activation pass over theirs.
  s.row_bytes = sizes.activation *
                (8 * hidden + 2 * qkv + 3 * static_cast<double>(shard.intermediate.size()));
  s.hidden_bytes = hidden * sizes.activation;
  s.first = shard.first();
  return s;
}

double knee(double a, double b, double p) {
  if (a <= 0 || b <= 0) return std::max(a, b);
  const double most = std::max(a, b);  // keeps the powers in range
  return most * std::pow(std::pow(a / most, p) + std::pow(b / most, p), 1 / p);
}

double ring_seconds(double bytes, const Placement& place, const Rates& r) {
  if (place.tp == 1) return 0;
  const double nodes = std::min(place.nodes_of_stage, place.tp);
  const double local = place.tp / nodes;
  const auto ring = [](double n) { return 2 * (n - 1) / n; };
  double t = 0;
  if (local > 1) t += r[kSumLatency] * std::log2(local) + ring(local) * bytes / r[kSumRate];
  if (nodes > 1) {
    t += r[kNetSumLatency] * std::log2(nodes) + ring(nodes) * bytes / (r[kNetSumRate] * local);
  }
  return t;
}

// Rows so short that 128 of them, the backend's other limit, are less are not told apart.
bool peers_may_sum(double bytes, const Placement& place) {
  constexpr double kPart = 1 << 20, kSent = 2 << 20;
  return place.nodes_of_stage == 1 && place.tp > 1 && place.tp <= 8 && bytes <= kPart &&
         (place.tp - 1) * bytes <= kSent;
}

double peer_seconds(double bytes, const Placement& place, const Rates& r) {
  return r[kPeerLatency] + (place.tp - 1) * bytes / r[kSumRate];
}

double sum_seconds(double bytes, const Placement& place, const Rates& r) {
  const double ring = ring_seconds(bytes, place, r);
  return peers_may_sum(bytes, place) ? std::min(ring, peer_seconds(bytes, place, r)) : ring;
}

double send_seconds(double bytes, bool across_nodes, const Rates& r) {
  return across_nodes ? r[kNetSendLatency] + bytes / r[kNetSendRate]
                      : r[kSendLatency] + bytes / r[kSendRate];
}

StepCost step_cost(const ShardShape& s, const StepWork& w, const Placement& place, const Rates& r) {
  StepCost c;
  c.linears = s.layers *
              knee(s.layer_bytes / r[kRead], 2 * w.rows * s.layer_weights / r[kFlops], r[kOverlap]);
  if (w.sampled > 0) {
    c.output =
        knee(s.output_bytes / r[kRead], 2 * w.sampled * s.output_weights / r[kFlops], r[kOverlap]);
  }
  c.attention = s.layers * (w.decode_context * s.kv_position / r[kCache] +
                            4 * w.prompt_pairs * s.query_features / r[kPairs]);
  c.rows = s.layers * w.rows * s.row_bytes / r[kRowRate];
  c.overhead = s.layers * r[kPerLayer] + r[kPerStep];
  c.sums = (2 * s.layers + (s.first ? 1 : 0)) * sum_seconds(w.rows * s.hidden_bytes, place, r);
  return c;
}

double cpu_speed(double cores, int local_ranks, int threads) {
  const double turns = std::min(1.0, cores / (static_cast<double>(local_ranks) * threads));
  return std::pow(threads, 0.35) * turns;
}

namespace {

class Guess {
 public:
  Guess(const Topology& t, Rates& rates) : t_(t), rates_(rates) {}

  double need(const char* key, double value) const {
    DROVER_CHECK(
        value > 0, ExitCode::kBadInput,
        "{}: {} is needed to plan; give it (topology/README.md), or use a file that has it",
        t_.file, key);
    return value;
  }
  bool measured(const char* key) const { return t_.measured.count(key) != 0; }
  void set(RateId id, double value, double sigma, Origin origin = Origin::kGuessed) {
    rates_.value[id] = value;
    rates_.covariance[id][id] = sigma * sigma;
    rates_.origin[id] = origin;
  }
  void link(const char* section, const Topology::Link& l, RateId first, bool there) {
    // Without a link nothing crosses it: any number will do.
    const double us = there ? need("latency_us", l.latency_us) : 1;
    const double gb = there ? need("gb_per_s", l.gb_per_s) : 1;
    const auto put = [&](int i, const char* key, double value, double guess) {
      const bool known = measured(fmt::format("{}.{}", section, key).c_str());
      set(static_cast<RateId>(first + i), value, known ? 0.15 : guess,
          known ? Origin::kMeasured : Origin::kGuessed);
    };
    put(0, "latency_us", us * 1e-6, 0.5);
    put(1, "gb_per_s", gb * 1e9, 0.3);
    put(2, "send_latency_us", (there ? l.send_latency_us : 1) * 1e-6, 0.5);
    put(3, "send_gb_per_s", (there ? l.send_gb_per_s : 1) * 1e9, 0.3);
  }

 private:
  const Topology& t_;
  Rates& rates_;
};

// Shares of the device's copies and of its dense 16-bit rate: H100 and H200 under load, 2026-11-25
// (what --calibrate makes of their `bench step`, tests/bench).
void guess_gpu(const Topology& t, const std::string& activations, Guess& g) {
  const double copy = g.need("gpu.copy_gb_per_s", t.copy_gb_per_s) * 1e9;
  const double dense = g.need("gpu.bf16_tflops", t.bf16_tflops) * 1e12;
  const bool hopper = t.compute_capability >= 9;
  const bool known = g.measured("gpu.copy_gb_per_s");
  g.set(kRead, copy, known ? 0.1 : 0.2, known ? Origin::kMeasured : Origin::kGuessed);
  // Of 989 TFLOP/s dense 1,010 and 1,050 with e4m3 inputs, 620 with bf16 ones; mma.sync: half,
  // nobody has looked.
  g.set(kFlops, dense * (hopper ? (activations == "fp8" ? 1.04 : 0.63) : 0.5), hopper ? 0.15 : 0.4);
  g.set(kOverlap, 2.0, 0.2);
  g.set(kCache, 0.8 * copy, 0.2);
  g.set(kPairs, 0.11 * dense, 0.5);
  g.set(kRowRate, 0.7 * copy, 0.5);
  g.set(kPerLayer, 36e-6, 0.4);
  g.set(kPerStep, 200e-6, 0.7);
  g.set(kShare, 1, 1e-3);  // GPUs share nothing
  // What a sum adds to the norm that it is one kernel with: two H100s (tests/bench, comm).
  g.set(kPeerLatency, 2.1e-6, 0.5);
}

// Shares of a core's reading and 16-bit rates: a Xeon with AMX, 2026-11-23 (tests/bench).
void guess_cpu(const Topology& t, int local_ranks, int threads, Guess& g) {
  const double cores = g.need("host.cores", t.cores);
  const double mine = cpu_speed(cores, local_ranks, threads);
  const double read = g.need("host.read_gb_per_s", t.read_gb_per_s) * 1e9 * mine / cores;
  const double dense = g.need("host.bf16_gflops", t.bf16_gflops) * 1e9 * mine / cores;
  g.set(kRead, read, 0.3);
  g.set(kFlops, 0.6 * dense, 0.4);
  g.set(kOverlap, 1.5, 0.3);
  g.set(kCache, 0.15 * read, 0.7);
  g.set(kPairs, 0.1 * dense, 0.7);
  g.set(kRowRate, 0.5 * read, 0.7);
  g.set(kPerLayer, 50e-6, 0.7);
  g.set(kPerStep, 500e-6, 0.7);
  g.set(kShare, 0.93, 0.1);
  g.set(kPeerLatency, 1, 1e-3);
}

}  // namespace

Rates guessed_rates(const Topology& t, const std::string& activations, int local_ranks,
                    int threads) {
  DROVER_CHECK(t.describes_machine(), ExitCode::kBadInput,
               "{}: it names a grid only; to plan, it needs [machine] and what follows "
               "(topology/README.md)",
               t.file);
  Rates r;
  Guess g(t, r);
  if (t.gpu()) {
    guess_gpu(t, activations, g);
  } else {
    guess_cpu(t, local_ranks, threads, g);
  }
  // Nodes of one rank have no link; then nothing crosses it, and it is as good as the network.
  const bool linked = t.link.gb_per_s > 0;
  g.link(linked || t.nodes == 1 ? "link" : "network", linked || t.nodes == 1 ? t.link : t.network,
         kSumLatency, linked || t.nodes > 1);
  g.link("network", t.network, kNetSumLatency, t.nodes > 1);
  r.misfit = 0.15;
  return r;
}

namespace {

// Of log f by the logarithm of each rate.
std::array<double, kRates> gradient(const Rates& rates,
                                    const std::function<double(const Rates&)>& f) {
  constexpr double kStep = 1e-3;
  std::array<double, kRates> g{};
  const double base = std::log(f(rates));
  for (int i = 0; i < kRates; ++i) {
    Rates moved = rates;
    moved.value[static_cast<size_t>(i)] *= std::exp(kStep);
    g[static_cast<size_t>(i)] = (std::log(f(moved)) - base) / kStep;
  }
  return g;
}

}  // namespace

double relative_sigma(const Rates& rates, const std::function<double(const Rates&)>& f) {
  const auto g = gradient(rates, f);
  double variance = rates.misfit * rates.misfit;
  for (size_t i = 0; i < kRates; ++i) {
    for (size_t j = 0; j < kRates; ++j) variance += g[i] * g[j] * rates.covariance[i][j];
  }
  return std::sqrt(std::max(variance, 0.0));
}

Origin origin_of(const Rates& rates, const std::function<double(const Rates&)>& f) {
  const auto g = gradient(rates, f);
  Origin worst = Origin::kMeasured;
  for (size_t i = 0; i < kRates; ++i) {
    if (std::abs(g[i]) > 0.05) worst = std::max(worst, rates.origin[i]);
  }
  return worst;
}

}  // namespace drover
