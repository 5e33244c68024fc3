// LoadGen's SystemUnderTest and QuerySampleLibrary. Only for src/serve: it includes LoadGen.
//
// Threads: LoadGen issues from the session's thread, completions come on the sink's thread, an
// abort on the monitor's. One mutex guards what they share; it is held while LoadGen is told of
// an event, so that an abort never completes a sample that is being completed.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "loadgen.h"
#include "query_sample_library.h"
#include "serve/journal.h"
#include "serve/resume.h"
#include "serve/session.h"
#include "system_under_test.h"

namespace drover {

// The session's samples, in memory before the clock starts. LoadGen's loading and unloading finds
// them there.
class SampleSet final : public mlperf::QuerySampleLibrary {
 public:
  SampleSet(Dataset& dataset, size_t count);
  const std::string& Name() override { return name_; }
  size_t TotalSampleCount() override { return samples_.size(); }
  size_t PerformanceSampleCount() override { return samples_.size(); }
  void LoadSamplesToRam(const std::vector<mlperf::QuerySampleIndex>& indices) override;
  void UnloadSamplesFromRam(const std::vector<mlperf::QuerySampleIndex>&) override {}

  const Sample& at(size_t index) const { return samples_.at(index); }
  size_t size() const { return samples_.size(); }
  size_t longest() const { return longest_; }  // index of the longest prompt

 private:
  std::string name_;
  std::vector<Sample> samples_;
  size_t longest_ = 0;
};

// What is kept of a finished sample for the results.
struct SampleRecord {
  uint32_t index = 0;
  int32_t n_tokens = 0;
  uint64_t hash = 0;   // of the token ids, to compare with the accuracy log
  double ttft_ms = 0;  // since the sample was issued to drover
  double latency_ms = 0;
  bool resumed = false;  // answered in an earlier run, where its times are from, too
};
uint64_t hash_tokens(const int32_t* ids, size_t count);

// Makes the request of a sample; shared by the passes and the warm-up.
Request make_request(const Sample& sample, SequenceId id, int32_t max_new_tokens, bool synthetic);

struct SutCounts {  // what the progress display shows
  std::atomic<uint64_t> issued{0}, started{0}, finished{0}, tokens{0};  // tokens: of this run
};

// Held by shared_ptr: after an interrupt the sink's thread may still be in an event when the
// session has already left.
class Sut final : public mlperf::SystemUnderTest, public std::enable_shared_from_this<Sut> {
 public:
  struct Config {
    Mode mode;
    bool report_first_token;  // LoadGen wants FirstTokenComplete: every scenario but Offline
    int32_t max_new_tokens;
    bool synthetic;
    double ttft_limit_s;  // deadline after arrival; 0: none
    std::string name;     // LoadGen's "SUT name"
    SequenceId first_id;
    std::string run;                      // identity_hash, for the journal
    const KnownSamples* known = nullptr;  // answered from here without running; outlives the pass
  };
  // `samples`, `sink` and `interrupt` must outlive the pass, `interrupt` the sink's thread too.
  Sut(const Config& config, const SampleSet& samples, RequestSink& sink,
      const std::string& journal_file, Interrupt& interrupt);

  const std::string& Name() override { return config_.name; }
  // Throws Aborted once the interrupt is up or the pass was cut short, after LoadGen has been shut
  // down for it.
  void IssueQuery(const std::vector<mlperf::QuerySample>& samples) override;
  void FlushQueries() override {}

  LeaderEvents events();
  // From here on IssueQuery takes nothing: it waits for abort, and leaves LoadGen.
  void stop_issuing() { stopping_ = true; }
  // Completes what is outstanding without data, with the cause as an error in LoadGen's log, so
  // that LoadGen stops waiting. Idempotent; from the monitor's thread.
  void abort(const std::string& cause);
  // LoadGen was told of a sample without its answer, or not let to issue all.
  bool cut_short() const;

  const SutCounts& counts() const { return counts_; }
  SequenceId next_id() const { return next_id_; }
  std::vector<SampleRecord> records() const;
  double duration_s() const;  // first issue to last completion
  void sync_journal() { journal_.sync(); }

 private:
  struct Outstanding {
    mlperf::ResponseId response = 0;
    uint32_t index = 0;
    bool started = false;
    Clock::time_point issued, first;
  };

  void on_first(const FirstToken& event);
  void on_finished(Finished&& event);
  void answer_known(const mlperf::QuerySample& query, const KnownSample& known);
  [[noreturn]] void leave_loadgen(const std::string& cause);

  const Config config_;
  const SampleSet& samples_;
  RequestSink& sink_;
  Journal journal_;  // sink's thread only
  Interrupt& interrupt_;
  SutCounts counts_;
  mutable std::mutex mutex_;
  std::atomic<bool> stopping_{false};
  bool cut_short_ = false;
  bool aborted_ = false;  // no event reaches LoadGen any more, but abort()'s own
  bool ended_ = false;    // abort() is through
  bool closed_ = false;   // LoadGen was shut down from IssueQuery: no sample is valid any more
  SequenceId next_id_;
  std::unordered_map<SequenceId, Outstanding> outstanding_;
  std::vector<SampleRecord> records_;
  Clock::time_point first_issue_{}, last_completion_{};
};

// Thrown through LoadGen by IssueQuery.
struct Aborted {};

}  // namespace drover
