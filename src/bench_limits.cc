#include "bench_limits.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

#include "base/formats.h"
#include "base/host.h"
#include "engine/device_array.h"

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

// Bytes per second, read and written, of copies within the device.
double copy_window(Backend& backend, const Interrupt& interrupt, void* to, const void* from,
                   size_t bytes) {
  uint64_t copies = 0;
  const auto begin = Clock::now();
  do {
    for (int i = 0; i < 8; ++i, ++copies) backend.copy(to, from, bytes, backend.stream());
    backend.wait(backend.record(backend.stream()), deadline_in(60), interrupt);
  } while (seconds_since(begin) < kWindowSeconds);
  return 2.0 * static_cast<double>(bytes) * static_cast<double>(copies) / seconds_since(begin);
}

double copy_peak(RankParts& parts, size_t bytes) {
  Backend& backend = parts.backend;
  const DeviceArray<std::byte> from(backend, bytes, "a bench"), to(backend, bytes, "a bench");
  std::vector<std::byte> some(size_t{1} << 20);
  std::mt19937_64 random(11);
  for (auto& b : some) b = static_cast<std::byte>(random());
  for (size_t at = 0; at + some.size() <= bytes; at += some.size()) from.upload(some, at);
  return best_sum(
      parts, [&] { return copy_window(backend, parts.interrupt, to.data(), from.data(), bytes); });
}

// Floating-point operations per second of this rank's linears, on random numbers: on zeros a GPU
// is faster than it ever will be.
class LinearPeak {
 public:
  LinearPeak(Backend& backend, int64_t size) : backend_(backend), size_(size) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    WeightTensor w;
    w.format = WeightFormat::kBf16;
    w.rows = w.cols = size;
    const auto count = static_cast<size_t>(size * size);
    w.codes.resize(count * 2);
    std::vector<float> some(4099);
    for (auto& x : some) x = normal(random);
    for (size_t i = 0; i < count; ++i) {
      const uint16_t bits = bf16_from_float(some[i % some.size()]);
      std::memcpy(w.codes.data() + 2 * i, &bits, 2);
    }
    linear_ = backend.load_linear({&w, 1});
    const size_t room = static_cast<size_t>(backend.padded_rows(size) * size);
    const size_t element = dtype_bytes(backend.activation_dtype());
    std::vector<std::byte> input(room * element);
    for (size_t i = 0; i < room; ++i) {
      const float x = some[i * 7 % some.size()];
      const uint16_t half = bf16_from_float(x);
      std::memcpy(input.data() + i * element, element == 2 ? static_cast<const void*>(&half) : &x,
                  element);
    }
    in_ = DeviceArray<std::byte>(backend, input.size(), "a bench");
    in_.upload(input);
    out_ = DeviceArray<std::byte>(backend, room * sizeof(float), "a bench");
  }

  double window(const Interrupt& interrupt) {
    int runs = 0;
    const auto begin = Clock::now();
    do {
      for (int i = 0; i < 4; ++i, ++runs)
        backend_.linear(*linear_, {in_.data()}, out_.data(), size_, true, backend_.stream());
      backend_.wait(backend_.record(backend_.stream()), deadline_in(60), interrupt);
    } while (seconds_since(begin) < kWindowSeconds);
    return 2.0 * std::pow(static_cast<double>(size_), 3) * runs / seconds_since(begin);
  }

 private:
  Backend& backend_;
  int64_t size_;
  std::unique_ptr<Linear> linear_;
  DeviceArray<std::byte> in_, out_;
};

template <typename T>
T sum_over_ranks(RankParts& parts, T mine) {
  std::vector<T> everybody(static_cast<size_t>(parts.world.size()));
  parts.all.all_gather(&mine, everybody.data(), sizeof(mine), nullptr);
  T sum = 0;
  for (const T e : everybody) sum += e;
  return sum;
}

double read_peak(RankParts& parts, Limits& l) {
  // Twice the last cache over the host's ranks; 64 MiB a rank at least, for machines that do not
  // tell; an eighth of the memory at most.
  const auto ranks = static_cast<uint64_t>(parts.world.local_size());
  l.read_buffer_bytes = std::min(std::max<uint64_t>(64 << 20, 2 * l.l3_bytes / ranks),
                                 memory_total_bytes() / 8 / ranks);
  const auto threads = static_cast<size_t>(parts.threads);
  const std::vector<std::vector<uint64_t>> buffers(
      threads, std::vector<uint64_t>(l.read_buffer_bytes / threads / sizeof(uint64_t), 1));
  return best_sum(parts, [&] { return read_window(buffers); });
}

}  // namespace

Limits measure_limits(RankParts& parts) {
  Limits l;
  l.l3_bytes = l3_size();
  l.gpu = parts.gpu;
  if (parts.gpu) {
    l.read_buffer_bytes = uint64_t{1} << 30;
    l.read_bytes_per_s = copy_peak(parts, l.read_buffer_bytes);
  } else {
    l.read_bytes_per_s = read_peak(parts, l);
  }
  l.linear_size = parts.gpu ? 8192 : 2048;
  LinearPeak peak(parts.backend, l.linear_size);
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
          {"linear_size", l.linear_size},
          {"step_weight_bytes", l.step_weight_bytes},
          {"threads", l.threads}};
}

}  // namespace drover
