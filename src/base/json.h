// The one place that includes nlohmann/json; ordered, so that files read as they were written.
#pragma once

#include <nlohmann/json.hpp>

#include <string>

namespace drover {

using Json = nlohmann::ordered_json;

// Writes to FILE.tmp, flushes to disk, renames: a reader sees the old file or the new one.
// Throws kEnvironment, naming the file and the reason.
void write_json(const std::string& file, const Json& value);
// Throws kBadInput, naming the file and the place of the error.
Json read_json(const std::string& file);

}  // namespace drover
