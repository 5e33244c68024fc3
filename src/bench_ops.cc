// drover bench linear, drover bench attention: single operations at a model's shapes on one device,
// beside what the device can do at most, measured in the same run. Calls are recorded and replayed
// where the backend can, so that launches are not what is measured; weights and pages rotate over
// more memory than caches hold; every figure is the median of windows after a warm-up.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <random>

#include "base/formats.h"
#include "base/log.h"
#include "bench.h"
#include "bench_limits.h"
#include "choose_backend.h"
#include "command_line.h"
#include "engine/device_array.h"
#include "engine/kv_cache.h"
#include "serve/results.h"

namespace drover {

namespace {

constexpr int kWindows = 7;

std::vector<int> numbers_of(const Options& o, const char* name) {
  std::vector<int> numbers;
  for (const auto& text : o.list(name)) {
    const int n = std::atoi(text.c_str());
    DROVER_CHECK(n > 0 && std::to_string(n) == text, ExitCode::kUsage,
                 "--{} {}: expected whole numbers", name, text);
    numbers.push_back(n);
  }
  DROVER_CHECK(!numbers.empty(), ExitCode::kUsage, "--{} is empty", name);
  return numbers;
}

struct OpFigure {
  std::string name;
  double seconds = 0, seconds_min = 0, seconds_max = 0;  // of a call
  double bytes = 0, flops = 0;                           // that a call cannot do without
};

// One device, its limits, and the time of calls on it.
class OpBench {
 public:
  OpBench(const Options& o, World& world, Interrupt& interrupt, Progress& progress)
      : options(o), interrupt_(interrupt), progress_(progress) {
    choice = choose_backend(o, choose_placement(o, world, interrupt), world);
    const auto all = world.make_comm(interrupt, &progress, 60);
    RankParts parts{world, interrupt, *choice.backend, *all, choice.threads, choice.gpu, 0};
    limits = measure_limits(parts);
    steady_ = o.number("steady", 0, 600);
    print_limits();
  }

  Backend& backend() { return *choice.backend; }

  DeviceArray<std::byte> activations(int64_t count) {
    const size_t element = dtype_bytes(backend().activation_dtype());
    std::normal_distribution<float> normal;
    std::vector<std::byte> host(static_cast<size_t>(count) * element);
    std::vector<float> some(4099);
    for (auto& x : some) x = normal(random);
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
      const float x = some[i % some.size()];
      const uint16_t half = bf16_from_float(x);
      std::memcpy(host.data() + i * element, element == 2 ? static_cast<const void*>(&half) : &x,
                  element);
    }
    DeviceArray<std::byte> device(backend(), host.size(), "a bench");
    device.upload(host);
    return device;
  }

  // `call(i)` is made again and again; i chooses among what rotates.
  OpFigure measure(OpFigure f, int rotation, const std::function<void(int)>& call) {
    const int calls = std::max(rotation, 8) / rotation * rotation;
    const uint64_t key = ++keys_;
    const auto burst = [&] {
      backend().replay(key, [&] {
        for (int i = 0; i < calls; ++i) call(i % rotation);
      });
      backend().wait(backend().record(backend().stream()), deadline_in(60), interrupt_);
      progress_.tick();
    };
    call(0);  // kernels are loaded outside of a record
    const auto timed = [&](int bursts) {
      const auto begin = Clock::now();
      for (int i = 0; i < bursts; ++i) burst();
      return std::chrono::duration<double>(Clock::now() - begin).count() / bursts;
    };
    const double once = std::min(timed(2), timed(2));
    // The chip is limited by power: under load its clock falls within seconds.
    const auto until = deadline_in(steady_);
    while (Clock::now() < until) burst();
    const int bursts = std::clamp(static_cast<int>(0.05 / once), 1, 1000);
    std::vector<double> windows;
    for (int i = 0; i < kWindows; ++i) windows.push_back(timed(bursts) / calls);
    std::sort(windows.begin(), windows.end());
    f.seconds = windows[kWindows / 2];
    f.seconds_min = windows.front();
    f.seconds_max = windows.back();
    return f;
  }

  void report(const OpFigure& f) {
    print(f);
    figures_.push_back(json_of(f));
  }
  // Beside what the vendor's library takes for the same.
  void report(const OpFigure& f, const OpFigure& library) {
    report(f);
    print(library);
    const double ratio = library.seconds / f.seconds;
    std::cout << fmt::format("{:<36} {:>10.3f}x as fast as the library\n", "", ratio) << std::flush;
    figures_.back()["library"] = json_of(library);
    figures_.back()["times_as_fast_as_library"] = ratio;
  }

