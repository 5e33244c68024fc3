// result.json's "energy": what the devices used, by their own counters.
#include <fmt/format.h>

#include "serve/results.h"

namespace drover {

Json energy_json(const std::vector<RankTimes>& ranks, uint64_t output_tokens) {
  double joules = 0, watts = 0;
  int devices = 0;
  for (const RankTimes& t : ranks) {
    if (t.meter == RankTimes::Meter::kAnothers) continue;
    // Of some devices only is no figure; nor is a counter that stood still.
    if (t.meter == RankTimes::Meter::kAbsent || t.joules <= 0 || t.joules_seconds <= 0)
      return nullptr;
    joules += t.joules;
    watts += t.joules / t.joules_seconds;
    ++devices;
  }
  if (devices == 0) return nullptr;
  Json j = {{"joules", joules}, {"mean_watts", watts}};
  if (output_tokens > 0) {
    j["joules_per_output_token"] = joules / static_cast<double>(output_tokens);
  }
  j["devices"] = devices;
  j["measured_by"] = ranks.front().split ? "RAPL: processors and their memory, of whole hosts"
                                         : "NVML: whole GPUs, without the host";
  return j;
}

std::string energy_text(const Json& energy) {
  std::string text = fmt::format("{:.0f} J, {:.0f} W", energy.at("joules").get<double>(),
                                 energy.at("mean_watts").get<double>());
  if (energy.contains("joules_per_output_token")) {
    text += fmt::format(", {:.4g} J an output token",
                        energy.at("joules_per_output_token").get<double>());
  }
  return text;
}

}  // namespace drover
