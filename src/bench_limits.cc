#include "bench_limits.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>

#include "base/host.h"

namespace drover {

namespace {

constexpr int kWindows = 3;
constexpr double kWindowSeconds = 0.4;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

uint64_t l3_size() {
#ifdef _SC_LEVEL3_CACHE_SIZE
  return static_cast<uint64_t>(std::max(0L, ::sysconf(_SC_LEVEL3_CACHE_SIZE)));
#else
  return 0;
#endif
}

// Eight sums, so that loads and not additions are waited for.
uint64_t read_all(const uint64_t* data, size_t words) {
  uint64_t sum[8] = {};
  for (size_t i = 0; i + 8 <= words; i += 8) {
    for (size_t j = 0; j < 8; ++j) sum[j] += data[i + j];
  }
  uint64_t all = 0;
  for (const uint64_t s : sum) all += s;
  return all;
}

// Bytes per second of this rank's threads, each going over its own part until the time is up.
double read_window(const std::vector<std::vector<uint64_t>>& parts) {
  constexpr size_t kBlock = 1 << 17;  // words between looks at the clock
  std::atomic<uint64_t> read{0}, sink{0};
  const auto begin = Clock::now();
  std::vector<std::thread> threads;
  for (const auto& part : parts) {
    threads.emplace_back([&, p = &part] {
      uint64_t bytes = 0, sum = 0;
      for (size_t at = 0; seconds_since(begin) < kWindowSeconds; at = at < p->size() ? at : 0) {
        const size_t words = std::min(kBlock, p->size() - at);
        sum += read_all(p->data() + at, words);
        bytes += words * sizeof(uint64_t);
        at += words;
      }
      read += bytes;
      sink += sum;  // keeps the reads
    });
  }
  for (auto& t : threads) t.join();
  return static_cast<double>(read.load()) / seconds_since(begin);
}

// Floating-point operations per second of this rank's linears.
class LinearPeak {
 public:
  explicit LinearPeak(Backend& backend) : backend_(backend) {
    WeightTensor w;
    w.rows = w.cols = kLinearSize;
    std::vector<float> values(static_cast<size_t>(kLinearSize * kLinearSize));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 17) - 8.0f;
    const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
    w.codes.assign(bytes, bytes + values.size() * sizeof(float));
    linear_ = backend.load_linear({&w, 1});
    const auto rows = static_cast<size_t>(backend.padded_rows(kLinearSize));
    const size_t size = rows * static_cast<size_t>(kLinearSize);
    in_ = backend.alloc(size * dtype_bytes(backend.activation_dtype()), "a bench");
    out_ = backend.alloc(size * sizeof(float), "a bench");
    const std::vector<std::byte> zeros(size * dtype_bytes(backend.activation_dtype()));
    backend.copy_in(in_, zeros.data(), zeros.size(), backend.stream());
  }
  ~LinearPeak() {
    backend_.free(in_);
    backend_.free(out_);
  }
  LinearPeak(const LinearPeak&) = delete;
  LinearPeak& operator=(const LinearPeak&) = delete;

  double window(const Interrupt& interrupt) {
    int runs = 0;
    const auto begin = Clock::now();
    do {
      backend_.linear(*linear_, in_, out_, kLinearSize, true, backend_.stream());
      backend_.wait(backend_.record(backend_.stream()), deadline_in(60), interrupt);
      ++runs;
    } while (seconds_since(begin) < kWindowSeconds);
    return 2.0 * std::pow(static_cast<double>(kLinearSize), 3) * runs / seconds_since(begin);
  }

 private:
  Backend& backend_;
  std::unique_ptr<Linear> linear_;
  void* in_ = nullptr;
  void* out_ = nullptr;
};

// All ranks at once, since they share memory and cores: the best window's sum over the ranks.
template <typename Window>
double best_sum(RankParts& parts, Window window) {
  double best = 0;
  std::vector<double> everybody(static_cast<size_t>(parts.world.size()));
  for (int i = 0; i < kWindows; ++i) {
    parts.world.barrier(parts.interrupt, 60, "measurement of limits");
    const double mine = window();
    parts.all.all_gather(&mine, everybody.data(), sizeof(mine), nullptr);
    double sum = 0;
    for (const double e : everybody) sum += e;
    best = std::max(best, sum);
  }
  return best;
}

template <typename T>
T sum_over_ranks(RankParts& parts, T mine) {
  std::vector<T> everybody(static_cast<size_t>(parts.world.size()));
  parts.all.all_gather(&mine, everybody.data(), sizeof(mine), nullptr);
  T sum = 0;
  for (const T e : everybody) sum += e;
  return sum;
}

}  // namespace

Limits measure_limits(RankParts& parts) {
  Limits l;
  l.l3_bytes = l3_size();
  // Twice the last cache over the host's ranks; 64 MiB a rank at least, for machines that do not
  // tell; an eighth of the memory at most.
  const auto ranks = static_cast<uint64_t>(parts.world.local_size());
  l.read_buffer_bytes = std::min(std::max<uint64_t>(64 << 20, 2 * l.l3_bytes / ranks),
                                 memory_total_bytes() / 8 / ranks);
  const auto threads = static_cast<size_t>(parts.threads);
  {
    const std::vector<std::vector<uint64_t>> buffers(
        threads, std::vector<uint64_t>(l.read_buffer_bytes / threads / sizeof(uint64_t), 1));
    l.read_bytes_per_s = best_sum(parts, [&] { return read_window(buffers); });
  }
  LinearPeak peak(parts.backend);
  peak.window(parts.interrupt);
  l.linear_flops_per_s = best_sum(parts, [&] { return peak.window(parts.interrupt); });
  l.step_weight_bytes = sum_over_ranks(parts, static_cast<uint64_t>(parts.step_weight_bytes));
  l.threads = sum_over_ranks(parts, parts.threads);
  return l;
}

Json to_json(const Limits& l) {
  return {{"read_bytes_per_s", l.read_bytes_per_s},
          {"read_buffer_bytes_per_rank", l.read_buffer_bytes},
          {"l3_bytes", l.l3_bytes},
          {"linear_flops_per_s", l.linear_flops_per_s},
          {"linear_size", kLinearSize},
          {"step_weight_bytes", l.step_weight_bytes},
          {"threads", l.threads}};
}

}  // namespace drover
