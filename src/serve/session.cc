#include "serve/session.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "base/log.h"
#include "loadgen.h"
#include "serve/loadgen_settings.h"
#include "serve/progress.h"
#include "serve/results.h"
#include "serve/resume.h"
#include "serve/summary.h"
#include "serve/sut.h"
#include "version.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

struct Session {
  RequestSink& sink;
  const ServeOptions& options;
  const RunFacts& facts;
  Interrupt& interrupt;
  bool synthetic_dataset = false;
  Json identity;
  EarlierRun earlier;  // whose accuracy samples are taken over
  SequenceId next_id = 1;
};

std::string pass_dir(const ServeOptions& o, Mode mode) {
  return o.out_dir + (mode == Mode::kPerformance ? "/performance" : "/accuracy");
}

// Where the official tree has LoadGen's logs.
std::string log_dir(const ServeOptions& o, Mode mode) {
  return pass_dir(o, mode) + (mode == Mode::kPerformance ? "/run_1" : "");
}

size_t sample_count(const Dataset& dataset, const ServeOptions& options) {
  const size_t size = dataset.size();
  DROVER_CHECK(size > 0, ExitCode::kBadInput, "dataset {} has no samples", dataset.name());
  DROVER_CHECK(options.samples <= size, ExitCode::kUsage,
               "--samples {}: dataset {} has {}; ask for at most that, or 0 for all",
               options.samples, dataset.name(), size);
  return options.samples == 0 ? size : options.samples;
}

// The longest prompt is the one that could not fit: better told now than in the middle.
void check_fits(const Session& s, const SampleSet& samples) {
  const Request r = make_request(samples.at(samples.longest()), s.next_id, s.options.max_new_tokens,
                                 s.synthetic_dataset);
  const auto why = s.sink.refuse(r);
  DROVER_CHECK(!why, ExitCode::kUsage, "sample {} of {}: {}", samples.longest(), samples.size(),
               *why);
}

// Not under LoadGen, not in the journal: first touches of memory, threads, connections.
void warm_up(Session& s, const SampleSet& samples) {
  if (s.options.warmup_requests <= 0) return;
  s.sink.listen({});
  std::vector<Request> requests;
  for (int i = 0; i < s.options.warmup_requests; ++i) {
    const size_t index = i == 0 ? samples.longest() : static_cast<size_t>(i) % samples.size();
    requests.push_back(make_request(samples.at(index), s.next_id++,
                                    std::min(s.options.warmup_tokens, s.options.max_new_tokens),
                                    false));
    requests.back().ignore_eos = true;
  }
  s.sink.submit(std::move(requests));
  s.sink.drain();
}

void run_loadgen(Session& s, SampleSet& samples, Sut& sut, const LoadgenPlan& plan, Mode mode,
                 const std::function<void()>& stuck) {
  mlperf::TestSettings settings = plan.settings;
  settings.mode = mode == Mode::kPerformance ? mlperf::TestMode::PerformanceOnly
                                             : mlperf::TestMode::AccuracyOnly;
  mlperf::LogSettings logs;
  logs.log_output.outdir = log_dir(s.options, mode);
  logs.enable_trace = false;
  // LoadGen obeys any audit.config in the working directory unless it is given another path.
  const std::string audit =
      s.options.audit_conf.empty() ? s.options.out_dir + "/no-audit.config" : s.options.audit_conf;
  const size_t expected = mode == Mode::kPerformance ? plan.expected_queries : samples.size();
  Monitor monitor(sut, s.sink, s.interrupt, mode, expected, s.options, stuck);
  try {
    mlperf::StartTest(&sut, &samples, settings, logs, audit);
  } catch (const Aborted&) {
    // The interrupt has the reason; LoadGen was shut down before.
  }
}

void sync_logs(const std::string& dir) {
  for (const char* name : {"summary.txt", "detail.txt", "accuracy.json"}) {
    const std::string file = dir + "/mlperf_log_" + name;
    DROVER_CHECK(fs::exists(file), ExitCode::kEnvironment,
                 "{}: LoadGen did not write it; check the --out folder", file);
    sync_path(file);
  }
  sync_path(dir);
}

PassOutcome collect(const Session& s, Sut& sut, const LoadgenPlan& plan, Mode mode, size_t samples,
                    std::vector<RankTimes> times = {}) {
  PassOutcome out;
  out.mode = mode;
  out.issued = sut.counts().issued;
  out.records = sut.records();
  out.duration_s = sut.duration_s();
  if (s.interrupt.raised()) {
    out.ended_early = s.interrupt.cause();
  } else {
    out.counters = s.sink.counters();
    out.timeline = s.sink.timeline();
  }
  out.rank_times = std::move(times);
  if (out.ended_early.empty() && sut.cut_short()) out.ended_early = s.interrupt.why_stop();
  if (mode == Mode::kAccuracy && !s.earlier.folder.empty())
    out.resumed = {{"from", s.earlier.folder},
                   {"samples_taken_over", s.earlier.samples.size()},
                   {"damaged_lines", s.earlier.damaged},
                   {"build", s.earlier.build}};
  out.logs = read_loadgen_logs(log_dir(s.options, mode));
  judge(out, s.options, plan, samples, log_dir(s.options, mode));
  return out;
}

Json whole_run(const Session& s, const std::vector<PassOutcome>& passes, const LoadgenPlan& plan) {
  Json run = run_json(passes, s.options, plan, s.facts);
  const std::string advice = how_to_go_on(passes, s.options);
  if (!advice.empty()) run["go_on"] = advice;
  return run;
}

