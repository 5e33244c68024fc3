// drover bench step: prompt and decode rates of the whole engine, through the leader as in a run.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <random>

#include "base/host.h"
#include "base/log.h"
#include "base/trace.h"
#include "bench.h"
#include "bench_limits.h"
#include "command_line.h"
#include "gather_trace.h"
#include "serve/results.h"
#include "serve/step_budget.h"

namespace drover {

namespace {

constexpr size_t kBudgetEvents = size_t{1} << 22;  // 400 MB, if they all come

struct Plan {
  int32_t prompt_tokens = 0, new_tokens = 0;
  std::vector<int> batches;
  int repeat = 1;
  double floor_prompt = 0, floor_decode = 0;
};

Plan plan_of(const Options& o) {
  Plan p;
  p.prompt_tokens = static_cast<int32_t>(o.integer("prompt-tokens", 1, 1 << 20));
  p.new_tokens = static_cast<int32_t>(o.integer("new-tokens", 3, 1 << 20));
  p.repeat = static_cast<int>(o.integer("repeat", 1, 1000));
  p.floor_prompt = o.number("floor-prompt", 0, 1e9);
  p.floor_decode = o.number("floor-decode", 0, 1e9);
  for (const auto& text : o.list("batches")) {
    const int b = std::atoi(text.c_str());
    DROVER_CHECK(b > 0 && std::to_string(b) == text, ExitCode::kUsage,
                 "--batches {}: expected whole numbers", text);
    p.batches.push_back(b);
  }
  DROVER_CHECK(!p.batches.empty(), ExitCode::kUsage, "--batches is empty");
  return p;
}

// One batch through the leader. Times are those of the steps whose results told of an event, as
// the leader saw them.
class Pass {
 public:
  Pass(Leader& leader, std::vector<Request> requests)
      : first_(requests.size()), end_(requests.size()), tokens_(requests.size()) {
    LeaderEvents events;
    events.step = [this](const StepResult& r) {
      steps_.push_back({Clock::now(), r.rows, r.seconds});
    };
    events.first_token = [this](const FirstToken& t) { first_[t.id] = steps_.size() - 1; };
    events.finished = [this](Finished&& f) {
      end_[f.id] = steps_.size() - 1;
      tokens_[f.id] = f.tokens.size();
    };
    leader.listen(std::move(events));
    begin_ = Clock::now();
    leader.submit(std::move(requests));
    leader.drain();
    leader.listen({});
  }

  void expect_tokens(int32_t each) const {
    for (const size_t t : tokens_) {
      DROVER_CHECK(t == static_cast<size_t>(each), ExitCode::kInternal,
                   "a sequence gave {} tokens, {} were asked for", t, each);
    }
  }
  size_t all_started() const { return *std::max_element(first_.begin(), first_.end()); }
  size_t one_ended() const { return *std::min_element(end_.begin(), end_.end()); }
  double seconds_to(size_t step) const { return seconds(begin_, steps_[step].at); }

  // Steps after `from` up to and with `to`: (rows, steps, seconds, workers' seconds).
  struct Window {
    int64_t rows = 0, steps = 0;
    double seconds = 0, worker_seconds = 0;
  };
  Window window(size_t from, size_t to) const {
    Window w;
    for (size_t i = from + 1; i <= to; ++i) {
      if (steps_[i].rows == 0) continue;
      w.rows += steps_[i].rows;
      w.worker_seconds += steps_[i].worker_seconds;
      ++w.steps;
    }
    if (to > from) w.seconds = seconds(steps_[from].at, steps_[to].at);
    return w;
  }

  std::vector<double> tpot_ms() const {
    std::vector<double> all;
    for (size_t i = 0; i < first_.size(); ++i) {
      all.push_back(1e3 * seconds(steps_[first_[i]].at, steps_[end_[i]].at) /
                    static_cast<double>(tokens_[i] - 1));
    }
    return all;
  }
  std::vector<double> ttft_ms() const {
    std::vector<double> all;
    for (const size_t step : first_) all.push_back(1e3 * seconds_to(step));
    return all;
  }

