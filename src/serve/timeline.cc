#include "serve/timeline.h"

#include <algorithm>
#include <cmath>

namespace drover {

namespace {
double rounded(double value, double unit) { return std::round(value / unit) * unit; }
}  // namespace

void Timeline::running(double now, int32_t sequences) {
  if (!begun_) {
    begun_ = true;
    begin_ = now_ = now;
  }
  advance(now);
  running_ = sequences;
  peak_ = std::max(peak_, sequences);
}

void Timeline::tokens(double now, int32_t count) {
  if (!begun_ || count == 0) return;
  advance(now);
  // What comes at a bin's very end belongs to the time before.
  const auto bin = static_cast<size_t>((now_ - begin_) / width_);
  tokens_[std::min(bin, kBins - 1)] += count;
}

void Timeline::advance(double now) {
  now = std::max(now, now_);
  while (now - begin_ >= width_ * static_cast<double>(kBins)) fold();
  double from = now_ - begin_;
  const double to = now - begin_;
  while (from < to) {
    const auto bin = static_cast<size_t>(from / width_);
    const double end = std::min(to, width_ * static_cast<double>(bin + 1));
    if (end <= from) break;  // no more than rounding is left
    running_seconds_[std::min(bin, kBins - 1)] += (end - from) * running_;
    from = end;
  }
  now_ = now;
}

void Timeline::fold() {
  for (size_t i = 0; i < kBins / 2; ++i) {
    running_seconds_[i] = running_seconds_[2 * i] + running_seconds_[2 * i + 1];
    tokens_[i] = tokens_[2 * i] + tokens_[2 * i + 1];
  }
  std::fill(running_seconds_.begin() + kBins / 2, running_seconds_.end(), 0.0);
  std::fill(tokens_.begin() + kBins / 2, tokens_.end(), 0);
  width_ *= 2;
}

size_t Timeline::used() const {
  return begun_ ? std::min(kBins, static_cast<size_t>((now_ - begin_) / width_) + 1) : 0;
}

double Timeline::covered(size_t bin) const {
  const double begin = width_ * static_cast<double>(bin);
  return std::clamp(now_ - begin_ - begin, 0.0, width_);
}

Json Timeline::bins_json() const {
  if (peak_ == 0) return nullptr;
  Json running = Json::array(), tokens = Json::array();
  for (size_t i = 0; i < used(); ++i) {
    const double seconds = covered(i);
    running.push_back(seconds > 0 ? rounded(running_seconds_[i] / seconds, 0.01) : 0.0);
    tokens.push_back(tokens_[i]);
  }
  return {{"bin_s", width_}, {"running", running}, {"tokens", tokens}};
}

Json Timeline::phase_json(size_t first, size_t last) const {
  double seconds = 0, running = 0;
  int64_t tokens = 0;
  for (size_t i = first; i < last; ++i) {
    seconds += covered(i);
    running += running_seconds_[i];
    tokens += tokens_[i];
  }
  if (seconds <= 0) return nullptr;
  return {{"seconds", seconds},
          {"tokens", tokens},
          {"tokens_per_second", static_cast<double>(tokens) / seconds},
          {"mean_running", running / seconds}};
}

Json Timeline::phases_json() const {
  if (peak_ == 0) return nullptr;
  const double least = kSteadyShare * peak_;
  size_t first = used(), last = 0;
  for (size_t i = 0; i < used(); ++i) {
    if (running_seconds_[i] < least * covered(i) || covered(i) <= 0) continue;
    first = std::min(first, i);
    last = i + 1;
  }
  Json j = {{"peak_running", peak_}, {"steady_share", kSteadyShare}};
  const bool steady = last > 0;  // else the peak was shorter than a bin
  j["ramp"] = phase_json(0, first);
  j["steady"] = steady ? phase_json(first, last) : Json(nullptr);
  j["drain"] = steady ? phase_json(last, used()) : Json(nullptr);
  return j;
}

}  // namespace drover
