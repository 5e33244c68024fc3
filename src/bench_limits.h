// What the machine gives the ranks of this run, measured by all of them at once: the limits that
// `drover bench` holds its rates against.
#pragma once

#include "job.h"

namespace drover {

struct Limits {
  bool gpu = false;
  // CPU: all threads of all ranks, each reading its part of a buffer. GPU: copies within the
  // device, bytes read and written.
  double read_bytes_per_s = 0;
  double linear_flops_per_s = 0;  // the backend's 16-bit (f32) linear, linear_size cubed a rank
  int64_t linear_size = 0;
  uint64_t read_buffer_bytes = 0;  // of one rank
  uint64_t l3_bytes = 0;           // 0: not told by the system
  uint64_t step_weight_bytes = 0;  // of all ranks (every replica has all of a model)
  int threads = 0;                 // of all ranks
};

// Collective; every rank gets the same.
Limits measure_limits(RankParts& parts);

Json to_json(const Limits& limits);

}  // namespace drover
