// Layout: kind (1 byte), the fields in the order of step.h with 32-bit counts before lists, and a
// 64-bit check sum. Small plans are a few dozen bytes.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>

#include "base/error.h"
#include "sched/step.h"

namespace drover {
namespace {

static_assert(std::endian::native == std::endian::little, "the messages are little-endian");

enum class Kind : uint8_t { kPlan = 0xA1, kResult = 0xA2, kTimes = 0xA3 };
constexpr size_t kSumBytes = 8;

// Every step is a bijection of the state, so that damage within one 8-byte word always shows.
uint64_t check_sum(std::span<const std::byte> bytes) {
  uint64_t h = 0x9E3779B97F4A7C15ull ^ bytes.size();
  size_t i = 0;
  for (; i < bytes.size(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + i, std::min<size_t>(8, bytes.size() - i));
    h = (h ^ word) * 0xD6E8FEB86659FD93ull;
    h ^= h >> 32;
  }
  return h;
}

class Writer {
 public:
  Writer(std::vector<std::byte>& out, Kind kind) : out_(out) {
    out_.clear();
    put(kind);
  }
  template <class T>
  void put(T value) {
    static_assert(std::has_unique_object_representations_v<T> || std::is_floating_point_v<T>);
    raw(&value, sizeof value);
  }
  void count(size_t n) { put(static_cast<uint32_t>(n)); }
  template <class T>
  void list(const std::vector<T>& values) {
    static_assert(std::is_arithmetic_v<T>);
    count(values.size());
    raw(values.data(), values.size() * sizeof(T));
  }
  void seal() { put(check_sum(out_)); }

 private:
  void raw(const void* p, size_t bytes) {
    if (bytes == 0) return;
    const size_t at = out_.size();
    out_.resize(at + bytes);
    std::memcpy(out_.data() + at, p, bytes);
  }
  std::vector<std::byte>& out_;
};

class Reader {
 public:
  Reader(std::span<const std::byte> bytes, Kind kind, const char* name) : name_(name) {
    DROVER_CHECK(bytes.size() > kSumBytes, ExitCode::kInternal, "{}: {} bytes are too few", name,
                 bytes.size());
    left_ = bytes.first(bytes.size() - kSumBytes);
    uint64_t sum = 0;
    std::memcpy(&sum, bytes.data() + left_.size(), kSumBytes);
    DROVER_CHECK(sum == check_sum(left_), ExitCode::kInternal,
                 "{} of {} bytes is damaged: its check sum does not fit", name, bytes.size());
    const auto found = get<uint8_t>();
    DROVER_CHECK(found == static_cast<uint8_t>(kind), ExitCode::kInternal,
                 "{}: the message is of kind {:#x}, expected {:#x}", name, found,
                 static_cast<uint8_t>(kind));
  }
  template <class T>
  T get() {
    need(sizeof(T));
    T value;
    std::memcpy(&value, left_.data(), sizeof(T));
    left_ = left_.subspan(sizeof(T));
    return value;
  }
  int32_t index() {  // slots, positions, counts: never negative
    const auto value = get<int32_t>();
    DROVER_CHECK(value >= 0, ExitCode::kInternal, "{}: a negative number, {}", name_, value);
    return value;
  }
  // The number of items to come, each of at least `item_bytes`: nothing is allocated beyond what
  // the message can hold.
  size_t count(size_t item_bytes) {
    const auto n = get<uint32_t>();
    DROVER_CHECK(n <= left_.size() / item_bytes, ExitCode::kInternal,
                 "{}: a list of {} items of {} bytes in the last {} bytes", name_, n, item_bytes,
                 left_.size());
    return n;
  }
  template <class T>
  std::vector<T> list() {
    std::vector<T> values(count(sizeof(T)));
    if (!values.empty()) std::memcpy(values.data(), left_.data(), values.size() * sizeof(T));
    left_ = left_.subspan(values.size() * sizeof(T));
    return values;
  }
  uint8_t flags(uint8_t known) {
    const auto value = get<uint8_t>();
    DROVER_CHECK((value & ~known) == 0, ExitCode::kInternal, "{}: unknown flags {:#x}", name_,
                 value);
    return value;
  }
  void end() const {
    DROVER_CHECK(left_.empty(), ExitCode::kInternal, "{}: {} bytes too many", name_, left_.size());
  }

