#include "serve/step_budget.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <numeric>

namespace drover {
namespace {

constexpr const char* kCommunication = "communication";
constexpr const char* kCopies = "copies";
constexpr const char* kIdle = "idle";
constexpr const char* kOther = "other kernels";
// The order of a forward, and of the table.
constexpr std::array kOrder = {"embed",
                               "norm",
                               "sum + norm",
                               "qkv",
                               "rope + append",
                               "attention",
                               "attention prefill",
                               "attention decode",
                               "quantize",
                               "o",
                               "gate_up",
                               "silu",
                               "quantize gated",
                               "down",
                               "gather columns",
                               "output",
                               "linear",
                               "argmax",
                               "move pages",
                               kOther,
                               kCommunication,
                               kCopies,
                               kIdle};

// The first that fits. Names are as cupti_trace has them.
struct Rule {
  const char* word;
  const char* operation;
};
constexpr Rule kRules[] = {{"nccl", kCommunication},
                           {"all_reduce", kCommunication},
                           {"all_gather", kCommunication},
                           {"exchange", kCommunication},
                           {"peer_norm", "sum + norm"},
                           {"NormRows", "norm"},
                           {"GateRows", "silu"},
                           {"silu_kernel", "silu"},
                           {"PlainRows", "quantize"},
                           {"GatedRows", "quantize gated"},
                           {"GatheredRows", "gather columns"},
                           {"add_kernel", "norm"},
                           {"embed_kernel", "embed"},
                           {"rope_kernel", "rope + append"},
                           {"decode_kernel", "attention decode"},
                           {"prefill_kernel", "attention prefill"},
                           {"argmax_kernel", "argmax"},
                           {"merge_kernel", "argmax"},
                           {"store_kernel", "argmax"},
                           {"pages_kernel", "move pages"},
                           {"linear_kernel", "linear"},
                           {"widen_e4m3", "linear"},
                           {"gemm", "linear"},
                           {"gemv", "linear"},
                           {"nvjet", "linear"},
                           {"cutlass", "linear"},
                           {"cublas", "linear"},
                           {"splitK", "linear"}};

struct Run {
  std::string operation;
  int64_t begin = 0, end = 0;
};

bool is(const Run& r, const char* operation) { return r.operation == operation; }
bool norms(const Run& r) { return is(r, "norm") || is(r, "sum + norm"); }
bool tells_a_linear(const Run& r) {
  return norms(r) || is(r, "rope + append") || is(r, "silu") || is(r, "argmax") ||
         is(r, "quantize") || is(r, "quantize gated") || r.operation.starts_with("attention");
}

bool gates(const Run& r) { return is(r, "silu") || is(r, "quantize gated"); }

// A forward is norm, qkv, rope, attention, o, norm, gate_up, silu, down, ..., norm, output, argmax.
// A linear that does silu itself may be followed by down at once.
const char* linear_between(const Run* before, const Run* after, bool follows_linear) {
  if (before == nullptr) return "linear";
  // What attention wrote may be quantized apart.
  if (before->operation.starts_with("attention") || is(*before, "quantize")) return "o";
  if (gates(*before)) return "down";
  if (!norms(*before) || after == nullptr) return "linear";
  if (is(*after, "rope + append")) return "qkv";
  if (gates(*after)) return "gate_up";
  if (norms(*after)) return follows_linear ? "down" : "gate_up";
  if (is(*after, "argmax")) return "output";
  return "linear";
}

void name_linears(std::vector<Run>& runs) {
  std::vector<const char*> names(runs.size(), nullptr);
  std::vector<const Run*> after(runs.size(), nullptr);
  const Run* told = nullptr;
  for (size_t i = runs.size(); i-- > 0;) {
    after[i] = told;
    if (tells_a_linear(runs[i])) told = &runs[i];
  }
  told = nullptr;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (is(runs[i], "linear"))
      names[i] = linear_between(told, after[i], i > 0 && is(runs[i - 1], "linear"));
    if (tells_a_linear(runs[i])) told = &runs[i];
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    if (names[i] != nullptr) runs[i].operation = names[i];
  }
}

// Instants that are taken, as intervals apart.
class Cover {
 public:
  // How much of [begin, end) was free; it is taken from now on.
  int64_t take(int64_t begin, int64_t end) {
    if (end <= begin) return 0;
    const int64_t from = begin, to = end;
    int64_t free = to - from;
    auto at = taken_.upper_bound(begin);
    if (at != taken_.begin() && std::prev(at)->second >= begin) --at;
    while (at != taken_.end() && at->first <= to) {
      free -= std::max<int64_t>(0, std::min(to, at->second) - std::max(from, at->first));
      begin = std::min(begin, at->first), end = std::max(end, at->second);
      at = taken_.erase(at);
    }
    taken_.emplace(begin, end);
    return free;
  }

