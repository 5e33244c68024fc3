// What happened when, on this rank's host threads and devices, for one Chrome/Perfetto JSON file of
// all ranks. Off until start(): a Scope then costs one relaxed load. Times are nanoseconds of this
// host's steady clock. Scopes are also NVTX ranges, while tracing or under a profiler that injects
// NVTX. Everything here may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace drover::trace {

namespace detail {
inline constexpr unsigned kRecord = 1, kNvtx = 2;
extern std::atomic<unsigned> mode;
}  // namespace detail

inline bool on() noexcept {
  return (detail::mode.load(std::memory_order_relaxed) & detail::kRecord) != 0;
}
inline int64_t now_ns() noexcept {
  using std::chrono::nanoseconds, std::chrono::duration_cast, std::chrono::steady_clock;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Records at most `most_events` (96 bytes each, about 150 in the file); what comes later is
// dropped, and the file says how many. Forgets what was recorded before.
inline constexpr size_t kEvents = size_t{1} << 20;
void start(size_t most_events = kEvents);
void stop();

// Names the calling thread in the trace: "main", "leader", "worker". Before or after start().
void name_thread(const char* name);

struct Arg {
  const char* key = nullptr;  // lives on: a literal, or keep()
  int64_t value = 0;
};

// A span of the calling thread. Names are literals or come from keep().
class Scope {
 public:
  explicit Scope(const char* name, Arg a = {}, Arg b = {}) noexcept
      : mode_(detail::mode.load(std::memory_order_relaxed)) {
    if (mode_ != 0) begin(name, a, b);
  }
  ~Scope() {
    if (mode_ != 0) end();
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  void begin(const char* name, Arg a, Arg b) noexcept;
  void end() noexcept;
  unsigned mode_;
  const char* name_ = nullptr;
  Arg args_[2];
  int64_t begin_ = 0;
};

// Rows of the trace beside the threads. `category` tells readers what they hold:
//   "step"    whole steps on the device: spans "decode step" (no prompt rows) and "mixed step"
//   "kernel"  kernels (backend/cuda/cupti_trace)
//   "copy"    copies and memsets
//   "operation"  operations of a CPU rank, which run on the thread that calls them
// The same name and category give the same track.
int track(std::string_view name, const char* category);
void span(int track, const char* name, int64_t begin_ns, int64_t end_ns, Arg a = {},
          Arg b = {}) noexcept;
void counter(const char* name, int64_t value) noexcept;

// Spans of a track one after the other, from one thread: each ends where the next begins.
class Marker {
 public:
  explicit Marker(int track = -1) : track_(track) {}  // below 0: marks nothing
  // Null: nothing follows.
  void operator()(const char* name) noexcept {
    if (track_ >= 0 && (name_ != nullptr || on())) mark(name);
  }

 private:
  void mark(const char* name) noexcept;
  int track_;
  const char* name_ = nullptr;
  int64_t begin_ = 0;
};

// What the tracks hold so far; it stays there.
struct Span {
  const char* category = "";
  const char* name = "";
  int64_t begin_ns = 0, end_ns = 0;
  Arg args[2];
};
std::vector<Span> spans();
size_t dropped();  // events that found no room since start()

// A copy that lives as long as the process; equal texts give the same pointer.
const char* keep(std::string_view text);

// The offset to a peer's steady clock out of ping-pongs: exact to half of the shortest round trip.
// Ranks of one host share a clock and need none.
class ClockProbe {
 public:
  // sent, received: mine around the message and its answer; peer: the other's now_ns() between.
  void sample(int64_t sent, int64_t peer, int64_t received) noexcept {
    if (received - sent >= round_trip_ns) return;
    round_trip_ns = received - sent;
    offset_ns = peer - (sent + received) / 2;
  }
  int64_t round_trip_ns = std::numeric_limits<int64_t>::max();
  int64_t offset_ns = 0;  // peer's clock = mine + offset
};

// When start() was called.
int64_t started_ns();

// Takes all that was recorded: JSON objects with commas between, "" when there is nothing. Every
// time is written as time + clock_offset_ns: to rank 0's clock, less rank 0's started_ns(), so that
// the trace begins near 0 (a double holds no nanoseconds of a host that is long up). Warns in the
// log when events were dropped. Other threads may go on recording.
std::string take_json_events(int rank, int64_t clock_offset_ns);

// One file of all ranks' events; written aside, then renamed. Throws kEnvironment.
void write(const std::string& file, const std::vector<std::string>& events_of_ranks);

}  // namespace drover::trace