 private:
  struct Step {
    Clock::time_point at;
    int32_t rows = 0;
    double worker_seconds = 0;
  };
  static double seconds(Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
  }
  Clock::time_point begin_;
  std::vector<Step> steps_;          // written by the leader's thread until drain() is back
  std::vector<size_t> first_, end_;  // index into steps_
  std::vector<size_t> tokens_;
};

// Of an even number of repetitions the mean of the middle two.
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return (values[(n - 1) / 2] + values[n / 2]) / 2;
}

// What each rank's device used in all passes. A pass of whom one is not known makes all unknown.
struct EnergySum {
  std::vector<RankTimes> ranks;
  bool begun = false;
  void add(const std::vector<RankTimes>& more) {
    if (!begun) {
      begun = true, ranks = more;
      return;
    }
    if (more.size() != ranks.size()) ranks.clear();
    for (size_t i = 0; i < ranks.size(); ++i) {
      ranks[i].meter = std::min(ranks[i].meter, more[i].meter);  // kAbsent comes first
      ranks[i].joules += more[i].joules;
      ranks[i].joules_seconds += more[i].joules_seconds;
    }
  }
};

// The medians of one batch size.
struct Figures {
  int batch = 0;
  double prompt_rate = 0, ttft_p50_ms = 0;
  double decode_rate = 0, step_ms = 0, worker_ms = 0, tpot_p50_ms = 0, tpot_p90_ms = 0;
  double steps_per_s = 0;  // of all replicas
  double prompt_flops = 0, decode_flops = 0, read_share = 0;
  Json energy;  // of all repetitions; null: not known
  Json repeats = Json::array();
};

class StepBench {
 public:
  StepBench(Job& job, const Plan& plan, const Limits& limits)
      : job_(job), plan_(plan), limits_(limits), a_(job.source.architecture()) {}

  Figures run(int batch) {
    // Touches code, pages and buffers of this batch size.
    pass(batch, std::min(plan_.prompt_tokens, 16), 4);
    std::vector<double> prompt, ttft, decode, step, worker, p50, p90, steps;
    Figures f;
    f.batch = batch;
    EnergySum energy;
    for (int i = 0; i < plan_.repeat; ++i) {
      const Pass first = pass(batch, plan_.prompt_tokens, 1);
      prompt.push_back(static_cast<double>(batch) * plan_.prompt_tokens /
                       first.seconds_to(first.all_started()));
      ttft.push_back(percentile(first.ttft_ms(), 0.5));
      job_.leader.rank_times();  // from here on
      const Pass all = pass(batch, plan_.prompt_tokens, plan_.new_tokens);
      energy.add(job_.leader.rank_times());
      const auto w = all.window(all.all_started(), all.one_ended());
      DROVER_CHECK(w.steps >= 2, ExitCode::kUsage,
                   "batch {}: the first sequence ended before all had started; raise --new-tokens "
                   "or --step-tokens",
                   batch);
      decode.push_back(static_cast<double>(w.rows) / w.seconds);
      steps.push_back(static_cast<double>(w.steps) / w.seconds);
      step.push_back(1e3 * w.seconds * std::min(batch, job_.grid.dp) /
                     static_cast<double>(w.steps));
      worker.push_back(1e3 * w.worker_seconds / static_cast<double>(w.steps));
      p50.push_back(percentile(all.tpot_ms(), 0.5));
      p90.push_back(percentile(all.tpot_ms(), 0.9));
      f.repeats.push_back({{"prompt_tokens_per_s", prompt.back()},
                           {"decode_tokens_per_s", decode.back()},
                           {"step_ms", step.back()},
                           {"window_steps", w.steps}});
    }
    f.energy = energy_json(energy.ranks, static_cast<uint64_t>(plan_.repeat) *
                                             static_cast<uint64_t>(batch) *
                                             static_cast<uint64_t>(plan_.new_tokens));
    f.prompt_rate = median(prompt);
    f.ttft_p50_ms = median(ttft);
    f.decode_rate = median(decode);
    f.steps_per_s = median(steps);
    f.step_ms = median(step);
    f.worker_ms = median(worker);
    f.tpot_p50_ms = median(p50);
    f.tpot_p90_ms = median(p90);
    compare(f);
    return f;
  }

  void check(int batch) const {
    DROVER_CHECK(batch <= job_.limits.slots * job_.grid.dp, ExitCode::kUsage,
                 "a batch of {} needs --max-sequences {}", batch,
                 (batch + job_.grid.dp - 1) / job_.grid.dp);
    const int64_t needed = fewest_new_tokens(batch);
    DROVER_CHECK(plan_.new_tokens >= needed, ExitCode::kUsage,
                 "batch {}: the first sequence would end before all have started; it needs "
                 "--new-tokens {} or more, or more --step-tokens",
                 batch, needed);
  }

