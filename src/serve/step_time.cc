// result.json's "step_time": where the ranks' time went.
#include <algorithm>

#include "serve/results.h"

namespace drover {
namespace {

constexpr size_t kMostRanksNamed = 64;

struct Part {
  const char* name;
  double RankTimes::*seconds;
};
constexpr Part kSplit[] = {{"compute", &RankTimes::compute},
                           {"communication", &RankTimes::communication},
                           {"stage_wait", &RankTimes::stage_wait},
                           {"plan_wait", &RankTimes::plan_wait},
                           {"host", &RankTimes::host}};
// What the host knows of a device that works on its own.
constexpr Part kDevice[] = {{"device", &RankTimes::device},
                            {"plan_wait", &RankTimes::plan_wait},
                            {"host_beside_device", &RankTimes::host}};

std::span<const Part> parts_of(const RankTimes& t) {
  return t.split ? std::span<const Part>(kSplit) : std::span<const Part>(kDevice);
}

Json rank_json(const RankTimes& t) {
  Json j = {{"rank", t.rank}, {"steps", t.steps}, {"seconds", t.seconds}};
  for (const Part& part : parts_of(t)) j[std::string(part.name) + "_s"] = t.*part.seconds;
  return j;
}

}  // namespace

Json step_time_json(const std::vector<RankTimes>& ranks) {
  double steps = 0, seconds = 0;
  for (const auto& t : ranks) {
    steps += static_cast<double>(t.steps);
    seconds += t.seconds;
  }
  if (steps <= 0) return nullptr;
  Json mean = {{"step", 1e3 * seconds / steps}};
  const bool split = ranks.front().split;
  for (const Part& part : parts_of(ranks.front())) {
    double sum = 0;
    for (const auto& t : ranks) sum += t.*part.seconds;
    mean[part.name] = 1e3 * sum / steps;
  }
  if (split) {
    mean["bubble"] = mean["stage_wait"].get<double>() + mean["plan_wait"].get<double>();
  }
  Json j = {{"mean_ms", mean},
            {"ranks", ranks.size()},
            {"steps", steps / static_cast<double>(ranks.size())},
            {"measured_by", "each rank's worker, on its host's clock"}};
  if (!split) {
    j["absent"] =
        "compute, communication and bubbles lie within `device`: a GPU works through its queue "
        "unseen by the host; --trace shows them";
  }
  for (const auto& t : ranks) {
    if (ranks.size() <= kMostRanksNamed) j["per_rank"].push_back(rank_json(t));
  }
  return j;
}

}  // namespace drover