 private:
  void need(size_t bytes) const {
    DROVER_CHECK(left_.size() >= bytes, ExitCode::kInternal,
                 "{}: cut short, {} bytes wanted, {} left", name_, bytes, left_.size());
  }
  std::span<const std::byte> left_;
  const char* name_;
};

constexpr uint8_t kStop = 1, kTellTimes = 2;
constexpr uint8_t kIgnoreEos = 1, kStreamTokens = 2, kWantLogits = 4;

template <class Token>
void put_tokens(Writer& w, const std::vector<Token>& tokens) {
  w.count(tokens.size());
  for (const Token& t : tokens) {
    w.put(t.id);
    w.put(t.token);
  }
}

template <class Token>
std::vector<Token> get_tokens(Reader& r) {
  std::vector<Token> tokens(r.count(12));
  for (Token& t : tokens) {
    t.id = r.get<SequenceId>();
    t.token = r.get<int32_t>();
  }
  return tokens;
}

}  // namespace

void encode(const StepPlan& plan, std::vector<std::byte>& out) {
  Writer w(out, Kind::kPlan);
  w.put(plan.step);
  w.put(plan.group);
  w.put(static_cast<uint8_t>((plan.stop ? kStop : 0) | (plan.tell_times ? kTellTimes : 0)));
  w.list(plan.retired);
  w.list(plan.suspended);
  w.count(plan.admitted.size());
  for (const Admission& a : plan.admitted) {
    w.put(a.id);
    w.put(a.slot);
    w.put(a.group);
    w.put(a.max_new_tokens);
    w.put(a.forced_length);
    w.put(static_cast<uint8_t>((a.ignore_eos ? kIgnoreEos : 0) |
                               (a.stream_tokens ? kStreamTokens : 0) |
                               (a.want_logits ? kWantLogits : 0)));
    w.list(a.prompt);
  }
  w.count(plan.grants.size());
  for (const PageGrant& g : plan.grants) {
    w.put(std::array{g.slot, g.first_index});  // the only list of any length while all decode
    w.list(g.pages);
  }
  w.count(plan.chunks.size());
  for (const Chunk& c : plan.chunks) {
    w.put(c.slot);
    w.put(c.start);
    w.put(c.count);
    w.put(static_cast<uint8_t>(c.last));
  }
  w.seal();
}

StepPlan decode_plan(std::span<const std::byte> bytes) {
  Reader r(bytes, Kind::kPlan, "step plan");
  StepPlan plan;
  plan.step = r.get<uint64_t>();
  plan.group = r.index();
  const uint8_t orders = r.flags(kStop | kTellTimes);
  plan.stop = (orders & kStop) != 0;
  plan.tell_times = (orders & kTellTimes) != 0;
  plan.retired = r.list<int32_t>();
  plan.suspended = r.list<int32_t>();
  plan.admitted.resize(r.count(29));
  for (Admission& a : plan.admitted) {
    a.id = r.get<SequenceId>();
    a.slot = r.index();
    a.group = r.index();
    a.max_new_tokens = r.index();
    a.forced_length = r.index();
    const uint8_t flags = r.flags(kIgnoreEos | kStreamTokens | kWantLogits);
    a.ignore_eos = (flags & kIgnoreEos) != 0;
    a.stream_tokens = (flags & kStreamTokens) != 0;
    a.want_logits = (flags & kWantLogits) != 0;
    a.prompt = r.list<int32_t>();
  }
  plan.grants.resize(r.count(12));
  for (PageGrant& g : plan.grants) {
    g.slot = r.index();
    g.first_index = r.index();
    g.pages = r.list<int32_t>();
  }
  plan.chunks.resize(r.count(13));
  for (Chunk& c : plan.chunks) {
    c.slot = r.index();
    c.start = r.index();
    c.count = r.index();
    c.last = r.flags(1) != 0;
  }
  r.end();
  return plan;
}

void encode(const StepResult& result, std::vector<std::byte>& out) {
  Writer w(out, Kind::kResult);
  w.put(result.step);
  w.put(result.rows);
  w.put(result.seconds);
  w.put(result.tokens);
  put_tokens(w, result.first);
  put_tokens(w, result.streamed);
  w.count(result.finished.size());
  for (const Finished& f : result.finished) {
    w.put(f.id);
    w.put(static_cast<uint8_t>(f.by_eos));
    w.list(f.tokens);
  }
  w.count(result.logits.size());
  for (const LogitsBlock& b : result.logits) {
    w.put(b.id);
    w.put(b.start);
    w.put(b.vocab);
    w.list(b.logits);
  }
  w.seal();
}

StepResult decode_result(std::span<const std::byte> bytes) {
  Reader r(bytes, Kind::kResult, "step result");
  StepResult result;
  result.step = r.get<uint64_t>();
  result.rows = r.index();
  result.seconds = r.get<double>();
  result.tokens = r.index();
  result.first = get_tokens<FirstToken>(r);
  result.streamed = get_tokens<StreamedToken>(r);
  result.finished.resize(r.count(13));
  for (Finished& f : result.finished) {
    f.id = r.get<SequenceId>();
    f.by_eos = r.flags(1) != 0;
    f.tokens = r.list<int32_t>();
  }
  result.logits.resize(r.count(20));
  for (LogitsBlock& b : result.logits) {
    b.id = r.get<SequenceId>();
    b.start = r.index();
    b.vocab = r.index();
    b.logits = r.list<float>();
  }
  r.end();
  return result;
}

void encode(const RankTimes& times, std::vector<std::byte>& out) {
  Writer w(out, Kind::kTimes);
  w.put(times.asking);
  w.put(times.rank);
  w.put(static_cast<uint8_t>(times.split));
  w.put(times.steps);
  for (const double seconds : {times.seconds, times.compute, times.communication, times.stage_wait,
                               times.plan_wait, times.device, times.host})
    w.put(seconds);
  w.put(static_cast<uint8_t>(times.meter));
  w.put(times.joules);
  w.put(times.joules_seconds);
  w.seal();
}

RankTimes decode_times(std::span<const std::byte> bytes) {
  Reader r(bytes, Kind::kTimes, "times of a rank");
  RankTimes times;
  times.asking = r.get<uint64_t>();
  times.rank = r.index();
  times.split = r.flags(1) != 0;
  times.steps = r.get<uint64_t>();
  for (double* seconds : {&times.seconds, &times.compute, &times.communication, &times.stage_wait,
                          &times.plan_wait, &times.device, &times.host})
    *seconds = r.get<double>();
  const auto meter = r.get<uint8_t>();
  DROVER_CHECK(meter <= static_cast<uint8_t>(RankTimes::Meter::kAnothers), ExitCode::kInternal,
               "damaged times of a rank: meter {}", meter);
  times.meter = static_cast<RankTimes::Meter>(meter);
  times.joules = r.get<double>();
  times.joules_seconds = r.get<double>();
  r.end();
  return times;
}

}  // namespace drover
