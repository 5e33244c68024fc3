// Of what was measured between pairs of ranks: who is unlike the others.
#pragma once

#include <string>
#include <vector>

namespace drover {

struct PairFigure {
  int a = 0, b = 0;  // ranks
  bool same_host = false;
  double latency_us = 0;  // one way, of a few bytes
  double gbytes = 0;      // GB/s one way, of large messages
};

struct OddOne {
  int rank = -1;  // whose pairs are all slow; -1: a pair
  int a = -1, b = -1;
  bool same_host = false;
  std::string what;             // "latency", "bandwidth"
  double value = 0, usual = 0;  // of its pairs, of the others: medians
};

// A rank is odd when even the best of its pairs is more than three times worse than the median of
// the others' among themselves (of the same kind: on one host, or between hosts); where no rank is,
// a pair that is more than five times worse than the median of all. Latencies below 20 us are never
// odd.
std::vector<OddOne> odd_ones(const std::vector<PairFigure>& pairs);

// Rounds in which every one of `count` meets every other once, nobody twice in a round.
std::vector<std::vector<std::pair<int, int>>> rounds_of_pairs(int count);

}  // namespace drover
