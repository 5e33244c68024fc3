#include "serve/results.h"

#include <algorithm>
#include <cmath>

namespace drover {
namespace {

bool is_latency_bound(const LoadgenPlan& plan) { return plan.ttft_limit_ms > 0; }

bool is_mlperf_run(const ServeOptions& o, const LoadgenPlan& plan, const RunFacts& facts) {
  const bool synthetic_data = facts.dataset.is_object() && facts.dataset.value("synthetic", false);
  return plan.known_benchmark && plan.whole_set && !o.demo && !facts.synthetic_model &&
         !synthetic_data;
}

// LoadGen leaves out what a run has no figure for; JSON has no NaN.
Json number_or_null(double v) { return std::isfinite(v) ? Json(v) : Json(nullptr); }

Json three_percentiles(const std::vector<double>& values) {
  Json j = Json::object();
  j["p50"] = number_or_null(percentile(values, 0.50));
  j["p90"] = number_or_null(percentile(values, 0.90));
  j["p99"] = number_or_null(percentile(values, 0.99));
  return j;
}

std::vector<double> ttfts(const std::vector<SampleRecord>& records) {
  std::vector<double> v;
  for (const auto& r : records)
    if (!r.resumed) v.push_back(r.ttft_ms);
  return v;
}

std::vector<double> tpots(const std::vector<SampleRecord>& records) {
  std::vector<double> v;
  for (const auto& r : records)
    if (!r.resumed && r.n_tokens > 1) v.push_back((r.latency_ms - r.ttft_ms) / (r.n_tokens - 1));
  return v;
}

double loadgen_tokens_per_second(const LoadgenLogs& logs) {
  const double offline = logs.number("result_tokens_per_second");
  return std::isfinite(offline) ? offline : logs.number("result_completed_tokens_per_second");
}

double loadgen_samples_per_second(const LoadgenLogs& logs) {
  for (const char* key : {"result_samples_per_second", "result_completed_samples_per_sec",
                          "result_qps_with_loadgen_overhead"})
    if (std::isfinite(logs.number(key))) return logs.number(key);
  return std::nan("");
}

// LoadGen's own latency percentiles, where it has them.
Json loadgen_latencies(const LoadgenLogs& logs) {
  Json j = Json::object();
  for (const char* p : {"50.00", "90.00", "99.00"}) {
    const std::string name = fmt::format("p{:.2}", p);
    const double first = logs.number(fmt::format("result_first_token_{}_percentile_latency_ns", p));
    const double each =
        logs.number(fmt::format("result_time_per_output_token_{}_percentile_ns", p));
    if (std::isfinite(first)) j["ttft_ms"][name] = first / 1e6;
    if (std::isfinite(each)) j["tpot_ms"][name] = each / 1e6;
  }
  return j;
}

std::string verdict(const PassOutcome& pass, const ServeOptions& o, const LoadgenPlan& plan,
                    const RunFacts& facts) {
  if (!pass.ended_early.empty()) return "ended early; not a result";
  if (pass.mode == Mode::kAccuracy) {
    if (!pass.valid()) return "INVALID accuracy log";
    const bool earlier = std::any_of(pass.records.begin(), pass.records.end(),
                                     [](const SampleRecord& r) { return r.resumed; });
    const std::string where = earlier ? ", some of them in an earlier run" : "";
    return "complete: every sample was answered" + where + "; data/score.py scores it";
  }
  const std::string word = pass.valid() ? "VALID" : "INVALID";
  if (o.demo) return word + " under demo settings; not an MLPerf result";
  if (is_mlperf_run(o, plan, facts)) return word + "; not verified by MLCommons Association";
  const char* why = !plan.known_benchmark ? " by LoadGen, under a name of drover's own"
                    : !plan.whole_set     ? " with fewer samples than the benchmark has"
                                          : " with synthetic inputs";
  return word + why + "; not an MLPerf result";
}

Json limits_json(const LoadgenPlan& plan) {
  if (!is_latency_bound(plan)) return nullptr;
  Json j = {{"ttft_p99_ms", plan.ttft_limit_ms}};
  if (plan.tpot_limit_ms > 0) j["tpot_p99_ms"] = plan.tpot_limit_ms;
  return j;
}

void put_facts(Json& j, const ServeOptions& o, const LoadgenPlan& plan, const RunFacts& facts) {
  j["scenario"] = to_string(o.scenario);
  j["benchmark"] = o.model_name;
  j["demo"] = o.demo;
  if (o.demo || !plan.whole_set) j["length"] = "not of MLPerf length";
  j["synthetic_model"] = facts.synthetic_model;
  j["synthetic_dataset"] = facts.dataset.is_object() && facts.dataset.value("synthetic", false);
  if (is_mlperf_run(o, plan, facts)) {
    j["unverified"] = "Result not verified by MLCommons Association";
    if (!plan.departures.empty()) j["division"] = "open: " + plan.departures;
  }
  if (!o.audit_conf.empty()) j["audit_conf"] = o.audit_conf;
  j["grid"] = facts.grid;
  j["backend"] = facts.backend;
  j["kv"] = facts.kv;
  j["activations"] = facts.activations;
  j["pages"] = facts.pages;
  j["model"] = facts.model;
  j["dataset"] = facts.dataset;
  if (!facts.settings.is_null()) j["settings"] = facts.settings;
  j["max_new_tokens"] = o.max_new_tokens;
  j["min_new_tokens"] = o.min_new_tokens;
  if (o.copies > 1) j["copies"] = o.copies;
  if (o.target_qps > 0) j["target_qps"] = o.target_qps;
}

void put_figures(Json& j, const PassOutcome& pass, const ServeOptions& o, const LoadgenPlan& plan) {
  uint64_t tokens = 0;
  for (const auto& r : pass.records) tokens += static_cast<uint64_t>(r.n_tokens);
  j["samples"] = pass.records.size();
  j["samples_issued"] = pass.issued;
  j["output_tokens"] = tokens;
  if (!pass.resumed.is_null()) {
    j["resumed"] = pass.resumed;
    j["resumed"]["samples_run"] = std::count_if(pass.records.begin(), pass.records.end(),
                                                [](const SampleRecord& r) { return !r.resumed; });
    j["resumed"]["times"] = "duration and latencies are of the samples run here only";
  }
  if (pass.mode == Mode::kPerformance) {
    j["output_tokens_per_second"] = number_or_null(loadgen_tokens_per_second(pass.logs));
    j["samples_per_second"] = number_or_null(loadgen_samples_per_second(pass.logs));
    j["throughput_measured_by"] = "LoadGen";
  }
  j["duration_s"] = pass.duration_s;
  j["ttft_ms"] = three_percentiles(ttfts(pass.records));
  j["tpot_ms"] = three_percentiles(tpots(pass.records));
  j["latency_measured_by"] = o.scenario == Scenario::kOffline
                                 ? "drover: Offline has no latency limit and LoadGen no such figure"
                                 : "drover, from the query's issue";
  const Json theirs = loadgen_latencies(pass.logs);
  if (!theirs.empty() && o.scenario != Scenario::kOffline) j["loadgen_latency"] = theirs;
  const Json limits = limits_json(plan);
  if (!limits.is_null()) j["latency_limits"] = limits;
  const SchedulerCounters& c = pass.counters;
  j["preemptions"] = c.preemptions;
  j["scheduler"] = {{"steps", c.steps},
                    {"prefill_rows", c.prefill_rows},
                    {"decode_rows", c.decode_rows},
                    {"recomputed_rows", c.recomputed_rows},
                    {"peak_running", c.peak_running},
                    {"peak_pages", c.peak_pages}};
  if (const Json phases = pass.timeline.phases_json(); !phases.is_null()) {
    j["phases"] = phases;
    j["timeline"] = pass.timeline.bins_json();
  }
  if (!pass.rank_times.empty()) j["step_time"] = step_time_json(pass.rank_times);
  if (const Json energy = pass_energy(pass); !energy.is_null()) j["energy"] = energy;
  j["loadgen_errors"] = pass.logs.error_count;
  j["loadgen_warnings"] = pass.logs.warning_count;
}

void put_verdict(Json& j, const PassOutcome& pass, const ServeOptions& o, const LoadgenPlan& plan,
                 const RunFacts& facts) {
  j["valid"] = pass.valid();
  j["verdict"] = verdict(pass, o, plan, facts);
  j["reasons"] = pass.reasons;
  if (!pass.ended_early.empty()) j["error"] = pass.ended_early;
}

void check_accuracy_log(PassOutcome& pass, size_t samples, const std::string& dir) {
  std::vector<AccuracyEntry> entries;
  try {
    entries = read_accuracy_log(dir + "/mlperf_log_accuracy.json");
  } catch (const Error& e) {
    pass.reasons.push_back(e.what());
    return;
  }
  std::vector<const SampleRecord*> delivered(samples, nullptr);
  for (const auto& r : pass.records)
    if (r.index < samples) delivered[r.index] = &r;
  std::vector<uint8_t> seen(samples, 0);
  size_t wrong = 0;
  for (const auto& e : entries) {
    const SampleRecord* r = e.index < samples && !seen[e.index]++ ? delivered[e.index] : nullptr;
    const bool same = r != nullptr && r->n_tokens == e.token_count && r->hash == e.hash &&
                      e.data_tokens == static_cast<size_t>(e.token_count);
    if (!same) ++wrong;
  }
  if (wrong > 0)
    pass.reasons.push_back(
        fmt::format("{} entries of LoadGen's accuracy log are not what was "
                    "delivered to it",
                    wrong));
  if (entries.size() != samples)
    pass.reasons.push_back(fmt::format("LoadGen's accuracy log holds {} entries for {} samples",
                                       entries.size(), samples));
}

void check_limits(PassOutcome& pass, const LoadgenPlan& plan) {
  const auto over = [&](const char* what, const Json& loadgen, double limit) {
    if (limit <= 0 || !loadgen.is_object() || !loadgen.contains("p99")) return;
    const double p99 = loadgen.at("p99").get<double>();
    if (p99 > limit)
      pass.reasons.push_back(
          fmt::format("{} at p99 is {:.1f} ms, the limit {:.1f} ms; lower "
                      "--target-qps",
                      what, p99, limit));
  };
  const Json theirs = loadgen_latencies(pass.logs);
  over("time to first token", theirs.value("ttft_ms", Json()), plan.ttft_limit_ms);
  over("time per output token", theirs.value("tpot_ms", Json()), plan.tpot_limit_ms);
}

}  // namespace

Json pass_energy(const PassOutcome& pass) {
  // What was dropped at an early end has used energy and is in no answer.
  uint64_t tokens = 0;
  for (const auto& r : pass.records)
    if (!r.resumed) tokens += static_cast<uint64_t>(r.n_tokens);
  return energy_json(pass.rank_times, pass.ended_early.empty() ? tokens : 0);
}

double percentile(std::vector<double> values, double fraction) {
  if (values.empty()) return std::nan("");
  const auto i = std::min(values.size() - 1,
                          static_cast<size_t>(static_cast<double>(values.size()) * fraction));
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(i), values.end());
  return values[i];
}

