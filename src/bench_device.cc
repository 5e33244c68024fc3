#include "bench_device.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <iostream>

#include "base/formats.h"
#include "base/log.h"
#include "serve/results.h"

namespace drover {

namespace {

constexpr int kWindows = 7;

}  // namespace

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

OpBench::OpBench(const Options& o, World& world, Interrupt& interrupt, Progress& progress)
    : options(o), interrupt_(interrupt), progress_(progress) {
  choice = choose_backend(o, choose_placement(o, world, interrupt), world);
  const auto all = world.make_comm(interrupt, &progress, 60);
  RankParts parts{world, interrupt, *choice.backend, *all, choice.threads, choice.gpu, 0};
  limits = measure_limits(parts);
  steady_ = o.number("steady", 0, 600);
  print_limits();
}

DeviceArray<std::byte> OpBench::activations(int64_t count) {
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

OpFigure OpBench::measure(OpFigure f, int rotation, const std::function<void(int)>& call,
                          double window_seconds) {
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
  const int bursts = std::clamp(static_cast<int>(window_seconds / once), 1, 1000);
  std::vector<double> windows;
  for (int i = 0; i < kWindows; ++i) windows.push_back(timed(bursts) / calls);
  std::sort(windows.begin(), windows.end());
  f.seconds = windows[kWindows / 2];
  f.seconds_min = windows.front();
  f.seconds_max = windows.back();
  return f;
}

void OpBench::report(const OpFigure& f) {
  print(f);
  figures_.push_back(json_of(f));
}

void OpBench::report(const OpFigure& f, const OpFigure& library) {
  report(f);
  print(library);
  const double ratio = library.seconds / f.seconds;
  std::cout << fmt::format("{:<36} {:>10.3f}x as fast as the library\n", "", ratio) << std::flush;
  figures_.back()["library"] = json_of(library);
  figures_.back()["times_as_fast_as_library"] = ratio;
}

ExitCode OpBench::end(const std::string& kind, const std::string& command_line) const {
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

void OpBench::print_limits() const {
  std::cout << fmt::format(
      "{}\nlimits measured here, in short bursts: {} {:.0f} GB/s, 16-bit linear {:.1f} TFLOP/s "
      "({} cubed)\n{:<36} {:>11} {:>9} {:>8} {:>10} {:>10}\n",
      choice.backend->description(), choice.gpu ? "copies" : "reads", limits.read_bytes_per_s / 1e9,
      limits.linear_flops_per_s / 1e12, limits.linear_size, "", "us", "GB/s", "of copy", "TFLOP/s",
      "of linear");
}

void OpBench::print(const OpFigure& f) const {
  std::cout << fmt::format("{:<36} {:>11.2f} {:>9.0f} {:>7.1f}% {:>10.2f} {:>9.1f}%\n", f.name,
                           1e6 * f.seconds, f.bytes / f.seconds / 1e9,
                           100 * f.bytes / f.seconds / limits.read_bytes_per_s,
                           f.flops / f.seconds / 1e12,
                           100 * f.flops / f.seconds / limits.linear_flops_per_s)
            << std::flush;
}

Json OpBench::json_of(const OpFigure& f) const {
  return {{"name", f.name},
          {"us", 1e6 * f.seconds},
          {"us_min", 1e6 * f.seconds_min},
          {"us_max", 1e6 * f.seconds_max},
          {"bytes", f.bytes},
          {"flops", f.flops},
          {"share_of_copy", f.bytes / f.seconds / limits.read_bytes_per_s},
          {"share_of_16_bit_linear", f.flops / f.seconds / limits.linear_flops_per_s}};
}

int bench_operation(const char* kind, const std::vector<OptionRow>& table,
                    const std::vector<std::string>& arguments,
                    const std::function<void(OpBench&)>& run) {
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

const char* BenchLinears::name(size_t part) {
  constexpr const char* kNames[kParts] = {"qkv", "o", "gate_up", "down"};
  return kNames[part];
}

BenchLinears::BenchLinears(OpBench& bench, int most_rows)
    : bench_(bench), backend_(bench.backend()) {
  load();
  // The library's linears go in sixteens.
  const int64_t most = backend_.padded_rows((most_rows + 15) / 16 * 16);
  int64_t widest = 0, out_features = 0;
  for (const auto& p : layers_[0].part) {
    widest = std::max(widest, p->cols);
    out_features = std::max(out_features, p->rows);
  }
  in_ = bench.activations(most * widest);
  coded_ = {backend_, static_cast<size_t>(most * widest) * element(), "a bench"};
  scale_ = {backend_, static_cast<size_t>(most), "a bench"};
  out_ = {backend_, static_cast<size_t>(most * out_features) * 4, "a bench"};
}

void BenchLinears::load() {
  const Options& o = bench_.options;
  const auto source = open_weights(o.text("model"), "");
  if (backend_.makes_weights()) source->allow_recipes();
  const Architecture& a = source->architecture();
  const auto tp = static_cast<int>(o.integer("tp", 1, 1024));
  check_grid(a, tp, 1, source->group());
  const Shard shard = make_shard(a, tp, 0, 1, 0, source->group());
  size_t bytes = 0;
  for (int i = 0; i < a.layers && (bytes < (size_t{2} << 30) || i < 2); ++i) {
    const LayerWeights w = read_layer(*source, shard, i);
    Layer l;
    l.part[0] = backend_.load_linear(w.qkv);
    l.part[1] = backend_.load_linear({&w.o, 1});
    l.part[2] = backend_.load_linear(w.gate_up);
    l.part[3] = backend_.load_linear({&w.down, 1});
    for (const auto& p : l.part) bytes += p->bytes;
    layers_.push_back(std::move(l));
  }
}

std::vector<Linear*> BenchLinears::copies(size_t part) const {
  std::vector<Linear*> all;
  for (const Layer& l : layers_) all.push_back(l.part[part].get());
  return all;
}

// Codes as a layer's norm writes them.
void BenchLinears::quantize(int64_t rows, int64_t cols) {
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

OpFigure BenchLinears::measure(const std::string& name, const std::vector<Linear*>& copies,
                               int rows, double window_seconds) {
  const Linear& first = *copies[0];
  LinearInput input{in_.data(), nullptr};
  if (first.quantized_input) {
    quantize(rows, first.cols);
    input = {coded_.data(), scale_.data()};
  }
  const double in_bytes = first.quantized_input ? 1 : static_cast<double>(element());
  const auto n = static_cast<double>(first.rows), k = static_cast<double>(first.cols);
  return bench_.measure(
      {.name = name,
       .bytes = static_cast<double>(first.bytes) + rows * in_bytes * k +
                rows * static_cast<double>(element()) * n,
       .flops = 2.0 * rows * n * k},
      static_cast<int>(copies.size()),
      [&](int i) {
        backend_.linear(*copies[static_cast<size_t>(i)], input, out_.data(), rows, false,
                        backend_.stream());
      },
      window_seconds);
}

}  // namespace drover
