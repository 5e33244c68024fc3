// Which way of running a linear is fastest on one model of GPU, as `drover bench tune` measured it:
// a text file that a run reads with --tuning.
//
//   drover-tuning 1
//   gpu NVIDIA H100 80GB HBM3
//   # format  N  K  rows  tokens cluster per_sm stages split  us  us of the built-in rule
//   w4a8 57344 8192 64  64 1 1 32 yes  98.20 101.45
//
// A line holds for row counts from the line before of its format and shape (0 at first), not
// included, up to its own; past the last one the built-in rule chooses. `#` begins a comment.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace drover {

// What may be chosen of a Hopper linear (HopperVariant tells more).
struct LinearWay {
  int tokens = 0;   // of a block's tile
  int cluster = 1;  // blocks that share them
  int per_sm = 1;   // blocks a multiprocessor
  int stages = 0;   // of the ring, at most
  bool split = true;
  bool operator==(const LinearWay&) const = default;
};

struct LinearChoice {
  std::string format;    // "w4a8" or "w4a16"
  int64_t n = 0, k = 0;  // output and input features
  int64_t rows = 0;      // up to so many
  LinearWay way;
  double us = 0, rule_us = 0;  // measured: so, and as the built-in rule would
};

struct Tuning {
  std::string gpu;                    // its name, as CUDA tells it
  std::vector<LinearChoice> choices;  // by format, shape, rows
  // Those of one format and shape.
  std::vector<LinearChoice> of(const std::string& format, int64_t n, int64_t k) const;
};

// Throws kBadInput with the file, the line, and what was expected there.
Tuning read_tuning(const std::string& file);
// Sorted; written aside, then renamed. Throws kEnvironment.
void write_tuning(const std::string& file, Tuning tuning);
// kBadInput when it is another GPU's, naming both.
void check_gpu(const Tuning& tuning, const std::string& file, const std::string& gpu);
// `more` in the place of what `tuning` has for the same formats and shapes.
void merge(Tuning& tuning, const std::vector<LinearChoice>& more);

}  // namespace drover