 private:
  std::map<int64_t, int64_t> taken_;  // begin -> end
};

struct Step {
  std::string kind;
  int64_t rows = 0, begin = 0, end = 0;
};

struct Recorded {
  std::vector<Step> steps;
  std::vector<Run> work, communication, copies;
};

int64_t row_count(const trace::Span& s) {
  for (const trace::Arg& a : s.args) {
    if (a.key != nullptr && std::strcmp(a.key, "rows") == 0) return a.value;
  }
  return 0;
}

Recorded sort_out(std::span<const trace::Span> spans) {
  Recorded r;
  for (const trace::Span& s : spans) {
    const std::string category = s.category;
    if (category == "step") r.steps.push_back({s.name, row_count(s), s.begin_ns, s.end_ns});
    if (category == "copy") r.copies.push_back({kCopies, s.begin_ns, s.end_ns});
    if (category != "kernel" && category != "operation") continue;
    Run run{category == "kernel" ? operation_of_kernel(s.name) : s.name, s.begin_ns, s.end_ns};
    (is(run, kCommunication) ? r.communication : r.work).push_back(std::move(run));
  }
  const auto by_begin = [](const auto& a, const auto& b) { return a.begin < b.begin; };
  std::stable_sort(r.steps.begin(), r.steps.end(), by_begin);
  for (auto* list : {&r.work, &r.communication, &r.copies})
    std::stable_sort(list->begin(), list->end(), by_begin);
  name_linears(r.work);
  return r;
}

struct Sum {
  int64_t steps = 0, ns = 0;
  std::map<std::string, std::pair<int64_t, double>> parts;  // nanoseconds, calls
};

// What of `list` lies in the step. `first`: of whom later steps may have something.
void add(const Step& step, const std::vector<Run>& list, size_t& first, Cover& cover, Sum& sum) {
  while (first < list.size() && list[first].end <= step.begin) ++first;
  for (size_t i = first; i < list.size() && list[i].begin < step.end; ++i) {
    const int64_t begin = std::max(step.begin, list[i].begin);
    const int64_t end = std::min(step.end, list[i].end);
    if (end < begin) continue;
    auto& [ns, calls] = sum.parts[list[i].operation];
    ns += cover.take(begin, end);
    // Of a call on the border each step has a part.
    calls += list[i].end > list[i].begin ? static_cast<double>(end - begin) /
                                               static_cast<double>(list[i].end - list[i].begin)
                                         : 1;
  }
}

size_t place_of(const std::string& operation) {
  const auto at = std::find(kOrder.begin(), kOrder.end(), operation);
  return static_cast<size_t>(at - kOrder.begin());
}

StepBudget mean_of(const std::string& kind, int64_t rows, const Sum& sum) {
  const auto steps = static_cast<double>(sum.steps);
  StepBudget b{.kind = kind,
               .rows = rows,
               .steps = sum.steps,
               .us = static_cast<double>(sum.ns) / 1e3 / steps};
  int64_t idle = sum.ns;
  for (const auto& [operation, part] : sum.parts) {
    b.parts.push_back(
        {operation, static_cast<double>(part.first) / 1e3 / steps, part.second / steps});
    idle -= part.first;
  }
  b.parts.push_back({kIdle, static_cast<double>(idle) / 1e3 / steps, 0});
  std::stable_sort(b.parts.begin(), b.parts.end(), [](const auto& a, const auto& c) {
    return place_of(a.operation) < place_of(c.operation);
  });
  return b;
}

}  // namespace

std::string operation_of_kernel(const std::string& kernel) {
  for (const Rule& rule : kRules) {
    if (kernel.find(rule.word) != std::string::npos) return rule.operation;
  }
  return kOther;
}

