// Facts of the machine that this process runs on.
#pragma once

#include <cstdint>
#include <string>

namespace drover {

std::string hostname();
std::string cpu_model();        // "unknown" where the system does not tell
uint64_t memory_total_bytes();  // of the machine
uint64_t peak_rss_bytes();      // of this process, so far

}  // namespace drover