void judge(PassOutcome& pass, const ServeOptions& options, const LoadgenPlan& plan, size_t samples,
           const std::string& dir) {
  if (!pass.ended_early.empty()) pass.reasons.push_back("ended early: " + pass.ended_early);
  // What LoadGen says of a pass that ended early follows from that.
  if (pass.ended_early.empty())
    for (auto& r : invalid_reasons(pass.logs)) pass.reasons.push_back(std::move(r));
  if (pass.records.size() != pass.issued)
    pass.reasons.push_back(
        fmt::format("{} of {} issued samples finished", pass.records.size(), pass.issued));
  if (!pass.ended_early.empty()) return;
  if (pass.mode == Mode::kAccuracy) {
    check_accuracy_log(pass, samples, dir);
    return;
  }
  if (pass.logs.text("result_validity") != "VALID" && pass.reasons.empty())
    pass.reasons.push_back("LoadGen's detail log has no verdict VALID");
  if (pass.logs.summary_verdict != pass.logs.text("result_validity"))
    pass.reasons.push_back("LoadGen's summary and detail logs disagree on the verdict");
  if (is_latency_bound(plan)) check_limits(pass, plan);
  if (options.scenario == Scenario::kInteractive && !plan.departures.empty())
    pass.reasons.push_back("not Interactive's limits: " + plan.departures);
}

