// What the benches of single operations share: one device, its limits measured in the same run, and
// the time of calls on it. Calls are recorded and replayed where the backend can, so that launches
// are not what is measured; every figure is the median of windows after a warm-up.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bench_limits.h"
#include "choose_backend.h"
#include "command_line.h"
#include "engine/device_array.h"

namespace drover {

struct OpFigure {
  std::string name;
  double seconds = 0, seconds_min = 0, seconds_max = 0;  // of a call
  double bytes = 0, flops = 0;                           // that a call cannot do without
};

class OpBench {
 public:
  // Chooses the backend, measures the limits and prints them.
  OpBench(const Options& o, World& world, Interrupt& interrupt, Progress& progress);

  Backend& backend() { return *choice.backend; }
  // Normal random numbers of the backend's activation type.
  DeviceArray<std::byte> activations(int64_t count);

  // `call(i)` is made again and again; i in [0, rotation) chooses among what rotates. Each of the
  // windows takes about so many seconds.
  OpFigure measure(OpFigure f, int rotation, const std::function<void(int)>& call,
                   double window_seconds = 0.05);

  void report(const OpFigure& f);
  // Beside what the vendor's library takes for the same.
  void report(const OpFigure& f, const OpFigure& library);
  void add(Json figure) { figures_.push_back(std::move(figure)); }

  // Writes --json.
  ExitCode end(const std::string& kind, const std::string& command_line) const;

  const Options& options;
  BackendChoice choice;
  Limits limits;
  std::mt19937 random{20240607};

 private:
  void print_limits() const;
  void print(const OpFigure& f) const;
  Json json_of(const OpFigure& f) const;

  Interrupt& interrupt_;
  Progress& progress_;
  double steady_ = 0;
  uint64_t keys_ = 0;
  Json figures_ = Json::array();
};

// --NAME's whole numbers above 0. Throws kUsage.
std::vector<int> numbers_of(const Options& o, const char* name);

// `drover bench KIND` on one rank.
int bench_operation(const char* kind, const std::vector<OptionRow>& table,
                    const std::vector<std::string>& arguments,
                    const std::function<void(OpBench&)>& run);

// The four linears of a model's layers as a rank of --tp slots has them, of layers enough that none
// stays in a cache of up to 100 MB, with what they read and write at up to `most_rows`.
class BenchLinears {
 public:
  static constexpr size_t kParts = 4;
  static const char* name(size_t part);  // "qkv", "o", "gate_up", "down"

  BenchLinears(OpBench& bench, int most_rows);
  std::vector<Linear*> copies(size_t part) const;
  // The time of `copies`, which rotate, at so many rows.
  OpFigure measure(const std::string& name, const std::vector<Linear*>& copies, int rows,
                   double window_seconds = 0.05);

 private:
  struct Layer {
    std::unique_ptr<Linear> part[kParts];
  };
  void load();
  void quantize(int64_t rows, int64_t cols);
  size_t element() const { return dtype_bytes(backend_.activation_dtype()); }

  OpBench& bench_;
  Backend& backend_;
  std::vector<Layer> layers_;
  DeviceArray<std::byte> in_, coded_, out_;
  DeviceArray<float> scale_;
};

}  // namespace drover
