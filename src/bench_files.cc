#include "bench_files.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>

#include "base/error.h"
#include "engine/kv_cache.h"
#include "size_engine.h"

namespace drover {

NumberSizes number_sizes(const PlannedModel& m) {
  NumberSizes n;
  // A GPU keeps INT4 codes and a 16-bit scale a group; the CPU unpacks to the type of its linears.
  const double plain = m.activations == "f32" ? 4 : 2;
  n.layer_weight = m.gpu && m.group > 0 ? 0.5 + 2.0 / m.group : plain;
  n.output_weight = plain;
  n.activation = m.gpu ? 2 : 4;
  const KvShape one{.format = kv_format(m.kv),
                    .pages = 1,
                    .page_tokens = 1,
                    .kv_heads = 1,
                    .head_size = m.arch.head_size};
  n.kv_head = static_cast<double>(KvCache::page_bytes(one, 1));
  return n;
}

namespace {

class File {
 public:
  File(const std::string& name, const PlannedModel& model)
      : name_(name), model_(model), json_(read_json(name)) {}

  void read(BenchFiles& out) const {
    try {
      const std::string kind = json_.value("bench", json_.contains("results") ? "operations" : "");
      if (kind == "step") {
        out.steps.push_back(step());
      } else if (kind == "linear") {
        linear(out.operations);
      } else if (kind == "attention") {
        attention(out.operations);
      } else if (kind == "comm") {
        comm(out.operations);
      } else if (kind == "operations") {
        operations(out.operations);
      } else {
        DROVER_FAIL(ExitCode::kBadInput,
                    "{}: not a file of drover bench step, linear, attention or comm (--json)",
                    name_);
      }
    } catch (const Error&) {
      throw;
    } catch (const std::exception& e) {  // a key that is not there, a word for a number
      DROVER_FAIL(ExitCode::kBadInput, "{}: not as drover bench writes it: {}", name_, e.what());
    }
    out.names.push_back(name_);
    const Json versions =
        json_.value("environment", Json::object()).value("versions", Json::object());
    out.devices.push_back(versions.value("backend", ""));
  }

 private:
  // Files are whoever's: sizes decide about memory, rates are divided by.
  template <class Number>
  Number sane(const char* what, Number value, double least, double most) const {
    DROVER_CHECK(static_cast<double>(value) >= least && static_cast<double>(value) <= most,
                 ExitCode::kBadInput, "{}: {} is {}; expected {} to {}", name_, what, value, least,
                 most);
    return value;
  }

  void same(const std::string& what, const std::string& theirs, const std::string& ours) const {
    DROVER_CHECK(theirs == ours, ExitCode::kUsage,
                 "{}: measured with {} {}, but {} is planned: calibrate with benches of the same",
                 name_, what, theirs, ours);
  }

  static int whole(const Json& settings, const char* key) {
    const Json& v = settings.at(key);
    return v.is_string() ? std::stoi(v.get<std::string>()) : v.get<int>();
  }

