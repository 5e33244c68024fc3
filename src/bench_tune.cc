// drover bench tune: the fastest way of each linear of a model's layers, by rows, into a file that
// a run reads (backend/tuning.h).
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <iostream>

#include "bench.h"
#include "bench_device.h"

namespace drover {

namespace {

// Of windows this short medians differ by some tenths of a percent.
constexpr double kWindowSeconds = 0.02;
constexpr double kWorthIt = 0.99;  // of the rule's time: below, the rule's way is left

std::string text_of(const LinearWay& w) {
  return fmt::format("{} tokens, cluster {}, {} a multiprocessor, {} stages{}", w.tokens, w.cluster,
                     w.per_sm, w.stages, w.split ? "" : ", not split");
}

class Tuner {
 public:
  Tuner(OpBench& bench, BenchLinears& linears) : bench_(bench), linears_(linears) {}

  LinearChoice choose(size_t part, int rows) {
    const auto copies = linears_.copies(part);
    const Linear& first = *copies[0];
    const auto ways = bench_.backend().linear_ways(first, rows);
    DROVER_CHECK(!ways.empty(), ExitCode::kUsage,
                 "nothing to tune: INT4 layers in symmetric groups of 128 on Hopper have several "
                 "ways, those of {} here have one",
                 bench_.options.text("model"));
    LinearChoice c{.format = first.quantized_input ? "w4a8" : "w4a16",
                   .n = first.rows,
                   .k = first.cols,
                   .rows = rows,
                   .way = ways[0]};
    // The rule's way before and after the others: a clock that falls meanwhile wrongs nobody.
    c.rule_us = time(copies, ways[0], rows);
    double best = c.rule_us;
    LinearWay fastest = ways[0];
    for (size_t i = 1; i < ways.size(); ++i) {
      const double us = time(copies, ways[i], rows);
      if (us < best) best = us, fastest = ways[i];
    }
    c.rule_us = std::min(c.rule_us, time(copies, ways[0], rows));
    c.us = c.rule_us;
    if (best < kWorthIt * c.rule_us) c.us = best, c.way = fastest;
    tell(part, c, ways);
    return c;
  }

 private:
  double time(const std::vector<Linear*>& copies, const LinearWay& way, int rows) {
    for (Linear* l : copies) bench_.backend().run_linear_as(*l, &way);
    const double us = 1e6 * linears_.measure("", copies, rows, kWindowSeconds).seconds;
    for (Linear* l : copies) bench_.backend().run_linear_as(*l, nullptr);
    bench_.backend().forget_replays();
    return us;
  }

  void tell(size_t part, const LinearChoice& c, const std::vector<LinearWay>& ways) {
    const bool rule = c.way == ways[0];
    const auto name =
        fmt::format("{} {} x {}, {} rows", BenchLinears::name(part), c.n, c.k, c.rows);
    std::cout << fmt::format("{:<36} {:>11.2f}  {}\n", name, c.us,
                             rule ? fmt::format("the rule's, of {} ways", ways.size())
                                  : fmt::format("the rule's {:.2f}; of {} ways: {}", c.rule_us,
                                                ways.size(), text_of(c.way)))
              << std::flush;
    bench_.add({{"name", name},
                {"format", c.format},
                {"us", c.us},
                {"rule_us", c.rule_us},
                {"ways", ways.size()},
                {"way", text_of(c.way)},
                {"as_the_rule", rule}});
  }

  OpBench& bench_;
  BenchLinears& linears_;
};

void tune(OpBench& bench) {
  const std::string file = bench.options.text("out");
  DROVER_CHECK(!file.empty(), ExitCode::kUsage,
               "--out is missing: the file that --tuning will read");
  DROVER_CHECK(!bench.choice.gpu_name.empty(), ExitCode::kUsage,
               "nothing to tune on a CPU: its linears have one way");
  Tuning tuning{bench.choice.gpu_name, {}};
  if (std::filesystem::exists(file)) {
    tuning = read_tuning(file);
    check_gpu(tuning, file, bench.choice.gpu_name);
  }
  auto rows = numbers_of(bench.options, "rows");
  std::sort(rows.begin(), rows.end());
  rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
  BenchLinears linears(bench, rows.back());
  Tuner tuner(bench, linears);
  std::vector<LinearChoice> choices;
  for (size_t part = 0; part < BenchLinears::kParts; ++part) {
    // Two parts of one shape are one layer to the file.
    const Linear& first = *linears.copies(part)[0];
    const bool known = std::any_of(choices.begin(), choices.end(), [&](const LinearChoice& c) {
      return c.n == first.rows && c.k == first.cols;
    });
    if (known) continue;
    std::vector<LinearChoice> of_part;
    for (const int n : rows) of_part.push_back(tuner.choose(part, n));
    merge(tuning, of_part);
    write_tuning(file, tuning);  // what is done is kept
    choices.insert(choices.end(), of_part.begin(), of_part.end());
  }
  const auto other = std::count_if(choices.begin(), choices.end(),
                                   [](const LinearChoice& c) { return c.us < c.rule_us; });
  std::cout << fmt::format(
      "{}: {} choices made, {} of them other than the rule's; runs on {} take "
      "them with --tuning\n",
      file, choices.size(), other, tuning.gpu);
}

}  // namespace

int bench_tune(const std::vector<std::string>& arguments) {
  return bench_operation("tune", bench_tune_options(), arguments, tune);
}

}  // namespace drover
