// Faults on request, for the tests of failure: DROVER_FAULT="throw:rank:step" | "hang:..." |
// "kill:..." makes that rank throw, stop for good, or die at that step. Debugging only.
#pragma once

#include <cstdint>

namespace drover {

void fault_point(const char* phase, int rank, uint64_t step);

}  // namespace drover