  StepBenchFile step() const {
    same("the model", json_.at("model").at("architecture"), model_.arch.summary());
    same("--activations", json_.at("activations"), model_.activations);
    same("--kv", json_.at("kv"), model_.kv);
    const bool gpu = json_.at("backend") != "cpu";
    same("the backend", gpu ? "cuda" : "cpu", model_.gpu ? "cuda" : "cpu");
    StepBenchFile f;
    f.file = name_;
    DROVER_CHECK(std::sscanf(json_.at("grid").get<std::string>().c_str(), "tp %d x pp %d x dp %d",
                             &f.grid.tp, &f.grid.pp, &f.grid.dp) == 3,
                 ExitCode::kBadInput, "{}: no grid in it", name_);
    for (const int size : {f.grid.tp, f.grid.pp, f.grid.dp})
      sane("a size of the grid", size, 1, 1024);
    const Json& s = json_.at("settings");
    const ReplicaLimits d = default_limits(gpu);
    ReplicaLimits& l = f.limits;
    const auto given = [&](const char* key, int by_default) {
      const int value = whole(s, key);
      return value == 0 ? by_default : value;
    };
    l.pages = json_.at("pages").at("count");
    l.page_tokens = json_.at("pages").at("tokens");
    l.max_positions = whole(s, "max-positions");
    l.groups = whole(s, "groups");
    l.slots = given("max-sequences", d.slots);
    l.step_tokens = given("step-tokens", d.step_tokens);
    l.chunk_tokens = given("chunk-tokens", std::min(d.chunk_tokens, l.step_tokens));
    sane("the number of pages", l.pages, 1, 1 << 24);
    sane("the tokens of a page", l.page_tokens, 1, 4096);
    sane("the sequences at once", l.slots, 1, 1 << 20);
    sane("the groups", l.groups, f.grid.pp, 1 << 12);
    sane("the rows of a step", std::min(l.step_tokens, l.chunk_tokens), 1, 1 << 20);
    const Json& limits = json_.at("limits");
    f.threads = std::max(1, limits.at("threads").get<int>() / f.grid.ranks());
    f.prompt_tokens = json_.at("prompt_tokens");
    f.new_tokens = json_.at("new_tokens");
    sane("prompt_tokens", f.prompt_tokens, 1, 1 << 20);
    sane("new_tokens", f.new_tokens, 3, 1 << 20);
    for (const Json& j : json_.at("figures")) {
      StepBenchFile::Figure figure;
      figure.batch = sane("a batch", j.at("batch").get<int>(), 1, 1 << 16);
      figure.prompt_rate = sane("a rate", j.at("prompt_tokens_per_s").get<double>(), 1e-9, 1e15);
      figure.step_seconds = sane("step_ms", j.at("step_ms").get<double>(), 1e-9, 1e9) / 1e3;
      double least = 1e300, most = 0;
      for (const Json& r : j.at("repeats")) {
        least = std::min(least, r.at("step_ms").get<double>());
        most = std::max(most, r.at("step_ms").get<double>());
      }
      figure.noise = most > 0 ? std::log(most / least) / 2 : 0;
      f.figures.push_back(figure);
    }
    return f;
  }

  void add(std::vector<Observation>& out, const std::string& what, double seconds, double sigma,
           std::function<double(const Rates&)> predict, int threads = 0) const {
    sane("a time", seconds, 1e-12, 1e6);
    out.push_back({what, seconds, sigma, Origin::kMeasured, std::move(predict), threads});
  }
  // Of a bench of one operation on one rank.
  int operation_threads() const {
    return model_.gpu ? 0 : sane("threads", json_.at("limits").at("threads").get<int>(), 1, 4096);
  }

  void linear(std::vector<Observation>& out) const {
    same("--activations", json_.at("activations"), model_.activations);
    for (const Json& j : json_.at("figures")) {
      const double bytes = j.at("bytes"), flops = j.at("flops");
      add(
          out, "linear " + j.at("name").get<std::string>(), j.at("us").get<double>() * 1e-6, 0.1,
          [=](const Rates& r) { return knee(bytes / r[kRead], flops / r[kFlops], r[kOverlap]); },
          operation_threads());
    }
  }

  void attention(std::vector<Observation>& out) const {
    for (const Json& j : json_.at("figures")) {
      const double bytes = j.at("bytes"), flops = j.at("flops");
      const std::string name = j.at("name");
      const bool decodes = name.find(", 1 row,") != std::string::npos;
      add(
          out, "attention " + name, j.at("us").get<double>() * 1e-6, 0.2,
          [=](const Rates& r) { return decodes ? bytes / r[kCache] : flops / r[kPairs]; },
          operation_threads());
    }
  }