Json pass_json(const PassOutcome& pass, const ServeOptions& options, const LoadgenPlan& plan,
               const RunFacts& facts) {
  Json j;
  j["format"] = "drover-result";
  j["format_version"] = 1;
  put_verdict(j, pass, options, plan, facts);
  j["mode"] = to_string(pass.mode);
  put_facts(j, options, plan, facts);
  put_figures(j, pass, options, plan);
  return j;
}

Json run_json(const std::vector<PassOutcome>& passes, const ServeOptions& options,
              const LoadgenPlan& plan, const RunFacts& facts) {
  const PassOutcome* head = &passes.front();
  for (const auto& p : passes)
    if (p.mode == Mode::kPerformance) head = &p;
  Json j = pass_json(*head, options, plan, facts);
  std::string modes;
  bool valid = passes.size() == options.modes.size();
  Json reasons = Json::array(), each = Json::object();
  for (const auto& p : passes) {
    if (!modes.empty()) modes += ',';
    modes += to_string(p.mode);
    valid = valid && p.valid();
    for (const auto& r : p.reasons) reasons.push_back(fmt::format("{}: {}", to_string(p.mode), r));
    if (!p.ended_early.empty()) {
      j["error"] = p.ended_early;
      j["verdict"] = verdict(p, options, plan, facts);
    }
    put_verdict(each[to_string(p.mode)], p, options, plan, facts);
    put_figures(each[to_string(p.mode)], p, options, plan);
  }
  for (size_t i = passes.size(); i < options.modes.size(); ++i)
    reasons.push_back(fmt::format("{}: not begun", to_string(options.modes[i])));
  j["valid"] = valid;
  j["reasons"] = reasons;
  j["mode"] = modes;
  j["passes"] = each;
  return j;
}

std::string how_to_go_on(const std::vector<PassOutcome>& passes, const ServeOptions& options) {
  const PassOutcome& last = passes.back();
  if (last.ended_early.empty()) {
    if (passes.size() == options.modes.size()) return "";
    return fmt::format(
        "the {} pass is whole, the next one was not begun: run it with --mode {} and another --out",
        to_string(last.mode), to_string(options.modes[passes.size()]));
  }
  if (last.mode == Mode::kPerformance)
    return "a performance pass is never resumed: run it again, with another --out";
  return fmt::format(
      "{} finished samples are kept in {}/accuracy/journal.jsonl: go on with the same options and "
      "--mode accuracy --resume {} --out ANOTHER",
      last.records.size(), options.out_dir, options.out_dir);
}

}  // namespace drover
