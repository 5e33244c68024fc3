#include "comm/mpi_comm.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <vector>

#include "base/formats.h"
#include "comm/mpi_check.h"

namespace drover {

namespace {

constexpr int kTag = 0;
// Up to this size everybody sends everything to everybody (one round of latency); above it each
// rank sums a slice (two rounds, 2/n of the bytes).
constexpr size_t kOneRoundBytes = 64 << 10;

// How an element type is summed: in f32, rounded once at the end.
struct F32 {
  using Element = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};
struct Bf16 {
  using Element = uint16_t;
  static float load(uint16_t x) { return bf16_to_float(x); }
  static uint16_t store(float x) { return bf16_from_float(x); }
};

// Adds the time of its life to one of Progress's sums. There may be none to add to.
class Timed {
 public:
  Timed(Progress* progress, std::atomic<int64_t> Progress::*sum)
      : sum_(progress == nullptr ? nullptr : &(progress->*sum)),
        begin_(sum_ == nullptr ? Clock::time_point{} : Clock::now()) {}
  ~Timed() {
    if (sum_ == nullptr) return;
    sum_->fetch_add(std::chrono::nanoseconds(Clock::now() - begin_).count(),
                    std::memory_order_relaxed);
  }
  Timed(const Timed&) = delete;
  Timed& operator=(const Timed&) = delete;

 private:
  std::atomic<int64_t>* sum_;
  Clock::time_point begin_;
};

class MpiComm final : public Comm {
 public:
  MpiComm(MPI_Comm comm, std::string name, Interrupt& interrupt, Progress* progress, double seconds)
      : comm_(comm),
        name_(std::move(name)),
        interrupt_(interrupt),
        progress_(progress),
        seconds_(seconds) {
    DROVER_MPI(MPI_Comm_rank(comm_, &rank_));
    DROVER_MPI(MPI_Comm_size(comm_, &size_));
  }
  ~MpiComm() override {
    // After a failure peers may be gone: freeing would wait for them.
    if (interrupt_.raised()) return;
    for (auto& s : sends_) MPI_Wait(&s.request, MPI_STATUS_IGNORE);
    MPI_Comm_free(&comm_);
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::unique_ptr<Comm> split(int color, int key, const std::string& name) override {
    MPI_Comm part = MPI_COMM_NULL;
    DROVER_MPI(MPI_Comm_split(comm_, color < 0 ? MPI_UNDEFINED : color, key, &part));
    if (part == MPI_COMM_NULL) return nullptr;
    DROVER_MPI(MPI_Comm_set_errhandler(part, MPI_ERRORS_RETURN));
    return make_mpi_comm(part, name, interrupt_, progress_, seconds_);
  }

  void all_reduce_sum(void* buffer, size_t count, Dtype type, void*) override {
    DROVER_CHECK(type == Dtype::kF32 || type == Dtype::kBf16, ExitCode::kInternal,
                 "communicators sum f32 and bf16, asked for {}", to_string(type));
    if (size_ == 1 || count == 0) return;
    const Timed timed(progress_, &Progress::communication_ns);
    type == Dtype::kF32 ? sum<F32>(buffer, count) : sum<Bf16>(buffer, count);
  }

  void all_gather(const void* in, void* out, size_t bytes, void*) override {
    const Timed timed(progress_, &Progress::communication_ns);
    gather(in, out, bytes);
  }

  void broadcast(void* buffer, size_t bytes, int root, void*) override {
    const Timed timed(progress_, &Progress::communication_ns);
    // One hop to each: a replica has few ranks.
    if (rank_ == root) {
      for (int p = 0; p < size_; ++p) {
        if (p != root) start_send(buffer, bytes, p);
      }
    } else {
      start_recv(buffer, bytes, root);
    }
    finish("broadcast");
  }

  void send(const void* buffer, size_t bytes, int peer, void*) override {
    const Timed timed(progress_, &Progress::communication_ns);
    reap();
    const auto* first = static_cast<const std::byte*>(buffer);
    sends_.push_back({std::vector<std::byte>(first, first + bytes), MPI_REQUEST_NULL});
    auto& s = sends_.back();
    DROVER_MPI(
        MPI_Isend(s.bytes.data(), checked_count(bytes), MPI_BYTE, peer, kTag, comm_, &s.request));
  }

  void recv(void* buffer, size_t bytes, int peer, void*) override {
    const Timed timed(progress_, &Progress::receive_ns);
    start_recv(buffer, bytes, peer);
    finish("receive");
  }

 private:
  struct Send {
    std::vector<std::byte> bytes;
    MPI_Request request;
  };

  void gather(const void* in, void* out, size_t bytes) {
    auto* place = static_cast<std::byte*>(out);
    std::memmove(place + bytes * static_cast<size_t>(rank_), in, bytes);
    for (int p = 0; p < size_; ++p) {
      if (p == rank_) continue;
      start_recv(place + bytes * static_cast<size_t>(p), bytes, p);
      start_send(in, bytes, p);
    }
    finish("all-gather");
  }

  int checked_count(size_t bytes) const {
    DROVER_CHECK(bytes <= static_cast<size_t>(INT32_MAX), ExitCode::kInternal,
                 "{}: one message of {} bytes is more than MPI can count", name_, bytes);
    return static_cast<int>(bytes);
  }
  void start_recv(void* buffer, size_t bytes, int peer) {
    requests_.push_back(MPI_REQUEST_NULL);
    DROVER_MPI(
        MPI_Irecv(buffer, checked_count(bytes), MPI_BYTE, peer, kTag, comm_, &requests_.back()));
  }
  void start_send(const void* buffer, size_t bytes, int peer) {
    requests_.push_back(MPI_REQUEST_NULL);
    DROVER_MPI(
        MPI_Isend(buffer, checked_count(bytes), MPI_BYTE, peer, kTag, comm_, &requests_.back()));
  }

  void finish(const char* what) {
    if (progress_ != nullptr) progress_->waiting.store(true, std::memory_order_relaxed);
    wait_until(
        [this] {
          int done = 0;
          DROVER_MPI(MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                                 MPI_STATUSES_IGNORE));
          return done != 0;
        },
        deadline_in(seconds_), interrupt_, what);
    if (progress_ != nullptr) {
      progress_->waiting.store(false, std::memory_order_relaxed);
      progress_->tick();
    }
    requests_.clear();
  }