std::vector<StepBudget> step_budgets(std::span<const trace::Span> spans, int64_t least_steps) {
  const Recorded r = sort_out(spans);
  if (r.work.empty()) return {};
  std::map<std::pair<std::string, int64_t>, Sum> sums;
  size_t work = 0, communication = 0, copies = 0;
  int64_t all = 0;
  for (const Step& step : r.steps) {
    Sum& sum = sums[{step.kind, step.rows}];
    ++sum.steps;
    sum.ns += step.end - step.begin;
    all += step.end - step.begin;
    Cover cover;
    add(step, r.work, work, cover, sum);
    add(step, r.communication, communication, cover, sum);
    add(step, r.copies, copies, cover, sum);
  }
  std::vector<StepBudget> budgets;
  for (const auto& [key, sum] : sums) {
    if (sum.steps < least_steps || sum.ns * 100 < all) continue;
    budgets.push_back(mean_of(key.first, key.second, sum));
  }
  return budgets;
}

Json to_json(const std::vector<StepBudget>& budgets) {
  Json list = Json::array();
  for (const StepBudget& b : budgets) {
    Json j = {{"kind", b.kind}, {"rows", b.rows}, {"steps", b.steps}, {"us", b.us}};
    for (const auto& p : b.parts) {
      j["operations"].push_back({{"operation", p.operation},
                                 {"us", p.us},
                                 {"share", b.us > 0 ? p.us / b.us : 0.0},
                                 {"calls", p.calls}});
    }
    list.push_back(std::move(j));
  }
  return list;
}

namespace {

const Json* find(const Json& budgets, const Json& like) {
  for (const Json& b : budgets) {
    if (b.at("kind") == like.at("kind") && b.at("rows") == like.at("rows")) return &b;
  }
  return nullptr;
}

// Each rank's microseconds of an operation, and most calls; and of whole steps.
struct Row {
  std::vector<double> us;
  double calls = 0;
};
using Rows = std::map<std::pair<size_t, std::string>, Row>;  // by place in the forward

Rows rows_of(const std::vector<Json>& ranks, const Json& like, Row& steps) {
  Rows rows;
  steps.us.resize(ranks.size());
  for (size_t r = 0; r < ranks.size(); ++r) {
    const Json* b = find(ranks[r], like);
    if (b == nullptr) continue;  // it had too few of such steps
    steps.us[r] = b->at("us").get<double>();
    for (const Json& p : b->at("operations")) {
      const auto name = p.at("operation").get<std::string>();
      Row& row = rows[{place_of(name), name}];
      row.us.resize(ranks.size());
      row.us[r] = p.at("us").get<double>();
      row.calls = std::max(row.calls, p.at("calls").get<double>());
    }
  }
  return rows;
}

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

}  // namespace

std::string budget_text(const std::vector<Json>& ranks) {
  constexpr size_t kMostColumns = 8;
  std::string text;
  for (const Json& b : ranks.front()) {
    Row steps;
    const Rows rows = rows_of(ranks, b, steps);
    const auto line = [&](const std::string& name, const Row& row) {
      text += fmt::format("  {:<16}", name);
      for (size_t r = 0; r < std::min(ranks.size(), kMostColumns); ++r)
        text += fmt::format(" {:>10.1f}", row.us[r]);
      text += fmt::format(" {:>6.1f}% {:>7}\n", 100 * sum(row.us) / sum(steps.us),
                          row.calls > 0 ? fmt::format("{:.1f}", row.calls) : "");
    };
    text += fmt::format("{} of {} rows, the mean of {}\n{:<18}", b.at("kind").get<std::string>(),
                        b.at("rows").get<int64_t>(), b.at("steps").get<int64_t>(), "");
    for (size_t r = 0; r < std::min(ranks.size(), kMostColumns); ++r)
      text += fmt::format(" {:>10}", ranks.size() == 1 ? "us" : fmt::format("rank {} us", r));
    text += fmt::format(" {:>7} {:>7}\n", "share", "calls");
    for (const auto& [name, row] : rows) line(name.second, row);
    line("step", steps);
  }
  return text;
}

}  // namespace drover