// The pass's result.json, and the whole run's: a pass that is done is not lost with a later one.
void write_results(const Session& s, const std::vector<PassOutcome>& passes,
                   const LoadgenPlan& plan) {
  write_json(pass_dir(s.options, passes.back().mode) + "/result.json",
             pass_json(passes.back(), s.options, plan, s.facts));
  write_json(s.options.out_dir + "/result.json", whole_run(s, passes, plan));
}

// Appends to `passes` and writes the results.
void run_pass(Session& s, SampleSet& samples, const LoadgenPlan& plan, Mode mode,
              std::vector<PassOutcome>& passes) {
  fs::create_directories(log_dir(s.options, mode));
  Sut::Config config;
  config.mode = mode;
  config.report_first_token = s.options.scenario != Scenario::kOffline;
  config.max_new_tokens = s.options.max_new_tokens;
  config.synthetic = s.synthetic_dataset;
  config.ttft_limit_s = plan.ttft_limit_ms / 1e3;
  config.name = "drover";
  config.first_id = s.next_id;
  config.run = identity_hash(s.identity);
  if (mode == Mode::kAccuracy) config.known = &s.earlier.samples;
  write_identity(pass_dir(s.options, mode), s.identity, s.facts);
  auto sut = std::make_shared<Sut>(config, samples, s.sink,
                                   pass_dir(s.options, mode) + "/journal.jsonl", s.interrupt);
  s.sink.listen(sut->events());
  s.sink.reset_counters();
  s.sink.rank_times();  // from here on
  const auto stuck = [&] {
    try {
      std::vector<PassOutcome> all = passes;
      all.push_back(collect(s, *sut, plan, mode, samples.size()));
      write_results(s, all, plan);
    } catch (const std::exception& e) {
      log::error("writing the results of an interrupted pass failed: {}", e.what());
    }
    if (s.options.on_stuck) s.options.on_stuck();
  };
  run_loadgen(s, samples, *sut, plan, mode, stuck);
  std::vector<RankTimes> times;
  if (!s.interrupt.raised()) {
    try {
      s.sink.drain();  // the sink's thread has left its last event
      times = s.sink.rank_times();
    } catch (const Error& e) {
      s.interrupt.raise(e.code(), e.what());
    }
  }
  s.next_id = sut->next_id();
  sut->sync_journal();
  sync_logs(log_dir(s.options, mode));
  passes.push_back(collect(s, *sut, plan, mode, samples.size(), std::move(times)));
  write_results(s, passes, plan);
}

std::string write_user_conf(const ServeOptions& options, size_t samples) {
  const std::string file = options.out_dir + "/user.conf";
  std::ofstream out(file);
  out << compose_user_conf(options, samples);
  out.close();
  DROVER_CHECK(out.good(), ExitCode::kEnvironment, "{}: cannot be written; check the --out folder",
               file);
  return file;
}

void take_over(Session& s, size_t samples, int32_t vocab) {
  if (s.options.resume_from.empty()) return;
  s.earlier = read_earlier_run(s.options.resume_from, s.identity, samples, vocab);
  log::info("resumed: {} of {} samples are taken over from {}, {} are left to run",
            s.earlier.samples.size(), samples, s.earlier.folder,
            samples - s.earlier.samples.size());
  if (s.earlier.damaged > 0)
    log::warn("{} lines of its journal are torn or damaged; their samples run again",
              s.earlier.damaged);
}

void report(const PassOutcome& pass) {
  if (pass.valid())
    log::info("{} pass: valid, {} samples in {}", to_string(pass.mode), pass.records.size(),
              format_seconds(pass.duration_s));
  if (const Json energy = pass_energy(pass); !energy.is_null())
    log::info("{} pass: {}", to_string(pass.mode), energy_text(energy));
  for (const auto& reason : pass.reasons) log::warn("{} pass: {}", to_string(pass.mode), reason);
}

}  // namespace

ExitCode run_session(RequestSink& sink, Dataset& dataset, const ServeOptions& options,
                     const RunFacts& facts, Interrupt& interrupt) {
  interrupt.heed_stops();
  const size_t count = sample_count(dataset, options);
  Session s{
      sink, options, facts, interrupt, dataset.synthetic(), run_identity(options, facts, count),
      {},   1};
  take_over(s, count, dataset.vocab());
  const LoadgenPlan plan = make_loadgen_plan(options, write_user_conf(options, count), count);
  SampleSet samples(dataset, count);
  check_fits(s, samples);
  write_json(options.out_dir + "/environment.json", environment_json(facts));
  warm_up(s, samples);

  DROVER_CHECK(!interrupt.asked_to_stop(), ExitCode::kInvalidResult,
               "{} before the first pass; nothing is lost, start it again", interrupt.why_stop());
  std::vector<PassOutcome> passes;
  for (const Mode mode : options.modes) {
    interrupt.check();
    if (interrupt.asked_to_stop()) break;
    run_pass(s, samples, plan, mode, passes);
    report(passes.back());
    if (interrupt.raised() || interrupt.asked_to_stop()) {
      const std::string advice = how_to_go_on(passes, options);
      if (!advice.empty()) log::warn("{}", advice);
    }
    interrupt.check();
  }
  sink.listen({});
  sync_path(options.out_dir);
  if (!passes.empty())
    std::fputs(summary_text(whole_run(s, passes, plan), options.out_dir).c_str(), stdout);
  const bool valid =
      passes.size() == options.modes.size() &&
      std::all_of(passes.begin(), passes.end(), [](const PassOutcome& p) { return p.valid(); });
  return valid ? ExitCode::kOk : ExitCode::kInvalidResult;
}

std::string loadgen_version() { return mlperf::LoadgenVersion(); }

}  // namespace drover