 private:
  // Steps from the first sequence's first token on until all of a group's have theirs, and two in
  // which all decode: told before a pass of minutes, not after it. What decodes comes first in a
  // step (sched), prompts have what is left of its rows.
  int64_t fewest_new_tokens(int batch) const {
    const int64_t groups = int64_t{job_.grid.dp} * job_.limits.groups;
    const int64_t sequences = batch / groups, prompt = plan_.prompt_tokens;
    int64_t rows = 0, steps = 0;  // since the first sequence began to decode
    for (rows = std::max<int64_t>(prompt, job_.limits.step_tokens); rows < sequences * prompt;
         ++steps)
      rows += std::max<int64_t>(1, job_.limits.step_tokens - rows / prompt);
    return steps + 3;
  }

  Pass pass(int batch, int32_t prompt, int32_t new_tokens) {
    std::uniform_int_distribution<int32_t> token(0, a_.vocab - 1);
    std::vector<Request> requests(static_cast<size_t>(batch));
    for (size_t i = 0; i < requests.size(); ++i) {
      auto& r = requests[i];
      r.id = i;
      r.prompt.resize(static_cast<size_t>(prompt));
      for (auto& t : r.prompt) t = token(random_);
      // The scheduler must not see the end come: it is told of a longer answer.
      r.forced_length = new_tokens;
      r.max_new_tokens =
          std::min(2 * new_tokens, std::max(new_tokens, job_.limits.max_positions - prompt));
    }
    Pass done(job_.leader, std::move(requests));
    done.expect_tokens(new_tokens);
    return done;
  }

  // Shares of the limits: linears only, so attention and all else count as loss.
  void compare(Figures& f) const {
    const auto hidden = static_cast<double>(a_.hidden);
    const auto q = static_cast<double>(a_.heads) * a_.head_size;
    const auto kv = static_cast<double>(a_.kv_heads) * a_.head_size;
    const double layers =
        static_cast<double>(a_.layers) *
        (hidden * (2 * q + 2 * kv) + 3 * hidden * static_cast<double>(a_.intermediate));
    const double output = hidden * static_cast<double>(a_.vocab);
    f.prompt_flops = 2 * f.prompt_rate * (layers + output / plan_.prompt_tokens);
    f.decode_flops = 2 * f.decode_rate * (layers + output);
    const double replica_bytes = static_cast<double>(limits_.step_weight_bytes) / job_.grid.dp;
    f.read_share = f.steps_per_s * replica_bytes / limits_.read_bytes_per_s;
  }

