// Going on where an earlier accuracy run ended: what answers depend on, and the finished samples of
// its journal. Performance passes are never resumed: their clock cannot be.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "serve/session.h"

namespace drover {

// A finished sample as the journal tells it.
struct KnownSample {
  std::vector<int32_t> tokens;
  bool by_eos = false;
  double ttft_ms = 0, latency_ms = 0;  // in the run that answered it
};
using KnownSamples = std::map<uint32_t, KnownSample>;

// Everything that the answers of a run depend on, by name: model, dataset, samples, lengths, number
// formats, how the sums are split. Replicas, batch sizes and threads are not in it.
Json run_identity(const ServeOptions& options, const RunFacts& facts, size_t samples);
// 16 hex digits of its SHA-256; each line of a journal carries it.
std::string identity_hash(const Json& identity);
// Beside a pass's journal, so that a mismatch can be named. Throws kEnvironment.
void write_identity(const std::string& pass_dir, const Json& identity, const RunFacts& facts);

struct EarlierRun {
  std::string folder;
  KnownSamples samples;
  size_t damaged = 0;  // lines that a kill or a full disk cut off: their samples run again
  std::string build;   // of the drover that wrote it
};

// Of the options alone, before anything is loaded: kUsage when a pass other than accuracy is wanted
// or the folder is this run's own, kBadInput when there is no journal.
void check_resume(const ServeOptions& options);
// Reads the accuracy journal of the run in `folder`. Throws kUsage when that run's options differ
// and kBadInput when its model, its dataset or the journal do, naming what differs. `vocab` bounds
// token ids.
EarlierRun read_earlier_run(const std::string& folder, const Json& identity, size_t samples,
                            int32_t vocab);

}  // namespace drover
