// The trace of all ranks into one file.
#pragma once

#include <string>
#include <vector>

#include "base/interrupt.h"
#include "comm/comm.h"
#include "comm/world.h"

namespace drover {

// Collective, once the steps are over; `all` is over host memory. Ranks of other hosts find out how
// their clock differs from rank 0's. Rank 0 writes `file`. Throws kEnvironment when it cannot.
void gather_trace(const std::string& file, World& world, Comm& all);

// Every rank's text on rank 0, by rank; empty on the others. Collective, over host memory. A text
// of 1 GiB at most.
std::vector<std::string> gather_texts(std::string mine, World& world, Comm& all);

}  // namespace drover