  Job& job_;
  Plan plan_;
  Limits limits_;
  Architecture a_;
  std::mt19937 random_{20240607};
};

Json to_json(const Figures& f, const Limits& l) {
  Json j{{"batch", f.batch},
         {"prompt_tokens_per_s", f.prompt_rate},
         {"ttft_ms_p50", f.ttft_p50_ms},
         {"decode_tokens_per_s", f.decode_rate},
         {"step_ms", f.step_ms},
         {"worker_step_ms", f.worker_ms},
         {"steps_per_s", f.steps_per_s},
         {"tpot_ms", {{"p50", f.tpot_p50_ms}, {"p90", f.tpot_p90_ms}}},
         {"prompt_linear_flops_per_s", f.prompt_flops},
         {"prompt_share_of_linear_peak", f.prompt_flops / l.linear_flops_per_s},
         {"decode_linear_flops_per_s", f.decode_flops},
         {"decode_share_of_linear_peak", f.decode_flops / l.linear_flops_per_s},
         {"decode_share_of_read_bandwidth", f.read_share},
         {"repeats", f.repeats}};
  if (!f.energy.is_null()) {
    j["energy"] = f.energy;
    j["energy"]["of"] = "prompts and answers";
  }
  return j;
}

void print_head(const Limits& l) {
  const std::string read =
      l.gpu
          ? fmt::format("of the GPUs, in short bursts: copies {:.0f} GB/s read and written",
                        l.read_bytes_per_s / 1e9)
          : fmt::format("with {} threads: reads {:.1f} GB/s ({} MiB a rank; L3 {} MiB)", l.threads,
                        l.read_bytes_per_s / 1e9, l.read_buffer_bytes >> 20, l.l3_bytes >> 20);
  std::cout << fmt::format(
      "limits measured {}, linear {:.0f} GFLOP/s ({} cubed); a step reads {:.0f} MB of weights\n",
      read, l.linear_flops_per_s / 1e9, l.linear_size,
      static_cast<double>(l.step_weight_bytes) / 1e6);
  std::cout << fmt::format("{:>6} {:>12} {:>8} {:>9} {:>12} {:>9} {:>17} {:>8} {:>8}\n", "batch",
                           "prompt tok/s", "of peak", "TTFT ms", "decode tok/s", "step ms",
                           "TPOT p50/p90 ms", "of peak", "of read");
}

void print_row(const Figures& f, const Limits& l) {
  std::cout << fmt::format(
      "{:>6} {:>12.1f} {:>7.1f}% {:>9.1f} {:>12.1f} {:>9.2f} {:>8.2f} {:>8.2f} {:>7.1f}% "
      "{:>7.1f}%\n",
      f.batch, f.prompt_rate, 100 * f.prompt_flops / l.linear_flops_per_s, f.ttft_p50_ms,
      f.decode_rate, f.step_ms, f.tpot_p50_ms, f.tpot_p90_ms,
      100 * f.decode_flops / l.linear_flops_per_s, 100 * f.read_share);
  if (!f.energy.is_null()) {
    std::cout << fmt::format("{:>6} {}, prompts included\n", "", energy_text(f.energy));
  }
  std::cout << std::flush;
}

// Of the last minute: whether the machine was the bench's alone. Below 0: not told.
double load_average() {
  double load = -1;
  return ::getloadavg(&load, 1) == 1 ? load : -1;
}

// `json`: what --json gets, for whoever adds to it.
ExitCode bench(const Options& o, const Plan& plan, const Limits& limits, Job& job,
               const std::string& command_line, Json& json) {
  RunFacts facts;
  facts.versions = job.versions;
  facts.command_line = command_line;
  json = {{"bench", "step"},
          {"environment", environment_json(facts)},
          {"model",
           {{"name", o.text("model")},
            {"architecture", job.source.architecture().summary()},
            {"weights", job.source.description()},
            {"synthetic", job.source.synthetic()}}},
          {"grid", job.grid.text()},
          {"backend", job.backend},
          {"activations", job.activations},
          {"kv", job.kv},
          {"pages", job.pages},
          {"settings", job.settings},
          {"limits", to_json(limits)},
          {"prompt_tokens", plan.prompt_tokens},
          {"new_tokens", plan.new_tokens},
          {"figures", Json::array()}};
  json["load_average"]["begin"] = load_average();
  print_head(limits);
  StepBench bench(job, plan, limits);
  for (const int batch : plan.batches) bench.check(batch);
  bool below = false;
  for (const int batch : plan.batches) {
    const Figures f = bench.run(batch);
    print_row(f, limits);
    json["figures"].push_back(to_json(f, limits));
    below = below || f.prompt_rate < plan.floor_prompt || f.decode_rate < plan.floor_decode;
  }
  json["load_average"]["end"] = load_average();
  json["floors"] = {{"prompt", plan.floor_prompt}, {"decode", plan.floor_decode}, {"met", !below}};
  if (!o.text("json").empty()) write_json(o.text("json"), json);
  if (below) std::cout << "below the floor that was asked for\n";
  return below ? ExitCode::kInvalidResult : ExitCode::kOk;
}

// All ranks' budgets on rank 0's screen and into its `json`.
void tell_budget(RankParts& parts, const std::string& file, Json& json) {
  const Json mine = to_json(step_budgets(trace::spans()));
  if (trace::dropped() > 0) {
    log::warn("the trace was full: {} later events of this rank are not in the budget",
              trace::dropped());
  }
  const auto texts = gather_texts(mine.dump(), parts.world, parts.all);
  if (parts.world.rank() != 0) return;
  std::vector<Json> ranks;
  for (const std::string& text : texts) ranks.push_back(Json::parse(text));
  json["budget"] = {{"recorded_by", parts.gpu ? "CUPTI: kernels and copies" : "the host"},
                    {"ranks", ranks}};
  if (!file.empty()) write_json(file, json);
  std::cout << budget_text(ranks);
  if (ranks.front().empty()) {
    std::cout << "no budget: the trace has no operations (the log says why), or too few steps\n";
  }
  std::cout.flush();
}

}  // namespace

int bench_step(const std::vector<std::string>& arguments) {
  const auto table = bench_step_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  const Plan plan = plan_of(o);
  std::string line = "drover bench step";
  for (const auto& a : arguments) line += " " + a;
  Limits limits;
  Json json;
  JobParts parts;
  parts.measure = [&](RankParts& rank) { limits = measure_limits(rank); };
  parts.body = [&](Job& job) { return bench(o, plan, limits, job, line, json); };
  if (o.flag("budget")) {
    parts.trace_events = kBudgetEvents;
    parts.after = [&](RankParts& rank) { tell_budget(rank, o.text("json"), json); };
  }
  return run_job(o, parts);
}

}  // namespace drover
