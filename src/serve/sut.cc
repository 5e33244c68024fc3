#include "serve/sut.h"

#include <algorithm>
#include <thread>

#include "logging.h"

namespace drover {
namespace {

double ms_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double, std::milli>(b - a).count();
}

double seconds_of(Clock::time_point t) {
  return std::chrono::duration<double>(t.time_since_epoch()).count();
}

// LoadGen's logging takes some polls of 10 ms to work off what other threads handed it.
constexpr auto kLoadgenDrain = std::chrono::milliseconds(150);

void log_error_in_loadgen(const std::string& cause) {
  mlperf::LogDetail([cause](mlperf::AsyncDetail& detail) {
    MLPERF_LOG_ERROR(detail, "error_runtime", "drover ended the run early: " + cause);
  });
}

// A line of the journal.
std::string journal_line(const std::string& run, Mode mode, const SampleRecord& r, bool by_eos,
                         const std::vector<int32_t>& tokens) {
  return fmt::format(
      R"({{"run":"{}","pass":"{}","sample":{},"n_tokens":{},"by_eos":{},"ttft_ms":{:.3f},)"
      R"("latency_ms":{:.3f},"hash":"{:016x}",{}"tokens":[{}]}})",
      run, to_string(mode), r.index, r.n_tokens, by_eos, r.ttft_ms, r.latency_ms, r.hash,
      r.resumed ? R"("resumed":true,)" : "", fmt::join(tokens, ","));
}

SampleRecord record_of(uint32_t index, const KnownSample& s) {
  return {.index = index,
          .n_tokens = static_cast<int32_t>(s.tokens.size()),
          .hash = hash_tokens(s.tokens.data(), s.tokens.size()),
          .ttft_ms = s.ttft_ms,
          .latency_ms = s.latency_ms,
          .resumed = true};
}

// So that the newest folder of a run that was resumed again and again is enough.
std::vector<std::string> taken_over(const Sut::Config& config) {
  std::vector<std::string> lines;
  if (config.known == nullptr) return lines;
  for (const auto& [index, s] : *config.known)
    lines.push_back(journal_line(config.run, config.mode, record_of(index, s), s.by_eos, s.tokens));
  return lines;
}

}  // namespace

SampleSet::SampleSet(Dataset& dataset, size_t count) : name_(dataset.name()) {
  samples_.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    samples_.push_back(dataset.sample(i));
    DROVER_CHECK(!samples_.back().input.empty(), ExitCode::kBadInput,
                 "dataset {}: sample {} has no tokens; make the dataset again", name_, i);
    if (samples_.back().input.size() > samples_[longest_].input.size()) longest_ = i;
  }
}

void SampleSet::LoadSamplesToRam(const std::vector<mlperf::QuerySampleIndex>& indices) {
  for (const auto i : indices)
    DROVER_CHECK(i < samples_.size(), ExitCode::kInternal, "LoadGen asked for sample {} of {}", i,
                 samples_.size());
}

uint64_t hash_tokens(const int32_t* ids, size_t count) {
  uint64_t h = 14695981039346656037ull;  // FNV-1a, 64 bits, over whole ids
  for (size_t i = 0; i < count; ++i) {
    h ^= static_cast<uint32_t>(ids[i]);
    h *= 1099511628211ull;
  }
  return h;
}

Request make_request(const Sample& sample, SequenceId id, int32_t max_new_tokens, bool synthetic) {
  Request r;
  r.id = id;
  r.prompt = sample.input;
  r.max_new_tokens = max_new_tokens;
  if (synthetic && sample.output_length > 0) {
    // LoadGen has no time per output token for a sample of one token.
    r.forced_length = std::clamp(sample.output_length, std::min(2, max_new_tokens), max_new_tokens);
    r.ignore_eos = true;
  }
  return r;
}

Sut::Sut(const Config& config, const SampleSet& samples, RequestSink& sink,
         const std::string& journal_file, Interrupt& interrupt)
    : config_(config),
      samples_(samples),
      sink_(sink),
      journal_(journal_file, taken_over(config)),
      interrupt_(interrupt),
      next_id_(config.first_id) {}

// LoadGen has no way to stop issuing, and in Server would go on for its ten minutes. So it is shut
// down here, on its own thread, and left by an exception: its log streams and samples die with its
// stack, which is why its logging must have ended before.
void Sut::leave_loadgen(const std::string& cause) {
  std::lock_guard lock(mutex_);
  cut_short_ = aborted_ = closed_ = true;
  log_error_in_loadgen(cause);
  std::this_thread::sleep_for(kLoadgenDrain);
  mlperf::AbortTest();
  throw Aborted{};
}