  void reap() {
    while (!sends_.empty()) {
      int done = 0;
      DROVER_MPI(MPI_Test(&sends_.front().request, &done, MPI_STATUS_IGNORE));
      if (done == 0) return;
      sends_.pop_front();
    }
  }

  // Sums in rank order on every rank, so that all ranks get the same bits.
  template <class Type>
  void sum(void* buffer, size_t count) {
    auto* data = static_cast<typename Type::Element*>(buffer);
    if (count * sizeof(*data) <= kOneRoundBytes) return sum_in_one_round<Type>(data, count);
    sum_in_slices<Type>(data, count);
  }

  template <class Type, class Element = typename Type::Element>
  void sum_in_one_round(Element* data, size_t count) {
    const auto n = static_cast<size_t>(size_);
    auto* parts = scratch<Element>(count * n);
    gather(data, parts, count * sizeof(Element));
    add<Type>(parts, count, data, count);
  }

  template <class Type, class Element = typename Type::Element>
  void sum_in_slices(Element* data, size_t count) {
    const auto n = static_cast<size_t>(size_);
    const size_t slice = (count + n - 1) / n;
    const auto begin = [&](size_t p) { return std::min(count, p * slice); };
    const auto length = [&](size_t p) { return begin(p + 1) - begin(p); };
    const auto me = static_cast<size_t>(rank_);
    auto* parts = scratch<Element>(slice * n);
    for (size_t p = 0; p < n; ++p) {
      if (p == me) continue;
      start_recv(parts + p * slice, length(me) * sizeof(Element), static_cast<int>(p));
      start_send(data + begin(p), length(p) * sizeof(Element), static_cast<int>(p));
    }
    finish("sum of slices");
    std::copy_n(data + begin(me), length(me), parts + me * slice);
    add<Type>(parts, slice, data + begin(me), length(me));
    for (size_t p = 0; p < n; ++p) {
      if (p == me) continue;
      start_recv(data + begin(p), length(p) * sizeof(Element), static_cast<int>(p));
      start_send(data + begin(me), length(me) * sizeof(Element), static_cast<int>(p));
    }
    finish("gathering of slices");
  }

  // to[i] = the sum over ranks of parts[rank * stride + i]
  template <class Type, class Element = typename Type::Element>
  void add(const Element* parts, size_t stride, Element* to, size_t count) {
    sums_.resize(std::max(sums_.size(), count));
    for (size_t i = 0; i < count; ++i) sums_[i] = Type::load(parts[i]);
    for (size_t p = 1; p < static_cast<size_t>(size_); ++p) {
      const Element* part = parts + p * stride;
      for (size_t i = 0; i < count; ++i) sums_[i] += Type::load(part[i]);
    }
    for (size_t i = 0; i < count; ++i) to[i] = Type::store(sums_[i]);
  }

  template <class Element>
  Element* scratch(size_t count) {
    scratch_.resize(std::max(scratch_.size(), count * sizeof(Element)));
    return reinterpret_cast<Element*>(scratch_.data());
  }

  MPI_Comm comm_;
  std::string name_;
  Interrupt& interrupt_;
  Progress* progress_;
  double seconds_;
  int rank_ = 0, size_ = 1;
  std::list<Send> sends_;
  std::vector<MPI_Request> requests_;
  std::vector<std::byte> scratch_;
  std::vector<float> sums_;
};

}  // namespace

std::unique_ptr<Comm> make_mpi_comm(MPI_Comm comm, const std::string& name, Interrupt& interrupt,
                                    Progress* progress, double seconds) {
  return std::make_unique<MpiComm>(comm, name, interrupt, progress, seconds);
}

}  // namespace drover
