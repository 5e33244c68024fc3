#include "serve/loadgen_logs.h"

#include <cmath>
#include <fstream>
#include <limits>

#include "base/error.h"
#include "serve/sut.h"

namespace drover {
namespace {

constexpr const char kLinePrefix[] = ":::MLLOG ";

constexpr size_t kMaxMessages = 20;

void note_error(LoadgenLogs& logs, const std::string& text) {
  ++logs.error_count;
  for (auto& [known, count] : logs.errors)
    if (known == text) {
      ++count;
      return;
    }
  if (logs.errors.size() < kMaxMessages) logs.errors.emplace_back(text, 1);
}

void read_detail(const std::string& file, LoadgenLogs& logs) {
  std::ifstream in(file);
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(kLinePrefix, 0) != 0) continue;
    const Json entry = Json::parse(line.substr(sizeof(kLinePrefix) - 1), nullptr, false);
    // LoadGen writes bare NaN and Infinity where a run has no such figure: no JSON, no value.
    if (!entry.is_object() || !entry.contains("key") || !entry.contains("value")) {
      if (line.find("\"is_error\": true") != std::string::npos) note_error(logs, line);
      continue;
    }
    const Json meta = entry.value("metadata", Json::object());
    const Json& value = entry.at("value");
    if (meta.value("is_error", false))
      note_error(logs, value.is_string() ? value.get<std::string>() : value.dump());
    if (meta.value("is_warning", false)) ++logs.warning_count;
    logs.values[entry.at("key").get<std::string>()] = value;
  }
}

void read_summary(const std::string& file, LoadgenLogs& logs) {
  std::ifstream in(file);
  std::string line;
  while (std::getline(in, line)) {
    constexpr const char kResult[] = "Result is : ";
    if (line.rfind(kResult, 0) == 0) logs.summary_verdict = line.substr(sizeof(kResult) - 1);
    // The last words of a log that LoadGen closed in order.
    const bool counts_errors = line.find("errors encountered") != std::string::npos ||
                               line.find("ERROR encountered") != std::string::npos ||
                               line.find("ERRORS encountered") != std::string::npos;
    if (counts_errors) logs.complete = true;
  }
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  return -1;
}

// Eight hex digits a token: an int32, little-endian.
bool parse_hex_tokens(const std::string& hex, std::vector<int32_t>& out) {
  out.clear();
  if (hex.size() % 8 != 0) return false;
  for (size_t i = 0; i < hex.size(); i += 8) {
    uint32_t v = 0;
    for (size_t b = 0; b < 4; ++b) {
      const int hi = hex_digit(hex[i + 2 * b]), lo = hex_digit(hex[i + 2 * b + 1]);
      if (hi < 0 || lo < 0) return false;
      v |= static_cast<uint32_t>(hi * 16 + lo) << (8 * b);
    }
    out.push_back(static_cast<int32_t>(v));
  }
  return true;
}

}  // namespace

double LoadgenLogs::number(const std::string& key) const {
  const auto it = values.find(key);
  if (it == values.end() || !it->second.is_number())
    return std::numeric_limits<double>::quiet_NaN();
  return it->second.get<double>();
}

bool LoadgenLogs::flag(const std::string& key, bool otherwise) const {
  const auto it = values.find(key);
  return it != values.end() && it->second.is_boolean() ? it->second.get<bool>() : otherwise;
}

std::string LoadgenLogs::text(const std::string& key) const {
  const auto it = values.find(key);
  return it != values.end() && it->second.is_string() ? it->second.get<std::string>() : "";
}

LoadgenLogs read_loadgen_logs(const std::string& dir) {
  LoadgenLogs logs;
  read_detail(dir + "/mlperf_log_detail.txt", logs);
  read_summary(dir + "/mlperf_log_summary.txt", logs);
  return logs;
}

std::vector<std::string> invalid_reasons(const LoadgenLogs& logs) {
  std::vector<std::string> out;
  if (!logs.complete) out.push_back("LoadGen did not close its logs");
  if (logs.text("result_validity") == "INVALID" || logs.summary_verdict == "INVALID") {
    if (!logs.flag("result_perf_constraints_met", true))
      out.push_back("LoadGen: the latency limits are not met");
    if (!logs.flag("result_min_duration_met", true))
      out.push_back("LoadGen: the run is shorter than the least duration");
    if (!logs.flag("result_min_queries_met", true))
      out.push_back("LoadGen: fewer queries than the least number");
    if (!logs.flag("early_stopping_met", true)) {
      std::string why = "LoadGen: early stopping is not met:";
      for (const char* key :
           {"early_stopping_result", "early_stopping_tpot_result", "early_stopping_ttft_result"}) {
        const std::string text = logs.text(key);
        if (text.find("Run successful") == std::string::npos) why += text;
      }
      out.push_back(why);
    }
    const std::string advice = logs.text("result_invalid_reason");
    if (!advice.empty()) out.push_back("LoadGen advises: " + advice);
    if (out.empty()) out.push_back("LoadGen calls the run INVALID");
  }
  uint64_t told = 0;
  for (const auto& [text, count] : logs.errors) {
    told += count;
    out.push_back("LoadGen logged an error: " + text +
                  (count > 1 ? fmt::format(" ({} times)", count) : ""));
  }
  if (logs.error_count > told)
    out.push_back(fmt::format("LoadGen logged {} more errors, see mlperf_log_detail.txt",
                              logs.error_count - told));
  return out;
}

std::vector<AccuracyEntry> read_accuracy_log(const std::string& file) {
  std::vector<AccuracyEntry> out;
  std::ifstream in(file);
  std::string line, last;
  std::vector<int32_t> tokens;
  size_t number = 0;
  // LoadGen writes an entry a line; so a log of any size is read without holding it.
  while (std::getline(in, line)) {
    ++number;
    if (!line.empty()) last = line;
    if (line.empty() || line[0] != '{') continue;
    if (line.back() == ',') line.pop_back();
    const Json entry = Json::parse(line, nullptr, false);
    const bool good = entry.is_object() && entry.contains("qsl_idx") && entry.contains("data") &&
                      parse_hex_tokens(entry.at("data").get<std::string>(), tokens);
    DROVER_CHECK(good, ExitCode::kInternal,
                 "{}:{}: not an entry of LoadGen's accuracy log with int32 tokens", file, number);
    AccuracyEntry e;
    e.index = entry.at("qsl_idx").get<uint32_t>();
    e.data_tokens = tokens.size();
    e.token_count = entry.value("token_count", static_cast<int32_t>(tokens.size()));
    e.hash = hash_tokens(tokens.data(), tokens.size());
    out.push_back(e);
  }
  DROVER_CHECK(last == "]", ExitCode::kInternal,
               "{}: LoadGen's closing bracket is missing: the log was cut off", file);
  return out;
}

}  // namespace drover