void Sut::IssueQuery(const std::vector<mlperf::QuerySample>& queries) {
  const auto ended = [this] {
    std::lock_guard lock(mutex_);
    return ended_;
  };
  if (stopping_) {  // the monitor ends this, or the interrupt
    while (!ended() && !interrupt_.raised())
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (interrupt_.raised()) leave_loadgen(interrupt_.cause());
  if (stopping_) leave_loadgen(interrupt_.why_stop());
  std::vector<Request> requests;
  requests.reserve(queries.size());
  {
    std::lock_guard lock(mutex_);
    const auto now = Clock::now();
    if (first_issue_ == Clock::time_point{}) first_issue_ = now;
    outstanding_.reserve(outstanding_.size() + queries.size());
    counts_.issued += queries.size();
    for (const auto& q : queries) {
      if (config_.known != nullptr) {
        const auto known = config_.known->find(static_cast<uint32_t>(q.index));
        if (known != config_.known->end()) {
          answer_known(q, known->second);
          continue;
        }
      }
      const SequenceId id = next_id_++;
      outstanding_[id] = {q.id, static_cast<uint32_t>(q.index), false, now, {}};
      requests.push_back(
          make_request(samples_.at(q.index), id, config_.max_new_tokens, config_.synthetic));
      if (config_.ttft_limit_s > 0)
        requests.back().deadline = seconds_of(now) + config_.ttft_limit_s;
    }
  }
  if (requests.empty()) return;
  try {
    sink_.submit(std::move(requests));
  } catch (const Error& e) {
    interrupt_.raise(e.code(), e.what());  // the monitor ends what is outstanding
  }
}

// Under the lock. Both events of a sample come from one thread, so LoadGen sees them in order.
void Sut::answer_known(const mlperf::QuerySample& query, const KnownSample& known) {
  if (aborted_) return;
  auto answer = [&](size_t tokens) {
    return mlperf::QuerySampleResponse(query.id, reinterpret_cast<uintptr_t>(known.tokens.data()),
                                       tokens * sizeof(int32_t), static_cast<int64_t>(tokens));
  };
  if (config_.report_first_token) {
    auto first = answer(1);
    mlperf::FirstTokenComplete(&first, 1);
  }
  auto all = answer(known.tokens.size());
  mlperf::QuerySamplesComplete(&all, 1);
  records_.push_back(record_of(static_cast<uint32_t>(query.index), known));
  ++counts_.started;
  ++counts_.finished;
}

LeaderEvents Sut::events() {
  LeaderEvents e;
  e.first_token = [self = shared_from_this()](const FirstToken& t) { self->on_first(t); };
  e.finished = [self = shared_from_this()](Finished&& f) { self->on_finished(std::move(f)); };
  return e;
}

void Sut::on_first(const FirstToken& event) {
  std::lock_guard lock(mutex_);
  const auto it = outstanding_.find(event.id);
  if (aborted_ || it == outstanding_.end() || it->second.started) return;
  it->second.started = true;
  it->second.first = Clock::now();
  ++counts_.started;
  if (!config_.report_first_token) return;
  int32_t token = event.token;
  mlperf::QuerySampleResponse response(it->second.response, reinterpret_cast<uintptr_t>(&token),
                                       sizeof(token), 1);
  mlperf::FirstTokenComplete(&response, 1);
}

void Sut::on_finished(Finished&& event) {
  SampleRecord r;
  r.n_tokens = static_cast<int32_t>(event.tokens.size());
  r.hash = hash_tokens(event.tokens.data(), event.tokens.size());
  {
    std::lock_guard lock(mutex_);
    const auto it = outstanding_.find(event.id);
    if (aborted_ || it == outstanding_.end()) return;
    const Outstanding o = it->second;
    outstanding_.erase(it);
    mlperf::QuerySampleResponse response(o.response,
                                         reinterpret_cast<uintptr_t>(event.tokens.data()),
                                         event.tokens.size() * sizeof(int32_t), r.n_tokens);
    mlperf::QuerySamplesComplete(&response, 1);
    last_completion_ = Clock::now();
    r.index = o.index;
    r.ttft_ms = ms_between(o.issued, o.started ? o.first : last_completion_);
    r.latency_ms = ms_between(o.issued, last_completion_);
    records_.push_back(r);
  }
  ++counts_.finished;
  counts_.tokens += event.tokens.size();
  // Not under the lock: a slow disk must not hold up IssueQuery.
  try {
    journal_.append(journal_line(config_.run, config_.mode, r, event.by_eos, event.tokens));
  } catch (const Error& e) {
    interrupt_.raise(e.code(), e.what());
  }
}

void Sut::abort(const std::string& cause) {
  {
    std::lock_guard lock(mutex_);
    if (aborted_) return;
    aborted_ = true;
  }
  // What the sink's thread told LoadGen before must be worked off first: its entries point into
  // samples that are gone once LoadGen has all completions.
  std::this_thread::sleep_for(kLoadgenDrain);
  std::lock_guard lock(mutex_);
  ended_ = true;
  if (closed_ || outstanding_.empty()) return;
  cut_short_ = true;
  log_error_in_loadgen(cause);
  std::vector<mlperf::QuerySampleResponse> first, all;
  for (const auto& [id, o] : outstanding_) {
    if (!o.started && config_.report_first_token) first.emplace_back(o.response, 0, 0, 0);
    all.emplace_back(o.response, 0, 0, 0);
  }
  outstanding_.clear();
  mlperf::FirstTokenComplete(first.data(), first.size());
  mlperf::QuerySamplesComplete(all.data(), all.size());
}

bool Sut::cut_short() const {
  std::lock_guard lock(mutex_);
  return cut_short_;
}

std::vector<SampleRecord> Sut::records() const {
  std::lock_guard lock(mutex_);
  return records_;
}

double Sut::duration_s() const {
  std::lock_guard lock(mutex_);
  if (last_completion_ == Clock::time_point{}) return 0;
  return ms_between(first_issue_, last_completion_) / 1e3;
}

}  // namespace drover
