#include "base/trace.h"

#ifdef DROVER_NVTX
#include <nvtx3/nvToolsExt.h>
#endif
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "base/error.h"
#include "base/host.h"
#include "base/json.h"
#include "base/log.h"

namespace drover::trace {
namespace {

constexpr int kThread = -1;
constexpr int kCounter = -2;
constexpr int kFirstTrackId = 1000;  // threads are numbered from 1
constexpr int kLanes = 8;            // of a track, for spans that overlap

struct Event {
  const char* name;
  int64_t begin, end;  // of a counter: end is its value
  Arg args[2];
  int track;  // or kThread, kCounter
};

struct Buffer {  // of one thread
  std::mutex mutex;
  std::vector<Event> events;
  int id = 0;
  std::string name;
};

struct Track {
  std::string name;
  const char* category;
};

struct Recorder {
  std::mutex mutex;  // of the lists, not of what the buffers hold
  std::vector<std::shared_ptr<Buffer>> buffers;
  std::vector<Track> tracks;
  std::set<std::string, std::less<>> texts;
  std::atomic<size_t> room{0};
  std::atomic<size_t> dropped{0};
  std::atomic<int64_t> started{0};
};

// Never destroyed: threads may end after it would be.
Recorder& recorder() {
  static auto* r = new Recorder;
  return *r;
}

Buffer& my_buffer() {
  thread_local const std::shared_ptr<Buffer> mine = [] {
    auto b = std::make_shared<Buffer>();
    Recorder& r = recorder();
    const std::lock_guard lock(r.mutex);
    r.buffers.push_back(b);
    b->id = static_cast<int>(r.buffers.size());
    b->name = fmt::format("thread {}", b->id);
    return b;
  }();
  return *mine;
}

void record(const Event& e) noexcept {
  Recorder& r = recorder();
  size_t room = r.room.load(std::memory_order_relaxed);
  while (room > 0 && !r.room.compare_exchange_weak(room, room - 1, std::memory_order_relaxed)) {
  }
  if (room == 0) {
    r.dropped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  try {
    Buffer& b = my_buffer();
    const std::lock_guard lock(b.mutex);
    b.events.push_back(e);
  } catch (const std::bad_alloc&) {
    r.dropped.fetch_add(1, std::memory_order_relaxed);
  }
}

unsigned first_mode() {
  // Nsight Systems and the like set this for the program that they start.
  return std::getenv("NVTX_INJECTION64_PATH") != nullptr ? detail::kNvtx : 0;
}

// Names and keys are few and recur: each is escaped once.
class Writer {
 public:
  Writer(int rank, int64_t offset) : rank_(rank), offset_(offset) {}

  void metadata(const char* what, int id, const std::string& name, int order) {
    add(fmt::format(R"({{"ph":"M","name":"{0}_name","pid":{1},"tid":{2},"args":{{"name":{3}}}}})",
                    what, rank_, id, Json(name).dump()));
    add(fmt::format(
        R"({{"ph":"M","name":"{0}_sort_index","pid":{1},"tid":{2},"args":{{"sort_index":{3}}}}})",
        what, rank_, id, order));
  }
  void dropped(size_t count, int64_t at) {
    add(fmt::format(R"({{"ph":"i","s":"p","name":"dropped","cat":"trace","pid":{},"tid":0,"ts":{},)"
                    R"("args":{{"events":{}}}}})",
                    rank_, time(at), count));
  }
  void event(const Event& e, const char* category, int id) {
    if (e.track == kCounter) {
      add(fmt::format(R"({{"ph":"C","name":{},"pid":{},"ts":{},"args":{{"value":{}}}}})",
                      quoted(e.name), rank_, time(e.begin), e.end));
      return;
    }
    std::string args;
    for (const Arg& a : e.args) {
      if (a.key == nullptr) continue;
      args += fmt::format("{}{}:{}", args.empty() ? R"(,"args":{)" : ",", quoted(a.key), a.value);
    }
    if (!args.empty()) args += '}';
    add(fmt::format(R"({{"ph":"X","name":{},"cat":"{}","pid":{},"tid":{},"ts":{},"dur":{}{}}})",
                    quoted(e.name), category, rank_, id, time(e.begin),
                    micros(std::max<int64_t>(e.end - e.begin, 0)), args));
  }
  std::string take() { return std::move(out_); }

 private:
  void add(const std::string& object) {
    if (!out_.empty()) out_ += ",\n";
    out_ += object;
  }
  const std::string& quoted(const char* text) {
    std::string& s = quoted_[text];
    // What is not UTF-8 is replaced rather than thrown at.
    if (s.empty()) s = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
    return s;
  }
  std::string time(int64_t ns) const { return micros(ns + offset_); }
  static std::string micros(int64_t ns) {
    const auto size = static_cast<uint64_t>(ns < 0 ? -ns : ns);
    return fmt::format("{}{}.{:03}", ns < 0 ? "-" : "", size / 1000, size % 1000);
  }

  int rank_;
  int64_t offset_;
  std::string out_;
  std::map<const char*, std::string> quoted_;
};

// Viewers want the spans of a row nested or apart; those that overlap go to lanes of their own.
void write_track(Writer& w, int index, const Track& track, std::vector<Event>& events) {
  std::sort(events.begin(), events.end(),
            [](const Event& a, const Event& b) { return a.begin < b.begin; });
  const int first = kFirstTrackId + index * kLanes;
  std::vector<int64_t> ends;
  for (const Event& e : events) {
    size_t lane = 0;
    while (lane < ends.size() && ends[lane] > e.begin) ++lane;
    if (lane == ends.size() && lane < kLanes) ends.push_back(0);
    lane = std::min<size_t>(lane, kLanes - 1);
    ends[lane] = std::max(ends[lane], e.end);
    w.event(e, track.category, first + static_cast<int>(lane));
  }
  for (size_t lane = 0; lane < ends.size(); ++lane) {
    const int id = first + static_cast<int>(lane);
    w.metadata("thread", id, lane == 0 ? track.name : fmt::format("{} ({})", track.name, lane + 1),
               id);
  }
}

}  // namespace

namespace detail {
std::atomic<unsigned> mode{first_mode()};
}  // namespace detail

void start(size_t most_events) {
  Recorder& r = recorder();
  {
    const std::lock_guard lock(r.mutex);
    for (const auto& b : r.buffers) {
      const std::lock_guard mine(b->mutex);
      b->events.clear();
    }
  }
  r.dropped = 0;
  r.started = now_ns();
  r.room = most_events;
  detail::mode = detail::kRecord | detail::kNvtx;
}

void stop() { detail::mode = first_mode(); }

int64_t started_ns() { return recorder().started; }

void name_thread(const char* name) {
  Buffer& b = my_buffer();
  const std::lock_guard lock(b.mutex);
  b.name = name;
}

void Scope::begin(const char* name, Arg a, Arg b) noexcept {
  name_ = name;
  args_[0] = a;
  args_[1] = b;
#ifdef DROVER_NVTX
  nvtxRangePushA(name);
#endif
  begin_ = now_ns();
}

void Scope::end() noexcept {
  const int64_t now = now_ns();
#ifdef DROVER_NVTX
  nvtxRangePop();
#endif
  if ((mode_ & detail::kRecord) != 0) record({name_, begin_, now, {args_[0], args_[1]}, kThread});
}

int track(std::string_view name, const char* category) {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  for (size_t i = 0; i < r.tracks.size(); ++i) {
    if (r.tracks[i].name == name && std::strcmp(r.tracks[i].category, category) == 0)
      return static_cast<int>(i);
  }
  r.tracks.push_back({std::string(name), category});
  return static_cast<int>(r.tracks.size()) - 1;
}

void span(int track, const char* name, int64_t begin_ns, int64_t end_ns, Arg a, Arg b) noexcept {
  if (on()) record({name, begin_ns, end_ns, {a, b}, track});
}

void counter(const char* name, int64_t value) noexcept {
  if (on()) record({name, now_ns(), value, {}, kCounter});
}

void Marker::mark(const char* name) noexcept {
  const int64_t now = now_ns();
  if (name_ != nullptr) span(track_, name_, begin_, now);
  name_ = name;
  begin_ = now;
}

namespace {

// What there is to read, so that nobody who records waits while it is read.
struct Lists {
  std::vector<std::shared_ptr<Buffer>> buffers;
  std::vector<Track> tracks;
};
Lists lists() {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  return {r.buffers, r.tracks};
}

}  // namespace

std::vector<Span> spans() {
  const auto [buffers, tracks] = lists();
  std::vector<Span> all;
  for (const auto& b : buffers) {
    const std::lock_guard lock(b->mutex);
    for (const Event& e : b->events) {
      if (e.track < 0 || e.track >= static_cast<int>(tracks.size())) continue;
      all.push_back({tracks[static_cast<size_t>(e.track)].category,
                     e.name,
                     e.begin,
                     e.end,
                     {e.args[0], e.args[1]}});
    }
  }
  return all;
}

size_t dropped() { return recorder().dropped; }

const char* keep(std::string_view text) {
  Recorder& r = recorder();
  const std::lock_guard lock(r.mutex);
  auto found = r.texts.find(text);
  if (found == r.texts.end()) found = r.texts.emplace(text).first;
  return found->c_str();
}

std::string take_json_events(int rank, int64_t clock_offset_ns) {
  const auto [buffers, tracks] = lists();
  Writer w(rank, clock_offset_ns);
  std::vector<std::vector<Event>> of_tracks(tracks.size());
  bool any = false;
  for (const auto& b : buffers) {
    std::vector<Event> events;
    std::string name;
    {
      const std::lock_guard lock(b->mutex);
      events.swap(b->events);
      name = b->name;
    }
    bool mine = false;
    for (const Event& e : events) {
      if (e.track >= static_cast<int>(of_tracks.size())) continue;  // younger than the lists
      if (e.track >= 0) {
        of_tracks[static_cast<size_t>(e.track)].push_back(e);
      } else {
        w.event(e, "host", b->id);
        mine = true;
      }
    }
    if (mine) w.metadata("thread", b->id, name, b->id);
    any = any || !events.empty();
  }
  for (size_t i = 0; i < tracks.size(); ++i)
    write_track(w, static_cast<int>(i), tracks[i], of_tracks[i]);
  const size_t dropped = recorder().dropped.exchange(0);
  if (dropped > 0) {
    log::warn("the trace was full: {} later events of this rank are not in it", dropped);
    w.dropped(dropped, now_ns());
  }
  if (any || dropped > 0)
    w.metadata("process", 0, fmt::format("rank {} ({})", rank, hostname()), rank);
  return w.take();
}

void write(const std::string& file, const std::vector<std::string>& events_of_ranks) {
  const std::string aside = file + ".tmp";
  std::ofstream out(aside, std::ios::binary);
  out << R"({"displayTimeUnit":"ms","traceEvents":[)";
  const char* comma = "\n";
  for (const std::string& events : events_of_ranks) {
    if (events.empty()) continue;
    out << comma << events;
    comma = ",\n";
  }
  out << "\n]}\n";
  out.close();
  DROVER_CHECK(out.good() && std::rename(aside.c_str(), file.c_str()) == 0, ExitCode::kEnvironment,
               "cannot write the trace {}: {}; check that the folder exists and has room", file,
               std::strerror(errno));
}

}  // namespace drover::trace
