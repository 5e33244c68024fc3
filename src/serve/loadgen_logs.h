// What LoadGen wrote, read back: its verdict is the result, and the official checker does not
// catch an INVALID one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"

namespace drover {

struct LoadgenLogs {
  bool complete = false;               // the logs are there and LoadGen closed them itself
  std::map<std::string, Json> values;  // of mlperf_log_detail.txt, the last of each key
  std::vector<std::pair<std::string, uint64_t>> errors;  // different ones, how often; the first 20
  uint64_t error_count = 0, warning_count = 0;
  std::string summary_verdict;  // "VALID", "INVALID", or empty (accuracy pass)

  double number(const std::string& key) const;  // NaN when absent
  bool flag(const std::string& key, bool otherwise) const;
  std::string text(const std::string& key) const;
};

// `dir` holds mlperf_log_detail.txt and mlperf_log_summary.txt. Missing files: complete = false.
LoadgenLogs read_loadgen_logs(const std::string& dir);

// LoadGen's reasons in plain words; empty when it found nothing wrong.
std::vector<std::string> invalid_reasons(const LoadgenLogs& logs);

struct AccuracyEntry {
  uint32_t index = 0;
  int32_t token_count = 0;
  uint64_t hash = 0;       // hash_tokens of the data
  size_t data_tokens = 0;  // bytes / 4
};
// Throws kInternal when LoadGen's accuracy log is not what it should be, naming the line.
std::vector<AccuracyEntry> read_accuracy_log(const std::string& file);

}  // namespace drover
