// How many sequences ran and how many tokens came, over the time of a pass, in few bins: tells
// ramp, steady state and drain apart. No clock of its own; times are seconds on any clock,
// ascending.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "base/json.h"

namespace drover {

class Timeline {
 public:
  static constexpr size_t kBins = 256;
  // A sequence more or less begins or ends the steady state at so much of the peak.
  static constexpr double kSteadyShare = 0.9;

  // From now on so many sequences run. The first call is the beginning.
  void running(double now, int32_t sequences);
  void tokens(double now, int32_t count);  // new tokens of answers
  void clear() { *this = {}; }

  // {"bin_s", "running": mean in each bin, "tokens": in each bin}; null when nothing ran.
  Json bins_json() const;
  // The steady state lasts from the first to the last bin in which at least kSteadyShare of the
  // peak ran on average; the ramp is before, the drain behind it. {"peak_running", "steady_share",
  // "ramp", "steady", "drain"}: each with seconds, tokens, tokens_per_second and mean_running; a
  // phase that no whole bin lies in is null, and so is one's rate. Null when nothing ran.
  Json phases_json() const;

 private:
  void advance(double now);
  void fold();
  size_t used() const;  // bins, the last one may be covered in part
  double covered(size_t bin) const;
  Json phase_json(size_t first, size_t last) const;  // bins [first, last)

  bool begun_ = false;
  double begin_ = 0, now_ = 0;
  double width_ = 0.001;  // doubles whenever the bins are full
  int32_t running_ = 0, peak_ = 0;
  std::array<double, kBins> running_seconds_{};  // integral of the running sequences
  std::array<int64_t, kBins> tokens_{};
};

}  // namespace drover
