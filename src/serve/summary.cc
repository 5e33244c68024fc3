#include "serve/summary.h"

#include <fmt/core.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "serve/results.h"

namespace drover {

namespace {

// "12,345.7"; digits are 0 for a count.
std::string number(double value, int digits) {
  const std::string plain = fmt::format("{:.{}f}", value, digits);
  const size_t point = std::min(plain.find('.'), plain.size());
  std::string text;
  for (size_t i = 0; i < plain.size(); ++i) {
    if (i > 0 && i < point && (point - i) % 3 == 0 && plain[i - 1] != '-') text += ',';
    text += plain[i];
  }
  return text;
}

// A figure that LoadGen or drover has, or that it has not.
std::string figure(const Json& j, const char* key, const char* unit) {
  const auto at = j.find(key);
  if (at == j.end() || !at->is_number()) return "not measured";
  return number(at->get<double>(), 1) + unit;
}

std::string latency(const Json& pass, const char* key) {
  const Json all = pass.value(key, Json::object());
  return fmt::format("p50 {}, p99 {}", figure(all, "p50", " ms"), figure(all, "p99", " ms"));
}

std::string text_of(const Json& j, const char* key) { return j.value(key, std::string("?")); }

using Rows = std::vector<std::pair<std::string, std::string>>;

void add_verdicts(Rows& rows, const Json& run, const Json& passes) {
  rows.emplace_back("LoadGen's verdict", text_of(run, "verdict"));
  for (const Json& reason : run.value("reasons", Json::array()))
    rows.emplace_back("", reason.get<std::string>());
  if (const auto accuracy = passes.find("accuracy"); accuracy != passes.end()) {
    if (passes.size() > 1) rows.emplace_back("accuracy run", text_of(*accuracy, "verdict"));
    if (const auto of = accuracy->find("resumed"); of != accuracy->end() && of->is_object())
      rows.emplace_back(
          "", fmt::format("resumed: {} samples from {}, {} run here",
                          number(of->value("samples_taken_over", 0.0), 0), text_of(*of, "from"),
                          number(of->value("samples_run", 0.0), 0)));
  }
  if (run.contains("go_on")) rows.emplace_back("to go on", text_of(run, "go_on"));
}

}  // namespace

std::string summary_text(const Json& run, const std::string& folder) {
  const Json passes = run.value("passes", Json::object());
  const Json& speed = passes.contains("performance") ? passes.at("performance") : run;
  Rows rows;
  add_verdicts(rows, run, passes);
  rows.emplace_back("scenario, grid",
                    fmt::format("{}, {}", text_of(run, "scenario"), text_of(run, "grid")));
  rows.emplace_back("numbers",
                    fmt::format("activations {}, KV {}, backend {}", text_of(run, "activations"),
                                text_of(run, "kv"), text_of(run, "backend")));
  rows.emplace_back(
      "samples",
      fmt::format("{} ({} output tokens in {})", number(speed.value("samples", 0.0), 0),
                  number(speed.value("output_tokens", 0.0), 0), figure(speed, "duration_s", " s")));
  rows.emplace_back("output tokens/s", figure(speed, "output_tokens_per_second", ""));
  if (const auto energy = speed.find("energy"); energy != speed.end() && energy->is_object())
    rows.emplace_back("energy", energy_text(*energy));
  rows.emplace_back("time to first token", latency(speed, "ttft_ms"));
  rows.emplace_back("time per output token", latency(speed, "tpot_ms"));
  if (text_of(run, "scenario") == "offline")
    rows.emplace_back("", "(latencies are drover's own: Offline has no limit on them)");
  if (run.contains("unverified")) rows.emplace_back("unverified", text_of(run, "unverified"));
  rows.emplace_back("result", folder + "/result.json");
  std::string text;
  for (const auto& [name, value] : rows) text += fmt::format("  {:22} {}\n", name, value);
  return text;
}

}  // namespace drover
