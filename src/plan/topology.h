// What a cluster is, as topology/*.ini tells it (topology/README.md has every key and its unit).
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "comm/grid.h"

namespace drover {

// A number that the file does not give is 0.
struct Topology {
  std::string file;
  std::string gpu_name;

  double nodes = 0;
  double gpus_per_node = -1;  // 0: ranks run on the CPU, one a core; below 0: not told

  // [gpu], of one.
  double memory_gib = 0;          // that CUDA reports as the device's total
  double copy_gb_per_s = 0;       // read and written by copies within the device
  double bf16_tflops = 0;         // dense
  double fp8_tflops = 0;          // dense; not given: none
  double compute_capability = 0;  // 9.0 is Hopper

  // [link], between the ranks of a node, and [network], between nodes: of one GPU, one direction.
  struct Link {
    double latency_us = 0;       // of an all-reduce of few bytes over two ranks
    double gb_per_s = 0;         // bus bandwidth of a large all-reduce
    double send_latency_us = 0;  // of a message; not given: as an all-reduce
    double send_gb_per_s = 0;
  } link, network;

  // [host], of one node.
  double cores = 0;
  double host_memory_gib = 0;
  double read_gb_per_s = 0;  // of all cores at once
  double bf16_gflops = 0;    // of all cores at once

  std::optional<int> tp, pp, dp;  // [grid]; 0: what is left
  std::set<std::string>
      measured;  // keys that were measured; the others are data sheets' or guesses

  bool describes_machine() const { return nodes > 0 && gpus_per_node >= 0; }
  bool gpu() const { return gpus_per_node > 0; }
  // Places for ranks: GPUs, or cores where there are none.
  int ranks_per_node() const { return static_cast<int>(gpu() ? gpus_per_node : cores); }
  int ranks() const { return static_cast<int>(nodes) * ranks_per_node(); }
};

// Throws kBadInput naming the file, the key, what was expected and what to do: unknown keys, keys
// given twice, words for numbers, a zero bandwidth, and files that contradict themselves (a grid
// larger than the machine, two nodes without a network, ...).
Topology read_topology(const std::string& file);

// The file that read_topology() would read the same from. Comments are the caller's.
std::string topology_ini(const Topology& t);

// The nodes that a tensor-parallel group touches: more than 1 when --tp crosses nodes. Ranks are
// placed node by node, as mpirun and srun do by default.
int nodes_of_tensor_group(const Grid& grid, int ranks_per_node);
// Likewise whether some neighbouring stages of a replica lie on different nodes.
bool stages_cross_nodes(const Grid& grid, int ranks_per_node);

}  // namespace drover
