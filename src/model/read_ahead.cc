#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "base/trace.h"
#include "model/weights.h"

namespace drover {
namespace {

class ReadAhead : public ForwardingSource {
 public:
  ReadAhead(std::unique_ptr<WeightSource> source, const Shard& shard, size_t most_bytes,
            int threads)
      : ForwardingSource(std::move(source)), most_bytes_(most_bytes) {
    for (auto& p : load_order(source_->architecture(), shard))
      pieces_.emplace_back().what = std::move(p);
    for (int i = 0; i < std::max(threads, 1); ++i) threads_.emplace_back([this] { serve(); });
  }
  ~ReadAhead() override {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
    for (auto& t : threads_) t.join();
  }

  WeightTensor read(const std::string& name, Range rows, Range cols) override;

 private:
  enum class State : uint8_t { kPlanned, kReading, kReady, kTaken };
  struct Piece {
    WeightPiece what;
    State state = State::kPlanned;
    WeightTensor tensor;
    std::exception_ptr error;
  };
  Piece* next_planned();
  void serve();

  size_t most_bytes_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Piece> pieces_;  // by the order of loading; never resized
  size_t planned_ = 0;         // pieces before this one are not planned any more
  size_t ready_bytes_ = 0;     // read and not taken
  bool ended_ = false;
  std::vector<std::thread> threads_;
};

ReadAhead::Piece* ReadAhead::next_planned() {
  while (planned_ < pieces_.size() && pieces_[planned_].state != State::kPlanned) ++planned_;
  return planned_ < pieces_.size() ? &pieces_[planned_] : nullptr;
}

void ReadAhead::serve() {
  trace::name_thread("reader");
  std::unique_lock lock(mutex_);
  for (;;) {
    Piece* piece = nullptr;
    changed_.wait(lock, [&] {
      piece = next_planned();
      return ended_ || piece == nullptr || ready_bytes_ < most_bytes_;
    });
    if (ended_ || piece == nullptr) return;
    piece->state = State::kReading;
    lock.unlock();
    WeightTensor tensor;
    std::exception_ptr error;
    try {
      const trace::Scope s("read", {"rows", piece->what.rows.size()},
                           {"cols", piece->what.cols.size()});
      tensor = source_->read(piece->what.name, piece->what.rows, piece->what.cols);
    } catch (...) {
      error = std::current_exception();
    }
    lock.lock();
    piece->tensor = std::move(tensor);
    piece->error = error;
    piece->state = State::kReady;
    ready_bytes_ += piece->tensor.bytes();
    changed_.notify_all();
  }
}

WeightTensor ReadAhead::read(const std::string& name, Range rows, Range cols) {
  const auto same = [](Range a, Range b) { return a.begin == b.begin && a.end == b.end; };
  {
    std::unique_lock lock(mutex_);
    const auto piece = std::find_if(pieces_.begin(), pieces_.end(), [&](const Piece& p) {
      return p.state != State::kTaken && p.what.name == name && same(p.what.rows, rows) &&
             same(p.what.cols, cols);
    });
    if (piece != pieces_.end()) {
      // One that no thread has begun may be behind others that nobody takes: it is read here.
      if (piece->state != State::kPlanned) {
        const trace::Scope s("wait for read");
        changed_.wait(lock, [&] { return piece->state >= State::kReady; });
      }
      const bool ready = piece->state == State::kReady;
      piece->state = State::kTaken;
      if (ready) {
        ready_bytes_ -= piece->tensor.bytes();
        changed_.notify_all();
        if (piece->error) std::rethrow_exception(piece->error);
        return std::move(piece->tensor);
      }
    }
  }
  return source_->read(name, rows, cols);
}

}  // namespace

std::unique_ptr<WeightSource> read_ahead(std::unique_ptr<WeightSource> source, const Shard& shard,
                                         size_t most_bytes, int threads) {
  return std::make_unique<ReadAhead>(std::move(source), shard, most_bytes, threads);
}

}  // namespace drover
