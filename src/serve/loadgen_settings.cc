#include "serve/loadgen_settings.h"

#include <algorithm>
#include <fstream>
#include <sstream>

namespace drover {
namespace {

// Early stopping at LoadGen's 99 % confidence: queries without a miss that Server's 99th
// percentile asks for, and the fewest from which SingleStream's 90th can be estimated.
constexpr size_t kServerQueries = 459;
constexpr size_t kSingleStreamQueries = 65;

bool is_server(Scenario s) { return s == Scenario::kServer || s == Scenario::kInteractive; }

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// mlperf.conf alone, by name. Kind 0 is LoadGen's own way to its compiled-in file: not counted.
mlperf::TestSettings mlperf_conf(const std::string& name, Scenario scenario) {
  mlperf::TestSettings settings;
  settings.FromConfig("", name, loadgen_scenario(scenario), 0);
  return settings;
}

std::string read_text(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  DROVER_CHECK(in.good(), ExitCode::kBadInput,
               "{}: cannot be read; --user-conf names a LoadGen user.conf", file);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// In equal issue LoadGen adds up to a whole set to SingleStream's count, even where it is a
// multiple of the set already: asked for one less, it comes out right.
size_t demo_queries(const ServeOptions& options, size_t samples) {
  const Scenario scenario = options.scenario;
  if (scenario == Scenario::kOffline) return samples * options.copies;
  if (is_server(scenario)) return std::max(kServerQueries, samples);
  return round_up(std::max(kSingleStreamQueries, samples), samples) - 1;
}

std::string departures_from(const mlperf::TestSettings& used, const mlperf::TestSettings& rule) {
  std::string out;
  const auto compare = [&](const char* what, uint64_t have, uint64_t want) {
    if (have <= want) return;
    if (!out.empty()) out += "; ";
    out +=
        fmt::format("{} limit of {} ms where mlperf.conf has {} ms", what, have / 1e6, want / 1e6);
  };
  compare("time to first token", used.server_ttft_latency, rule.server_ttft_latency);
  compare("time per output token", used.server_tpot_latency, rule.server_tpot_latency);
  return out;
}

// A benchmark's limits are mlperf.conf's, and the interactive ones go by a name of their own.
void check_limits_apply(const ServeOptions& o) {
  DROVER_CHECK(o.ttft_limit_ms <= 0 && o.tpot_limit_ms <= 0, ExitCode::kUsage,
               "--ttft-ms {} and --tpot-ms {}: {} has limits of MLPerf's; set others in user.conf, "
               "or add --demo",
               o.ttft_limit_ms, o.tpot_limit_ms, o.model_name);
  DROVER_CHECK(o.scenario != Scenario::kInteractive || o.model_name.ends_with("-interactive"),
               ExitCode::kUsage,
               "--scenario interactive with --benchmark {}: that name has Server's limits; use "
               "--benchmark {}-interactive",
               o.model_name, o.model_name);
}

size_t expected_queries(const mlperf::TestSettings& s, Scenario scenario, size_t samples) {
  double by_time = 0;
  const double seconds = static_cast<double>(s.min_duration_ms) / 1e3;
  if (scenario == Scenario::kOffline) by_time = 1.1 * seconds * s.offline_expected_qps;
  if (is_server(scenario)) by_time = seconds * s.server_target_qps;
  const auto n = std::max<size_t>(s.min_query_count, static_cast<size_t>(by_time));
  return s.sample_concatenate_permutation ? round_up(n, samples) : n;
}

}  // namespace

const char* loadgen_scenario(Scenario scenario) {
  switch (scenario) {
    case Scenario::kOffline:
      return "Offline";
    case Scenario::kSingleStream:
      return "SingleStream";
    default:
      return "Server";
  }
}

std::string compose_user_conf(const ServeOptions& options, size_t samples) {
  std::string text;
  if (!options.user_conf.empty()) {
    text = read_text(options.user_conf);
    if (!text.empty() && text.back() != '\n') text += '\n';
  }
  const auto line = [&](const char* key, const std::string& value) {
    text += fmt::format("{}.{}.{} = {}\n", options.model_name, loadgen_scenario(options.scenario),
                        key, value);
  };
  const bool known = mlperf_conf(options.model_name, options.scenario).use_token_latencies;
  if (!known || options.demo) {
    text += "# Added by drover.\n";
    line("use_token_latencies", "1");
    line("sample_concatenate_permutation", "1");
    const bool interactive = options.scenario == Scenario::kInteractive;
    double ttft = options.ttft_limit_ms, tpot = options.tpot_limit_ms;
    if (ttft <= 0) ttft = interactive ? 450 : 2000;
    if (tpot <= 0) tpot = interactive ? 40 : 200;
    if (is_server(options.scenario)) {
      line("target_latency", "0");
      line("ttft_latency", fmt::format("{}", static_cast<int64_t>(ttft)));
      line("tpot_latency", fmt::format("{}", static_cast<int64_t>(tpot)));
    }
  }
  if (options.demo) {
    line("min_duration", "0");
    line("min_query_count", fmt::format("{}", demo_queries(options, samples)));
    line("performance_sample_count_override", fmt::format("{}", samples));
  }
  if (options.target_qps > 0) {
    // SingleStream has no rate: LoadGen takes the latency that is expected, in milliseconds.
    if (options.scenario == Scenario::kSingleStream)
      line("target_latency", fmt::format("{}", 1e3 / options.target_qps));
    else
      line("target_qps", fmt::format("{}", options.target_qps));
  }
  return text;
}

LoadgenPlan make_loadgen_plan(const ServeOptions& options, const std::string& user_conf_file,
                              size_t samples) {
  DROVER_CHECK(options.copies == 1 || (options.demo && options.scenario == Scenario::kOffline),
               ExitCode::kUsage,
               "--copies {}: works in Offline with --demo; otherwise LoadGen's min_query_count and "
               "min_duration say how much is run (--user-conf)",
               options.copies);
  LoadgenPlan plan;
  const std::string scenario = loadgen_scenario(options.scenario);
  const mlperf::TestSettings rule = mlperf_conf(options.model_name, options.scenario);
  plan.known_benchmark = rule.use_token_latencies;
  // LoadGen would go over a smaller set again and again, and call that VALID.
  plan.whole_set = samples >= rule.performance_sample_count_override;
  if (plan.known_benchmark && !options.demo) check_limits_apply(options);
  mlperf::TestSettings& s = plan.settings;
  const int rc = s.FromConfig(user_conf_file, options.model_name, scenario);
  DROVER_CHECK(rc == 0, ExitCode::kBadInput,
               "{}: LoadGen cannot read it (error {}); lines are 'model.scenario.key = number'",
               user_conf_file, rc);
  s.scenario = options.scenario == Scenario::kOffline        ? mlperf::TestScenario::Offline
               : options.scenario == Scenario::kSingleStream ? mlperf::TestScenario::SingleStream
                                                             : mlperf::TestScenario::Server;
  s.mode = mlperf::TestMode::PerformanceOnly;
  DROVER_CHECK(!s.use_token_latencies || options.max_new_tokens >= 2, ExitCode::kUsage,
               "--max-new-tokens is {}: LoadGen measures the time per output token and counts a "
               "sample of fewer than 2 tokens as an error; use at least 2",
               options.max_new_tokens);
  DROVER_CHECK(!is_server(options.scenario) || s.server_target_qps > 0, ExitCode::kUsage,
               "the Server scenario needs a target rate above 0, it is {}: set --target-qps",
               s.server_target_qps);
  if (is_server(options.scenario)) {
    const bool tokens = s.use_token_latencies;
    const uint64_t first_ns = tokens ? s.server_ttft_latency : s.server_target_latency_ns;
    plan.ttft_limit_ms = static_cast<double>(first_ns) / 1e6;
    plan.tpot_limit_ms = tokens ? static_cast<double>(s.server_tpot_latency) / 1e6 : 0;
    if (plan.known_benchmark && !options.demo) plan.departures = departures_from(s, rule);
  }
  plan.expected_queries = expected_queries(s, options.scenario, samples);
  return plan;
}

}  // namespace drover
