// What a step costs one rank, as plain functions of the rows it runs and of the machine's rates.
// Seconds, bytes, weights (a multiplication and an addition each) and rates per second throughout.
//
//   step = linears + output + attention + rows + overhead + sums
//
//   linears    layers * knee(B / read, 2 n W / flops)      n rows; W weights of a layer in B bytes
//   output     knee(Bo / read, 2 m Wo / flops)             last stage; m rows that sample
//   attention  layers * (C k / cache + 4 P q / pairs)      C positions that decoding rows read, k
//              bytes of a position; P pairs of a prompt's row and a position it sees, q query
//              features of this rank
//   rows       layers * n r / row_rate                     r bytes of norms, rotation, activation
//   overhead   layers * per_layer + per_step               launches, and what does not shrink
//   sums       (2 layers + 1 on the first stage) * sum(n h)     h bytes of a row of the hidden size
//
//   knee(a, b) = (a^p + b^p)^(1/p): memory and arithmetic overlap, but not where both are busy
//   sum(S)     = latency * log2(t) + 2 (t - 1) / t * S / rate over t ranks of a node (a tree for
//                the latency, a ring for the bytes: nccl-tests' PERFORMANCE.md has the ring's
//                factor); over several nodes the same again between them, by every rank's port
//              GPUs of one node sum few rows over each other's memory where that is faster (up to 8
//              of them, 1 MiB of rows, 2 MiB sent by each: backend.h, PeerSums):
//              peer_latency + (t - 1) * S / rate
//   send(S)    = latency + S / rate
//
// A pipeline's round, in which each of g groups passes all stages, takes
//   max(g * slowest stage, sum of the stages and of the sends), and yields g steps.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "comm/grid.h"
#include "model/shard.h"
#include "plan/topology.h"

namespace drover {

enum RateId : uint8_t {
  kRead,         // bytes/s of weights
  kFlops,        // FLOP/s of linears
  kOverlap,      // the knee's p
  kCache,        // bytes/s of cached keys and values, by decoding rows
  kPairs,        // FLOP/s of a prompt's attention
  kRowRate,      // bytes/s of all else that grows with rows
  kPerLayer,     // s
  kPerStep,      // s
  kSumLatency,   // s, within a node; then between nodes
  kSumRate,      // bytes/s
  kSendLatency,  // s
  kSendRate,     // bytes/s
  kNetSumLatency,
  kNetSumRate,
  kNetSendLatency,
  kNetSendRate,
  kShare,        // CPU: what a rank keeps of its rates when all cores of its node are at work
  kPeerLatency,  // s, of a sum over peer memory; CPU ranks have none: a second, which is never less
  kRates
};
const char* rate_name(RateId id);

enum class Origin : uint8_t { kMeasured, kFitted, kGuessed };
const char* to_string(Origin origin);

// The machine's rates and how sure they are: the covariance of their logarithms.
struct Rates {
  std::array<double, kRates> value{};
  std::array<Origin, kRates> origin{};
  std::array<std::array<double, kRates>, kRates> covariance{};
  double misfit = 0.1;  // of the model itself: relative, one standard deviation

  double operator[](RateId id) const { return value[id]; }
  double sigma(RateId id) const;  // relative, of this rate alone
};

// How a rank stores numbers, in bytes.
struct NumberSizes {
  double layer_weight = 2;   // of a weight of the layers: INT4 in groups of 128 takes 0.516
  double output_weight = 2;  // of the output layer
  double kv_head = 0;        // of a position in one layer and KV head, keys, values and scales
  double activation = 2;
};

// One rank's part of the model.
struct ShardShape {
  double layers = 0, layer_weights = 0, layer_bytes = 0;
  double output_weights = 0, output_bytes = 0;  // last stage
  double kv_position = 0, query_features = 0, row_bytes = 0, hidden_bytes = 0;
  bool first = false;
};
ShardShape shard_shape(const Architecture& a, const Shard& shard, const NumberSizes& sizes);

// Where the ranks of a stage, and neighbouring stages, lie.
struct Placement {
  int tp = 1, nodes_of_stage = 1;
  bool stages_cross_nodes = false;
};

// What the rows of one step are.
struct StepWork {
  double rows = 0;
  double sampled = 0;         // rows whose next token is wanted
  double decode_context = 0;  // positions that decoding rows read
  double prompt_pairs = 0;    // pairs of a prompt's row and a position it sees
};

struct StepCost {  // seconds
  double linears = 0, output = 0, attention = 0, rows = 0, overhead = 0, sums = 0;
  double compute() const { return linears + output + attention + rows + overhead; }
  double total() const { return compute() + sums; }
};

StepCost step_cost(const ShardShape& shape, const StepWork& work, const Placement& place,
                   const Rates& rates);
double sum_seconds(double bytes, const Placement& place, const Rates& rates);
// One way of the two: the communicator's, and over peer memory, where that may be.
double ring_seconds(double bytes, const Placement& place, const Rates& rates);
bool peers_may_sum(double bytes, const Placement& place);
double peer_seconds(double bytes, const Placement& place, const Rates& rates);
double send_seconds(double bytes, bool across_nodes, const Rates& rates);
double knee(double a, double b, double p);

// What is known of a machine before anything is measured on it: rates from the topology file, and
// shares of them that were measured with drover on H100, H200 and a Xeon (cost_model.cc says
// which). Throws kBadInput naming what the file lacks. `activations`: "fp8", "bf16" or "f32".
// `local_ranks`, `threads`: of a node, CPU ranks only: they share its cores and its memory.
Rates guessed_rates(const Topology& t, const std::string& activations, int local_ranks,
                    int threads);

// Of a CPU rank's rates, against one thread that has a core for itself: threads add little (two
// gave 1.2 to 1.3 times the speed on a Xeon and on an EPYC), and beyond the cores ranks take turns.
double cpu_speed(double cores, int local_ranks, int threads);

// The relative standard deviation of f(rates) > 0, from their covariance.
double relative_sigma(const Rates& rates, const std::function<double(const Rates&)>& f);
// Of the rates that f depends on, the least sure kind.
Origin origin_of(const Rates& rates, const std::function<double(const Rates&)>& f);

}  // namespace drover