  ExitCode end(const std::string& kind, const std::string& command_line) const {
    if (options.text("json").empty()) return ExitCode::kOk;
    RunFacts facts;
    facts.versions = versions();
    facts.versions["backend"] = choice.backend->description();
    facts.command_line = command_line;
    write_json(options.text("json"), {{"bench", kind},
                                      {"environment", environment_json(facts)},
                                      {"activations", choice.activations},
                                      {"steady_seconds", steady_},
                                      {"limits", to_json(limits)},
                                      {"figures", figures_}});
    return ExitCode::kOk;
  }

  const Options& options;
  BackendChoice choice;
  Limits limits;
  std::mt19937 random{20240607};

 private:
  void print_limits() const {
    std::cout << fmt::format(
        "{}\nlimits measured here, in short bursts: {} {:.0f} GB/s, 16-bit linear {:.1f} TFLOP/s "
        "({} cubed)\n{:<36} {:>11} {:>9} {:>8} {:>10} {:>10}\n",
        choice.backend->description(), choice.gpu ? "copies" : "reads",
        limits.read_bytes_per_s / 1e9, limits.linear_flops_per_s / 1e12, limits.linear_size, "",
        "us", "GB/s", "of copy", "TFLOP/s", "of linear");
  }
  Json json_of(const OpFigure& f) const {
    return {{"name", f.name},
            {"us", 1e6 * f.seconds},
            {"us_min", 1e6 * f.seconds_min},
            {"us_max", 1e6 * f.seconds_max},
            {"bytes", f.bytes},
            {"flops", f.flops},
            {"share_of_copy", f.bytes / f.seconds / limits.read_bytes_per_s},
            {"share_of_16_bit_linear", f.flops / f.seconds / limits.linear_flops_per_s}};
  }
  void print(const OpFigure& f) const {
    std::cout << fmt::format("{:<36} {:>11.2f} {:>9.0f} {:>7.1f}% {:>10.2f} {:>9.1f}%\n", f.name,
                             1e6 * f.seconds, f.bytes / f.seconds / 1e9,
                             100 * f.bytes / f.seconds / limits.read_bytes_per_s,
                             f.flops / f.seconds / 1e12,
                             100 * f.flops / f.seconds / limits.linear_flops_per_s)
              << std::flush;
  }

  Interrupt& interrupt_;
  Progress& progress_;
  double steady_ = 0;
  uint64_t keys_ = 0;
  Json figures_ = Json::array();
};

constexpr const char* kLinears[] = {"qkv", "o", "gate_up", "down"};
struct LinearsOfLayer {
  std::unique_ptr<Linear> part[4];
};

// The four linears of a layer, as a rank of --tp slots has them: of layers enough that none stays
// in a cache of up to 100 MB.
std::vector<LinearsOfLayer> load_linears(const Options& o, Backend& backend) {
  const auto source = open_weights(o.text("model"), "");
  if (backend.makes_weights()) source->allow_recipes();
  const Architecture& a = source->architecture();
  const auto tp = static_cast<int>(o.integer("tp", 1, 1024));
  check_grid(a, tp, 1, source->group());
  const Shard shard = make_shard(a, tp, 0, 1, 0, source->group());
  size_t bytes = 0;
  std::vector<LinearsOfLayer> layers;
  for (int i = 0; i < a.layers && (bytes < (size_t{2} << 30) || i < 2); ++i) {
    const LayerWeights w = read_layer(*source, shard, i);
    LinearsOfLayer l;
    l.part[0] = backend.load_linear(w.qkv);
    l.part[1] = backend.load_linear({&w.o, 1});
    l.part[2] = backend.load_linear(w.gate_up);
    l.part[3] = backend.load_linear({&w.down, 1});
    for (const auto& p : l.part) bytes += p->bytes;
    layers.push_back(std::move(l));
  }
  return layers;
}

// Each linear at each number of rows, beside the library's FP8 where the device has it.
class LinearBench {
 public:
  explicit LinearBench(OpBench& bench)
      : bench_(bench),
        backend_(bench.backend()),
        rows_(numbers_of(bench.options, "rows")),
        layers_(load_linears(bench.options, backend_)) {
    // The library's goes in sixteens.
    most_ = backend_.padded_rows((*std::max_element(rows_.begin(), rows_.end()) + 15) / 16 * 16);
    int64_t widest = 0, out_features = 0;
    for (const auto& p : layers_[0].part) {
      widest = std::max(widest, p->cols);
      out_features = std::max(out_features, p->rows);
    }
    in_ = bench.activations(most_ * widest);
    coded_ = {backend_, static_cast<size_t>(most_ * widest) * element(), "a bench"};
    scale_ = {backend_, static_cast<size_t>(most_), "a bench"};
    out_ = {backend_, static_cast<size_t>(most_ * out_features) * 4, "a bench"};
    for (size_t i = 0; i < 4; ++i) load_library(i);
  }