  void comm(std::vector<Observation>& out) const {
    const int ranks = sane("ranks", json_.at("ranks").get<int>(), 2, 1 << 20);
    // Sums of steps are recorded where that is possible: a plain one that also was is left out.
    std::map<double, bool> recorded;
    for (const Json& j : json_.at("figures")) {
      if (j.value("graph_calls", 0) > 0 && j.at("operation") == "all_reduce") {
        recorded[j.at("bytes").get<double>()] = true;
      }
    }
    for (const Json& j : json_.at("figures")) {
      const std::string operation = j.at("operation");
      const double bytes = j.at("bytes");
      const double seconds = j.at("us").get<double>() * 1e-6;
      const std::string what = fmt::format("{} of {} bytes, {} ranks", operation, bytes, ranks);
      if (operation == "all_reduce" && (j.value("graph_calls", 0) > 0 || !recorded[bytes])) {
        const Placement place{.tp = ranks};
        add(out, what, seconds, 0.3, [=](const Rates& r) { return ring_seconds(bytes, place, r); });
      }
      if (operation == "peer_norm" && j.value("graph_calls", 0) > 0 &&
          peers_may_sum(bytes, {.tp = ranks})) {
        // Without the norm, which is what a sum with it takes more than one without.
        const double sum = seconds - recorded_seconds("reduce_norm", bytes) +
                           recorded_seconds("all_reduce", bytes);
        const Placement place{.tp = ranks};
        if (sum > 0)  // not so where one of them is absent
          add(out, what, sum, 0.3, [=](const Rates& r) { return peer_seconds(bytes, place, r); });
      }
      if (operation == "send_recv") {
        add(out, what, seconds, 0.3, [=](const Rates& r) { return send_seconds(bytes, false, r); });
      }
    }
  }

  // Of an operation on bf16 in a graph, between the sizes measured; NaN outside of them.
  double recorded_seconds(const std::string& operation, double bytes) const {
    std::map<double, double> at;
    for (const Json& j : json_.at("figures"))
      if (j.at("operation") == operation && j.at("type") == "bf16" && j.value("graph_calls", 0) > 0)
        at[j.at("bytes").get<double>()] = j.at("us").get<double>() * 1e-6;
    const auto above = at.lower_bound(bytes);
    if (above == at.end()) return std::nan("");
    if (above->first == bytes) return above->second;
    if (above == at.begin()) return std::nan("");
    const auto below = std::prev(above);
    const double share = (bytes - below->first) / (above->first - below->first);
    return below->second + share * (above->second - below->second);
  }

  // cuda_ops_bench's: decode attention is what steps need of it.
  void operations(std::vector<Observation>& out) const {
    for (const Json& j : json_.at("results")) {
      const std::string name = j.at("name");
      if (name.rfind("attention " + model_.kv, 0) != 0 || !name.ends_with("tokens, 1 rows"))
        continue;
      const double seconds = j.at("ms").get<double>() / 1e3;
      const double bytes = j.at("gb_s").get<double>() * 1e9 * seconds;
      add(out, name, seconds, 0.2, [=](const Rates& r) { return bytes / r[kCache]; });
    }
  }

  std::string name_;
  const PlannedModel& model_;
  Json json_;
};

}  // namespace

BenchFiles read_bench_files(const std::vector<std::string>& files, const PlannedModel& model) {
  BenchFiles out;
  for (const auto& file : files) File(file, model).read(out);
  return out;
}

std::vector<Observation> step_observations(const StepBenchFile& file, const PlannedModel& model,
                                           const std::function<Rates(const Rates&)>& scaled) {
  const auto shape = std::make_shared<const GridShape>(
      grid_shape(model.arch, model.group, file.grid, number_sizes(model), 0));
  std::vector<Observation> out;
  for (const StepBenchFile::Figure& f : file.figures) {
    const double sigma = std::max(0.04, f.noise);
    const auto costs = [shape, scaled](const Rates& r) { return replica_costs(*shape, scaled(r)); };
    out.push_back(
        {fmt::format("{}: a prompt token, batch {}", file.grid.text(), f.batch), 1 / f.prompt_rate,
         sigma, Origin::kFitted, [file, costs, batch = f.batch](const Rates& r) {
           return 1 / prompt_rate(file.grid, file.limits, costs(r), batch, file.prompt_tokens);
         }});
    out.push_back({fmt::format("{}: a decode step, batch {}", file.grid.text(), f.batch),
                   f.step_seconds, sigma, Origin::kFitted,
                   [file, costs, batch = f.batch](const Rates& r) {
                     return decode_figures(file.grid, file.limits, costs(r), batch,
                                           file.prompt_tokens, file.new_tokens)
                         .step_seconds;
                   },
                   file.threads});
  }
  return out;
}

}  // namespace drover
