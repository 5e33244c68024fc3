// A request sink that answers from the prompt alone, at a given pace, from a thread of its own:
// what LoadGen logs and what drover writes can be held against answers known beforehand.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <numeric>
#include <thread>

#include "serve/session.h"

namespace drover {

constexpr int32_t kEos = 2;

// The answer to a prompt: 2 to 8 tokens by the prompt's length, the last one kEos.
inline std::vector<int32_t> answer(const std::vector<int32_t>& prompt, int32_t max_new_tokens) {
  const int32_t length = 2 + static_cast<int32_t>(prompt.size() % 7);
  const int32_t seed = std::accumulate(prompt.begin(), prompt.end(), 0);
  std::vector<int32_t> out;
  for (int32_t i = 0; i < std::min(length, max_new_tokens); ++i)
    out.push_back(i + 1 == length ? kEos : 3 + (seed * 31 + i * 7) % 50000);
  return out;
}

class PacedSink final : public RequestSink {
 public:
  PacedSink(Interrupt& interrupt, size_t slots, double step_ms)
      : interrupt_(interrupt), slots_(slots), step_ms_(step_ms), thread_([this] { loop(); }) {}
  ~PacedSink() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    thread_.join();
  }
  void listen(LeaderEvents events) override {
    std::lock_guard lock(mutex_);
    events_ = std::move(events);
  }
  std::optional<std::string> refuse(const Request& r) const override {
    if (r.prompt.size() + static_cast<size_t>(r.max_new_tokens) <= max_positions) return {};
    return "too long for the fixture";
  }
  void submit(std::vector<Request> requests) override {
    std::lock_guard lock(mutex_);
    if (winding_) return;
    for (auto& r : requests) {
      ++submitted;
      if (r.deadline > 0) ++with_deadline;
      queue_.push_back(std::move(r));
    }
  }
  void drain() override {
    std::unique_lock lock(mutex_);
    while (!idle_.wait_for(lock, std::chrono::milliseconds(20),
                           [&] { return queue_.empty() && running_.empty(); }))
      interrupt_.check();
  }
  void wind_down(bool drop_running) override {
    std::lock_guard lock(mutex_);
    winding_ = true;
    queue_.clear();
    if (drop_running) running_.clear();
  }
  bool idle() const override {
    std::lock_guard lock(mutex_);
    return queue_.empty() && running_.empty() && !telling_;
  }
  SchedulerCounters counters() const override {
    SchedulerCounters c;
    c.preemptions = preemptions;
    return c;
  }
  Timeline timeline() const override {
    Timeline t;  // 4 sequences for 3 s, then 1 for 1 s
    t.running(10, 4);
    t.tokens(12.5, 40);
    t.running(13, 1);
    t.tokens(13.5, 5);
    t.running(14, 0);
    return t;
  }
  void reset_counters() override {}
  std::vector<RankTimes> rank_times() override {
    RankTimes t{.rank = 0, .split = true, .steps = 10, .seconds = 2};
    t.compute = 1;
    t.communication = 0.5;
    t.stage_wait = 0.25;
    t.plan_wait = 0.125;
    t.host = 0.125;
    return {t};
  }

  size_t max_positions = 4096;
  uint64_t preemptions = 3;
  std::atomic<uint64_t> submitted{0}, with_deadline{0};

 private:
  struct Running {
    Request request;
    std::vector<int32_t> tokens;
    size_t done = 0;
  };

  void loop() {
    while (!interrupt_.raised()) {
      std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(step_ms_));
      std::unique_lock lock(mutex_);
      if (stop_) return;
      step();
      if (queue_.empty() && running_.empty()) idle_.notify_all();
    }
  }
  void step() {
    while (running_.size() < slots_ && !queue_.empty()) {
      auto tokens = answer(queue_.front().prompt, queue_.front().max_new_tokens);
      running_.push_back({std::move(queue_.front()), std::move(tokens)});
      queue_.pop_front();
    }
    std::vector<Running> still, ended;
    for (auto& r : running_) {
      if (++r.done == 1 && events_.first_token) events_.first_token({r.request.id, r.tokens[0]});
      (r.done >= r.tokens.size() ? ended : still).push_back(std::move(r));
    }
    running_ = std::move(still);
    // Without the lock: LoadGen may issue the next query from inside, into submit.
    const LeaderEvents events = events_;
    telling_ = true;
    mutex_.unlock();
    for (auto& r : ended)
      if (events.finished) events.finished({r.request.id, r.tokens.back() == kEos, r.tokens});
    mutex_.lock();
    telling_ = false;
  }

  Interrupt& interrupt_;
  const size_t slots_;
  const double step_ms_;
  mutable std::mutex mutex_;
  std::condition_variable idle_;
  LeaderEvents events_;
  std::deque<Request> queue_;
  std::vector<Running> running_;
  bool stop_ = false, winding_ = false, telling_ = false;
  std::thread thread_;
};

class CountedDataset final : public Dataset {
 public:
  explicit CountedDataset(size_t n) : n_(n) {}
  std::string name() const override { return "counted"; }
  size_t size() const override { return n_; }
  Sample sample(size_t i) override {
    std::vector<int32_t> ids(1 + i % 40);
    std::iota(ids.begin(), ids.end(), static_cast<int32_t>(i));
    return {ids, 0};
  }
  std::string reference_text(size_t) override { return ""; }
  std::string question_text(size_t) override { return ""; }
  int32_t vocab() const override { return 60000; }
  std::string tokenizer_sha256() const override { return ""; }
  DecodingTable decoding_table() override { return {}; }
  std::string fingerprint() const override { return "f00d"; }
  bool synthetic() const override { return false; }
  void verify_all() override {}

 private:
  size_t n_;
};

inline RunFacts fixture_facts() {
  RunFacts f;
  f.grid = "tp 1 x pp 1 x dp 1";
  f.backend = "cpu";
  f.kv = "f32";
  f.activations = "f32";
  f.pages = {{"count", 7}};
  f.model = {{"name", "fixture"}, {"fingerprint", "beef"}};
  f.dataset = {{"name", "counted"}, {"fingerprint", "f00d"}};
  f.versions = {{"drover", "0"}};
  f.command_line = "drover run";
  return f;
}

// LoadGen's settings and logger are of a process, once: every session runs in a child of its own.
// Returns the child's exit code: the session's, or the class of its error.
template <typename Body>
int in_child(Body body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    int code = 99;
    try {
      code = static_cast<int>(body());
    } catch (const Error& e) {
      std::fprintf(stderr, "%s\n", e.what());
      code = static_cast<int>(e.code());
    }
    std::fflush(nullptr);
    ::_exit(code);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

struct TempDir {
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "drover-serve-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    path = name;
  }
  ~TempDir() { std::filesystem::remove_all(path); }
  std::string path;
};

inline std::vector<std::string> lines_of(const std::string& file) {
  std::ifstream in(file);
  std::vector<std::string> out;
  std::string line;
  while (std::getline(in, line)) out.push_back(line);
  return out;
}

}  // namespace drover
