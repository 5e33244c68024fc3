// drover plan: memory, step times and rates of each grid of a machine, before anyone has booked it.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>

#include "base/error.h"
#include "command_line.h"
#include "commands.h"
#include "planning.h"

namespace drover {

namespace {

constexpr double kSigmas90 = 1.645;  // of a normal distribution: 90 % lie within

struct Planned {
  SizedGrid sized;
  GridShape shape;
  Rates rates;
  Estimate e;
  Steady steady;
  int even_step_tokens = 0;  // with which a pipeline's steps are more alike; 0: no gain
  Steady even;               // then
  double sigma = 0;          // relative, of tokens/s
};

double gib(size_t bytes) { return static_cast<double>(bytes) / (size_t{1} << 30); }

// Share of the stages' time in which they wait.
double bubble_of(const Planned& p) { return std::max(0.0, 1 - p.steady.busy); }

struct Interval {
  double low, high;
};
Interval around(double value, double sigma) {
  return {value * std::exp(-kSigmas90 * sigma), value * std::exp(kSigmas90 * sigma)};
}

Workload workload_of(const Options& o, const std::vector<Arrival>& samples) {
  Workload w;
  const auto n = static_cast<double>(samples.size());
  for (const Arrival& a : samples) {
    w.prompt_tokens += a.prompt / n;
    w.output_tokens += a.forced_length / n;
    w.prompt_pairs += a.prompt * (a.prompt + 1.0) / 2 / n;
  }
  w.most_sequences = static_cast<double>(o.integer("sequences", 0, 1 << 30));
  return w;
}

// A pipeline waits for steps that prompts fall into; with fewer rows allowed a step they are alike.
void even_out(Planned& p, const std::vector<Arrival>& samples, const Workload& w) {
  for (const double room : {1.1, 1.4, 2.0}) {
    ReplicaLimits limits = p.sized.limits;
    const int tokens = (static_cast<int>(room * p.e.step.rows) + 7) / 8 * 8;
    if (tokens >= limits.step_tokens) continue;
    limits.step_tokens = limits.chunk_tokens = tokens;
    const Steady s = simulate_steady(p.shape, limits, samples, w.most_sequences, p.rates);
    if (s.tokens_per_s < 1.02 * std::max(p.steady.tokens_per_s, p.even.tokens_per_s)) continue;
    p.even_step_tokens = tokens;
    p.even = s;
  }
}

Planned plan_grid(const Planning& planning, const Grid& grid, const Workload& w,
                  const std::vector<Arrival>& samples) {
  Planned p;
  p.sized = planning.size(grid);
  if (!p.sized.problem.empty()) return p;
  p.shape = planning.shape(grid);
  p.rates = planning.rates(p.sized);
  p.e = estimate(p.shape, p.sized.limits, w, p.rates);
  try {
    p.steady = simulate_steady(p.shape, p.sized.limits, samples, w.most_sequences, p.rates);
  } catch (const Error& e) {
    if (e.code() != ExitCode::kUsage) throw;
    p.sized.problem = e.what();  // a sequence that can never run with so few pages
    return p;
  }
  if (bubble_of(p) > 0.03) even_out(p, samples, w);
  p.sigma = relative_sigma(p.rates, [&](const Rates& r) {
    return estimate(p.shape, p.sized.limits, w, r).tokens_per_s;
  });
  return p;
}

// One term of the slowest stage's step, or of the round.
struct Term {
  const char* name;
  double seconds, sigma;
  Origin origin;
};

std::vector<Term> terms_of(const Planned& p) {
  std::vector<Term> terms;
  const auto add = [&](const char* name, const std::function<double(const StepCost&)>& part) {
    const auto f = [&](const Rates& r) {
      return part(
          step_cost(p.shape.stages[static_cast<size_t>(p.e.slowest)], p.e.step, p.shape.place, r));
    };
    const double seconds = f(p.rates);
    if (seconds <= 0) return;
    terms.push_back({name, seconds, relative_sigma(p.rates, f), origin_of(p.rates, f)});
  };
  add("linears", [](const StepCost& c) { return c.linears; });
  add("output layer", [](const StepCost& c) { return c.output; });
  add("attention", [](const StepCost& c) { return c.attention; });
  add("norms, activation", [](const StepCost& c) { return c.rows; });
  add("overhead", [](const StepCost& c) { return c.overhead; });
  add("sums over tp", [](const StepCost& c) { return c.sums; });
  if (p.e.send_seconds > 0) {
    const auto send = [&](const Rates& r) {
      return send_seconds(p.e.step.rows * p.shape.stages[0].hidden_bytes,
                          p.shape.place.stages_cross_nodes, r);
    };
    terms.push_back({"send to next stage", send(p.rates), relative_sigma(p.rates, send),
                     origin_of(p.rates, send)});
  }
  return terms;
}

Json interval_json(double value, double sigma) {
  const Interval i = around(value, sigma);
  return {{"value", value}, {"low", i.low}, {"high", i.high}};
}

Json memory_json(const SizedGrid& g) {
  Json ranks = Json::array();
  for (const EngineSizes& s : g.stages) {
    const MemoryPlan& m = s.plan;
    ranks.push_back({{"weights", m.weights},
                     {"kv", static_cast<size_t>(s.limits.pages) * s.page_bytes},
                     {"buffers", m.buffers},
                     {"workspace", m.workspace},
                     {"graphs", m.graphs},
                     {"communication", m.comm},
                     {"budget", m.budget}});
  }
  return {{"pages", g.limits.pages},
          {"page_tokens", g.limits.page_tokens},
          {"kv_tokens", int64_t{g.limits.pages} * g.limits.page_tokens},
          {"slots", g.limits.slots},
          {"bytes_of_stages", ranks}};
}

Json grid_json(const Planned& p) {
  const Grid& g = p.sized.grid;
  Json j{{"tp", g.tp}, {"pp", g.pp}, {"dp", g.dp}};
  if (!p.sized.problem.empty()) {
    j["problem"] = p.sized.problem;
    return j;
  }
  j["memory"] = memory_json(p.sized);
  j["sequences"] = p.e.sequences;
  j["rows_a_step"] = p.e.step.rows;
  j["decode_rows_a_step"] = p.e.decode_rows;
  j["step_ms"] = interval_json(1e3 * p.steady.step_seconds, p.sigma);
  j["tokens_per_s"] = interval_json(p.steady.tokens_per_s, p.sigma);
  j["bubble"] = bubble_of(p);
  j["bubble_of_even_steps"] = p.e.bubble;
  j["threads"] = p.sized.threads;
  if (p.even_step_tokens > 0) {
    j["with_even_steps"] = {{"step_tokens", p.even_step_tokens},
                            {"tokens_per_s", p.even.tokens_per_s}};
  }
  j["terms_ms_of_slowest_stage"] = Json::array();
  for (const Term& t : terms_of(p)) {
    Json term = interval_json(1e3 * t.seconds, t.sigma);
    term["name"] = t.name;
    term["origin"] = to_string(t.origin);
    j["terms_ms_of_slowest_stage"].push_back(term);
  }
  return j;
}

void print_head(const Planning& planning, const Workload& w, size_t samples) {
  const Topology& t = planning.topology();
  const PlannedModel& m = planning.model();
  std::cout << fmt::format("{}\nactivations {}, KV {}; ", m.arch.summary(), m.activations, m.kv);
  std::cout << (t.gpu() ? fmt::format("{:.0f} x {:.0f} {}", t.nodes, t.gpus_per_node,
                                      t.gpu_name.empty() ? "GPUs" : t.gpu_name)
                        : fmt::format("CPU ranks on {:.0f} x {:.0f} cores", t.nodes, t.cores));
  std::cout << fmt::format(", {} ranks; {:.1f} prompt tokens, {:.1f} new ones ({})\n",
                           planning.ranks(), w.prompt_tokens, w.output_tokens,
                           samples == 1 ? "as given" : fmt::format("means of {}", samples));
  if (!planning.calibrated()) {
    std::cout
        << "rates: the topology file's, not calibrated (--calibrate takes drover bench's files)\n";
    return;
  }
  for (const Fitted& f : planning.fits()) {
    std::cout << fmt::format("rates{}: fitted to {} figures, the worst step is {:.0f} % off\n",
                             t.gpu() ? "" : fmt::format(" of {} threads a rank", f.threads),
                             f.observations.size(), 100 * f.calibration.worst);
  }
}

void print_grids(const std::vector<Planned>& all, size_t most) {
  std::cout << fmt::format(
      "\n{:>4} {:>3} {:>5}  {:>8} {:>8} {:>6}  {:>6} {:>6}  {:>8} {:>8} {:>8} {:>7} {:>7} {:>7}  "
      "{:>10} {:>19}\n",
      "tp", "pp", "dp", "weights", "KV GiB", "rest", "seqs", "rows", "step ms", "linears",
      "attent.", "other", "sums", "bubble", "tokens/s", "90 %");
  size_t shown = 0;
  for (const Planned& p : all) {
    if (!p.sized.problem.empty() || shown++ >= most) continue;
    const Grid& g = p.sized.grid;
    const EngineSizes& s = p.sized.stages[static_cast<size_t>(p.e.slowest)];
    const StepCost& c = p.e.stages[static_cast<size_t>(p.e.slowest)];
    const Interval i = around(p.steady.tokens_per_s, p.sigma);
    std::cout << fmt::format(
        "{:>4} {:>3} {:>5}  {:>8.2f} {:>8.2f} {:>6.2f}  {:>6.0f} {:>6.0f}  {:>8.2f} {:>8.2f} "
        "{:>8.2f} {:>7.2f} {:>7.2f} {:>6.1f}%  {:>10.0f} {:>8.0f} to {:>7.0f}\n",
        g.tp, g.pp, g.dp, gib(s.plan.weights),
        gib(static_cast<size_t>(s.limits.pages) * s.page_bytes),
        gib(s.plan.without_kv() - s.plan.weights), p.e.sequences, p.e.step.rows,
        1e3 * p.steady.step_seconds, 1e3 * c.linears, 1e3 * c.attention,
        1e3 * (c.output + c.rows + c.overhead), 1e3 * c.sums, 100 * bubble_of(p),
        p.steady.tokens_per_s, i.low, i.high);
  }
  if (shown > most) std::cout << fmt::format("... and {} more (--json has all)\n", shown - most);
  for (const Planned& p : all) {
    if (!p.sized.problem.empty()) {
      std::cout << fmt::format("{} does not fit: {}\n", p.sized.grid.text(), p.sized.problem);
    }
  }
  std::cout
      << "(weights, KV and rest: GiB of a rank of the slowest stage; the parts of a step: ms of "
         "that stage's mean step. step ms, how often a replica begins a step, bubble and "
         "tokens/s are simulated)\n";
}

// What a grid loses most by, in words.
std::string loss_of(const Planned& p, const Planned& best) {
  std::vector<std::pair<double, std::string>> losses;
  if (p.sized.grid.tp > 1) {
    losses.push_back({p.e.sums_share, fmt::format("{:.0f} % of a step go into sums between ranks",
                                                  100 * p.e.sums_share)});
  }
  const double bubble = bubble_of(p);
  losses.push_back(
      {bubble, fmt::format("its stages wait {:.0f} % of their time (steps with prompts "
                           "are longer than others; --step-tokens evens them out)",
                           100 * bubble)});
  const double rows = p.e.step.rows / best.e.step.rows;
  if (rows < 1) {
    losses.push_back({1 - rows, fmt::format("its steps have {:.0f} rows instead of {:.0f}, for the "
                                            "same weights to read",
                                            p.e.step.rows, best.e.step.rows)});
  }
  const auto& worst = *std::max_element(losses.begin(), losses.end());
  return worst.first > 0.005 ? worst.second : "its steps are a little slower";
}

void print_why(const Planning& planning, const std::vector<Planned>& all) {
  const Planned& best = all.front();
  std::cout << fmt::format("\nbest: {}\n", best.sized.grid.text());
  for (const Term& t : terms_of(best)) {
    const Interval i = around(1e3 * t.seconds, t.sigma);
    std::cout << fmt::format("  {:<20} {:>9.3f} ms  ({:.3f} to {:.3f})  {}\n", t.name,
                             1e3 * t.seconds, i.low, i.high, to_string(t.origin));
  }
  const ShardShape& s = best.shape.stages[static_cast<size_t>(best.e.slowest)];
  const double read = s.layers * s.layer_bytes / best.rates[kRead];
  const double work = 2 * s.layers * best.e.step.rows * s.layer_weights / best.rates[kFlops];
  std::cout << fmt::format(
      "why: its linears are bound by {} (reading takes {:.1f} ms, arithmetic {:.1f})",
      read > work ? "memory" : "arithmetic", 1e3 * read, 1e3 * work);
  for (size_t i = 1; i < all.size() && i < 3; ++i) {
    if (!all[i].sized.problem.empty()) break;
    std::cout << fmt::format("; {} gives {:.0f} % less: {}", all[i].sized.grid.text(),
                             100 * (1 - all[i].steady.tokens_per_s / best.steady.tokens_per_s),
                             loss_of(all[i], best));
  }
  std::cout << "\n";
  int hints = 0;
  for (const Planned& p : all) {
    if (p.even_step_tokens == 0 || ++hints > 3) continue;
    std::cout << fmt::format(
        "hint: {} would give {:.0f} tokens/s (+{:.0f} %) with --step-tokens {}\n",
        p.sized.grid.text(), p.even.tokens_per_s,
        100 * (p.even.tokens_per_s / p.steady.tokens_per_s - 1), p.even_step_tokens);
  }
  for (const Planned& p : all) {
    if (!p.sized.problem.empty()) continue;
    const std::string warning = tensor_warning(planning.topology(), planning.model().arch,
                                               p.sized.grid, p.e.step.rows, p.rates);
    if (!warning.empty()) std::cout << "warning: " << warning << "\n";
  }
  for (const auto& warning : planning.warnings()) std::cout << "warning: " << warning << "\n";
  const Topology& t = planning.topology();
  if (!t.gpu() && planning.ranks() > t.ranks()) {
    std::cout << fmt::format(
        "warning: {} ranks share {} cores: they wait for each other's turns, "
        "which this model does not know\n",
        planning.ranks(), t.ranks());
  }
}

// Measured steps beside the model's, of files that it was not fitted to.
Json hold_against(const Planning& planning, const std::vector<std::string>& names) {
  Json all = Json::array();
  const BenchFiles files = read_bench_files(names, planning.model());
  std::cout << fmt::format("\n{:<28} {:>12} {:>12} {:>8}\n", "held against", "measured", "model",
                           "error");
  for (const StepBenchFile& f : files.steps) {
    const Rates rates = planning.rates_of(f);
    for (const Observation& o :
         step_observations(f, planning.model(), [](const Rates& r) { return r; })) {
      const double predicted = o.predict(rates);
      const bool prompts = o.what.find("prompt") != std::string::npos;
      const double measured = prompts ? 1 / o.value : 1e3 * o.value;
      const double model = prompts ? 1 / predicted : 1e3 * predicted;
      std::cout << fmt::format("{:<48} {:>10.2f} {:>10.2f} {:<8} {:>+6.1f} %\n", o.what, measured,
                               model, prompts ? "tokens/s" : "ms", 100 * (model / measured - 1));
      all.push_back({{"file", f.file},
                     {"what", o.what},
                     {"unit", prompts ? "tokens/s" : "ms"},
                     {"measured", measured},
                     {"model", model},
                     {"error", model / measured - 1}});
    }
  }
  return all;
}

Json rates_json(const Rates& rates) {
  Json j;
  for (int i = 0; i < kRates; ++i) {
    const auto id = static_cast<RateId>(i);
    j[rate_name(id)] = interval_json(rates[id], rates.sigma(id));
    j[rate_name(id)]["origin"] = to_string(rates.origin[id]);
  }
  j["misfit"] = rates.misfit;
  return j;
}

}  // namespace

int plan_command(const std::vector<std::string>& arguments) {
  auto table = planning_options();
  table.insert(
      table.begin(),
      {{"sequences", "0", "sequences at once over all replicas at most (0: all that fit)"},
       {"against", "", "files of drover bench step to hold the model against, with commas"},
       {"show", "12", "grids in the table"}});
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  const Planning planning(o);
  const auto samples = planning.samples();
  const Workload w = workload_of(o, samples);
  std::vector<Planned> all;
  for (const Grid& g : planning.grids()) all.push_back(plan_grid(planning, g, w, samples));
  std::stable_sort(all.begin(), all.end(), [](const Planned& a, const Planned& b) {
    return a.steady.tokens_per_s > b.steady.tokens_per_s;
  });
  print_head(planning, w, samples.size());
  print_grids(all, static_cast<size_t>(o.integer("show", 1, 1 << 20)));
  Json json{{"plan", "drover"},
            {"model", planning.model().arch.summary()},
            {"topology", planning.topology().file},
            {"ranks", planning.ranks()},
            {"prompt_tokens", w.prompt_tokens},
            {"output_tokens", w.output_tokens},
            {"calibrated_with", planning.calibrated_with()},
            {"grids", Json::array()},
            {"rates", rates_json(planning.fits().front().calibration.rates)}};
  // `rates` are the first fit's: the only one on GPUs, that of the fewest threads on a CPU.
  json["observations"] = Json::array();
  for (const Fitted& f : planning.fits()) {
    for (size_t i = 0; i < f.observations.size(); ++i) {
      json["observations"].push_back({{"what", f.observations[i].what},
                                      {"threads", f.observations[i].threads},
                                      {"measured", f.observations[i].value},
                                      {"model", f.calibration.predicted[i]}});
    }
  }
  for (const Planned& p : all) json["grids"].push_back(grid_json(p));
  const bool fits = all.front().sized.problem.empty();
  if (fits) print_why(planning, all);
  if (!o.list("against").empty()) json["against"] = hold_against(planning, o.list("against"));
  if (!o.text("json").empty()) write_json(o.text("json"), json);
  DROVER_CHECK(fits, ExitCode::kEnvironment, "no grid of {} ranks holds {}", planning.ranks(),
               planning.model().name);
  return 0;
}

}  // namespace drover
