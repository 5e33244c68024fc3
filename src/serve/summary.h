// A run's result as a table for a person: LoadGen's verdict, speed, latencies, and where the files
// are. launch/summary.py prints the same rows of a folder, ROUGE with them.
#pragma once

#include <string>

#include "base/json.h"

namespace drover {

// `run` as run_json makes it, written to `folder`.
std::string summary_text(const Json& run, const std::string& folder);

}  // namespace drover