  void run() {
    for (const int n : rows_) {
      for (size_t part = 0; part < 4; ++part) {
        std::vector<const Linear*> ours, library;
        for (const auto& l : layers_) ours.push_back(l.part[part].get());
        for (const auto& l : library_[part]) library.push_back(l.get());
        const OpFigure f = measure(
            fmt::format("{} {} x {}, {} rows", kLinears[part], ours[0]->rows, ours[0]->cols, n),
            ours, n);
        if (library.empty()) {
          bench_.report(f);
        } else {
          bench_.report(f, measure("  cuBLASLt FP8, a scale a row", library, n));
        }
      }
    }
  }

 private:
  size_t element() const { return dtype_bytes(backend_.activation_dtype()); }

  // As many copies as no cache holds.
  void load_library(size_t part) {
    const Linear& ours = *layers_[0].part[part];
    auto& list = library_[part];
    size_t bytes = 0;
    while (list.size() < layers_.size() && (bytes < (size_t{400} << 20) || list.size() < 2)) {
      auto l = backend_.library_linear(ours.rows, ours.cols);
      if (!l) return;
      bytes += l->bytes;
      list.push_back(std::move(l));
    }
  }

  // Codes as a layer's norm writes them.
  void quantize(int64_t rows, int64_t cols) {
    std::vector<float> ones(static_cast<size_t>(cols), 1.0f);
    const DeviceArray<float> weight(backend_, ones.size(), "a bench");
    weight.upload(ones);
    backend_.norm({.residual = in_.data(),
                   .weight = weight.data(),
                   .out = {coded_.data(), scale_.data()},
                   .rows = rows,
                   .features = cols,
                   .epsilon = 1e-5f,
                   .out_rows = rows},
                  backend_.stream());
    backend_.wait(backend_.record(backend_.stream()), deadline_in(60), Interrupt());
  }

  OpFigure measure(const std::string& name, const std::vector<const Linear*>& copies, int n) {
    const Linear& first = *copies[0];
    LinearInput input{in_.data(), nullptr};
    if (first.quantized_input) {
      quantize(n, first.cols);
      input = {coded_.data(), scale_.data()};
    }
    const double in_bytes = first.quantized_input ? 1 : static_cast<double>(element());
    const auto rows = static_cast<double>(first.rows), cols = static_cast<double>(first.cols);
    return bench_.measure({.name = name,
                           .bytes = static_cast<double>(first.bytes) + n * in_bytes * cols +
                                    n * static_cast<double>(element()) * rows,
                           .flops = 2.0 * n * rows * cols},
                          static_cast<int>(copies.size()), [&](int i) {
                            backend_.linear(*copies[static_cast<size_t>(i)], input, out_.data(), n,
                                            false, backend_.stream());
                          });
  }

