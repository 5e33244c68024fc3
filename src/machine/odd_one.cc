#include "machine/odd_one.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <set>

namespace drover {

namespace {

double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// `cost`: of a pair, more is worse; no less than `least` is looked at.
void find_odd(const std::vector<PairFigure>& pairs, const char* what,
              const std::function<double(const PairFigure&)>& cost,
              const std::function<double(const PairFigure&)>& shown, double least,
              std::vector<OddOne>& odd) {
  std::set<int> ranks;
  for (const PairFigure& p : pairs) ranks.insert({p.a, p.b});
  if (ranks.size() < 3) return;  // of two nobody can tell who
  const auto of = [&](const auto& figure, const auto& wanted) {
    std::vector<double> values;
    for (const PairFigure& p : pairs) {
      if (wanted(p)) values.push_back(figure(p));
    }
    return values;
  };
  bool found = false;
  for (const int r : ranks) {
    const auto own = [r](const PairFigure& p) { return p.a == r || p.b == r; };
    const auto others = [&own](const PairFigure& p) { return !own(p); };
    // Even the best of its pairs: its partners have good ones among themselves.
    const auto costs = of(cost, own);
    const double best = *std::min_element(costs.begin(), costs.end());
    if (best <= least || best <= 3 * median(of(cost, others))) continue;
    odd.push_back({.rank = r,
                   .a = -1,
                   .b = -1,
                   .same_host = pairs.front().same_host,
                   .what = what,
                   .value = median(of(shown, own)),
                   .usual = median(of(shown, others))});
    found = true;
  }
  if (found) return;
  const auto any = [](const PairFigure&) { return true; };
  const double usual = median(of(cost, any));
  for (const PairFigure& p : pairs) {
    if (cost(p) <= least || cost(p) <= 5 * usual) continue;
    odd.push_back({.rank = -1,
                   .a = p.a,
                   .b = p.b,
                   .same_host = p.same_host,
                   .what = what,
                   .value = shown(p),
                   .usual = median(of(shown, any))});
  }
}

}  // namespace

std::vector<OddOne> odd_ones(const std::vector<PairFigure>& pairs) {
  std::vector<OddOne> odd;
  for (const bool same_host : {true, false}) {
    std::vector<PairFigure> kind;
    std::copy_if(pairs.begin(), pairs.end(), std::back_inserter(kind),
                 [&](const PairFigure& p) { return p.same_host == same_host; });
    const auto latency = [](const PairFigure& p) { return p.latency_us; };
    const auto bandwidth = [](const PairFigure& p) { return p.gbytes; };
    const auto time = [](const PairFigure& p) { return p.gbytes > 0 ? 1 / p.gbytes : 1e9; };
    find_odd(kind, "latency", latency, latency, 20, odd);
    find_odd(kind, "bandwidth", time, bandwidth, 0, odd);
  }
  return odd;
}

std::vector<std::vector<std::pair<int, int>>> rounds_of_pairs(int count) {
  // The circle method: one stays, the others move on; with an odd count one pauses.
  const int places = count + count % 2;
  std::vector<int> circle;
  for (int i = 0; i < places; ++i) circle.push_back(i < count ? i : -1);
  std::vector<std::vector<std::pair<int, int>>> rounds;
  for (int r = 0; r + 1 < places; ++r) {
    auto& round = rounds.emplace_back();
    for (int i = 0; i < places / 2; ++i) {
      const int a = circle[static_cast<size_t>(i)];
      const int b = circle[static_cast<size_t>(places - 1 - i)];
      if (a >= 0 && b >= 0) round.emplace_back(std::min(a, b), std::max(a, b));
    }
    std::rotate(circle.begin() + 1, circle.end() - 1, circle.end());
  }
  return rounds;
}

}  // namespace drover