  OpBench& bench_;
  Backend& backend_;
  std::vector<int> rows_;
  std::vector<LinearsOfLayer> layers_;
  std::vector<std::unique_ptr<Linear>> library_[4];
  int64_t most_ = 0;
  DeviceArray<std::byte> in_, coded_, out_;
  DeviceArray<float> scale_;
};

void linears(OpBench& bench) { LinearBench(bench).run(); }

// Attention of one layer: --sequences of --context tokens each, the last --rows of them in this
// step.
void attention(OpBench& bench) {
  const Options& o = bench.options;
  Backend& backend = bench.backend();
  const Architecture a = open_weights(o.text("model"), "")->architecture();
  const auto tp = static_cast<int>(o.integer("tp", 1, 1024));
  const Shard shard = make_shard(a, tp, 0, 1, 0, 0);
  const auto page = static_cast<int32_t>(o.integer("page-tokens", 1, 4096));
  const auto heads = static_cast<int32_t>(shard.heads.size());
  const auto kv_heads = static_cast<int32_t>(shard.kv_heads.size());
  const auto rows = static_cast<int32_t>(o.integer("rows", 1, 1 << 16));
  for (const int sequences : numbers_of(o, "sequences")) {
    for (const int context : numbers_of(o, "context")) {
      DROVER_CHECK(rows <= context, ExitCode::kUsage, "--rows {} of a context of {}", rows,
                   context);
      const int32_t pages_each = (context + page - 1) / page;
      const KvShape shape{.format = kv_format(o.text("kv")),
                          .pages = pages_each * sequences,
                          .page_tokens = page,
                          .kv_heads = kv_heads,
                          .head_size = a.head_size};
      const size_t bytes = KvCache::page_bytes(shape, 1) * static_cast<size_t>(shape.pages);
      const auto layers =
          static_cast<int64_t>(std::clamp<size_t>((size_t{512} << 20) / bytes + 1, 2, 8));
      const KvCache cache(backend, shape, layers);
      std::vector<int32_t> table(static_cast<size_t>(shape.pages)), slot, position, chunk{0};
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
      std::shuffle(table.begin(), table.end(), bench.random);
      const auto ints = [&](const std::vector<int32_t>& v) {
        DeviceArray<int32_t> d(backend, v.size(), "a bench");
        d.upload(v);
        return d;
      };
      const auto page_table = ints(table);
      const auto qkv_width = int64_t{heads + 2 * kv_heads} * a.head_size;
      const auto frequencies = a.inverse_frequencies();
      const DeviceArray<float> inverse(backend, frequencies.size(), "a bench");
      inverse.upload(frequencies);
      // Fills the cache as a prompt does, sequence by sequence.
      const auto fill = bench.activations(int64_t{context} * qkv_width);
      std::vector<int32_t> whole(static_cast<size_t>(context));
      for (size_t i = 0; i < whole.size(); ++i) whole[i] = static_cast<int32_t>(i);
      const auto fill_position = ints(whole);
      const auto fill_chunk = ints({0, context});
      for (int s = 0; s < sequences; ++s) {
        const auto fill_slot = ints(std::vector<int32_t>(static_cast<size_t>(context), s));
        const StepRows step{.rows = context,
                            .chunks = 1,
                            .row_slot = fill_slot.data(),
                            .row_position = fill_position.data(),
                            .chunk_row = fill_chunk.data(),
                            .page_table = page_table.data(),
                            .max_pages = pages_each};
        for (int64_t l = 0; l < layers; ++l) {
          backend.rope_append({.qkv = fill.data(),
                               .heads = heads,
                               .inverse_frequencies = inverse.data(),
                               .rope_dims = a.rope_dims,
                               .half_pairing = a.rope_pairing == RopePairing::kHalf,
                               .shape = shape,
                               .cache = cache.layer(static_cast<size_t>(l))},
                              step, backend.stream());
        }
        backend.wait(backend.record(backend.stream()), deadline_in(60), Interrupt());
      }
      double pairs = 0;
      for (int s = 0; s < sequences; ++s) {
        for (int r = 0; r < rows; ++r) {
          slot.push_back(s);
          position.push_back(context - rows + r);
          pairs += position.back() + 1;
        }
        chunk.push_back(static_cast<int32_t>(slot.size()));
      }
      const auto d_slot = ints(slot), d_position = ints(position), d_chunk = ints(chunk);
      const auto n = static_cast<int32_t>(slot.size());
      const StepRows step{.rows = n,
                          .chunks = sequences,
                          .decode_rows = rows == 1 ? n : 0,
                          .row_slot = d_slot.data(),
                          .row_position = d_position.data(),
                          .chunk_row = d_chunk.data(),
                          .page_table = page_table.data(),
                          .max_pages = pages_each};
      const auto qkv = bench.activations(int64_t{n} * qkv_width);
      const DeviceArray<std::byte> out(
          backend,
          static_cast<size_t>(backend.padded_rows(n)) * static_cast<size_t>(heads) *
              static_cast<size_t>(a.head_size) * dtype_bytes(backend.activation_dtype()),
          "a bench");
      const double cached = static_cast<double>(KvCache::page_bytes(shape, 1)) / page;
      bench.report(
          bench.measure({.name = fmt::format("{} x {} tokens, {} row{}, {}", sequences, context,
                                             rows, rows == 1 ? "" : "s", o.text("kv")),
                         .bytes = cached * context * sequences,
                         .flops = 4.0 * pairs * heads * a.head_size},
                        static_cast<int>(layers), [&](int i) {
                          backend.attention({.qkv = qkv.data(),
                                             .out = {out.data()},
                                             .heads = heads,
                                             .shape = shape,
                                             .cache = cache.layer(static_cast<size_t>(i))},
                                            step, backend.stream());
                        }));
      backend.forget_replays();
    }
  }
}

int bench_operation(const char* kind, const std::vector<OptionRow>& table,
                    const std::vector<std::string>& arguments, void (*run)(OpBench&)) {
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  std::string line = fmt::format("drover bench {}", kind);
  for (const auto& a : arguments) line += " " + a;
  return run_ranks(
      [&](World& world, Interrupt& interrupt, Progress& progress) {
        log::init(world.rank(), "", world.rank() == 0);
        DROVER_CHECK(world.size() == 1, ExitCode::kUsage,
                     "drover bench {} runs on one device: start one rank", kind);
        progress.enter("measuring operations", 600);
        OpBench bench(o, world, interrupt, progress);
        run(bench);
        return bench.end(kind, line);
      },
      [](bool) {});
}

}  // namespace

int bench_linear(const std::vector<std::string>& arguments) {
  return bench_operation("linear", bench_linear_options(), arguments, linears);
}

int bench_attention(const std::vector<std::string>& arguments) {
  return bench_operation("attention", bench_attention_options(), arguments, attention);
}

}  // namespace drover
