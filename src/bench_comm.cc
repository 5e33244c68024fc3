// drover bench comm: latency and bandwidth of the communicator that activations move over.
#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <memory>

#include "backend/backend.h"
#include "base/formats.h"
#include "base/host.h"
#include "base/log.h"
#include "bench.h"
#include "comm/device.h"
#include "command_line.h"
#include "job.h"
#include "serve/results.h"
#ifdef DROVER_HAVE_CUDA
#include "backend/cuda/cuda_backend.h"
#endif

namespace drover {

namespace {

struct CommFigure {
  std::string operation;
  Dtype type = Dtype::kF32;
  size_t bytes = 0;  // of one rank's buffer
  int recorded = 0;  // calls of the CUDA graph that they were made in; 0: each by itself
  size_t runs = 0;
  double us = 0, us_p90 = 0;
  // Bytes over time, and what that asks of a link whatever the number of ranks, both as
  // nccl-tests' PERFORMANCE.md defines them (there a gather's size is that of its whole result).
  double algorithm_bandwidth = 0, bus_bandwidth = 0;
};

// What is measured, and where.
struct CommPlace {
  std::string transport;  // "mpi", "nccl", "staged"
  std::vector<Dtype> types;
  int calls = 1;     // between two looks at the clock
  int recorded = 0;  // in a CUDA graph; 0: none
  std::unique_ptr<CommDevice> device;
  std::unique_ptr<Backend> backend;       // of GPUs: for sums with a norm
  std::unique_ptr<Comm> host, host_part;  // for the bench's own words
  std::unique_ptr<Comm> all, part;        // measured: part
};

std::vector<size_t> sizes_of(const Options& o) {
  std::vector<size_t> sizes;
  for (const auto& text : o.list("sizes")) {
    size_t used = 0;
    unsigned long long value = 0;
    try {
      value = std::stoull(text, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    DROVER_CHECK(used == text.size() && value >= 4 && value % 4 == 0 && value <= (1ull << 30),
                 ExitCode::kUsage, "--sizes {}: expected multiples of 4 bytes up to 1 GiB", text);
    sizes.push_back(value);
  }
  DROVER_CHECK(!sizes.empty(), ExitCode::kUsage, "--sizes is empty");
  return sizes;
}

class CommBench {
 public:
  CommBench(CommPlace& place, double seconds)
      : comm_(*place.part), place_(place), device_(*place.device), seconds_(seconds) {}

  std::vector<CommFigure> all(const std::vector<size_t>& sizes) {
    const size_t most = *std::max_element(sizes.begin(), sizes.end());
    comm_.reserve(most);
    comm_.connect(0, 1, most, 2);
    comm_.connect(1, 0, most, 2);
    const Buffer in(device_, most), out(device_, most * static_cast<size_t>(comm_.size()));
    in_ = in.data, out_ = out.data;
    for (const size_t bytes : sizes) {
      for (const Dtype type : place_.types) sum(type, bytes);
      gather(bytes);
      there_and_back(bytes);
    }
    if (place_.backend != nullptr) norms();
    return std::move(figures_);
  }

 private:
  struct Buffer {
    Buffer(CommDevice& d, size_t bytes) : device(d), data(d.alloc(bytes)) {}
    ~Buffer() { device.free(data); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    CommDevice& device;
    void* data;
  };
  static constexpr size_t kRecordedBytes = 4 << 20;  // a graph saves launches: of small ones

  void sum(Dtype type, size_t bytes) {
    const size_t count = bytes / dtype_bytes(type);
    const auto n = static_cast<double>(comm_.size());
    const auto run = [&] { comm_.all_reduce_sum(in_, count, type, device_.stream()); };
    type == Dtype::kF32 ? verify<float>(bytes, run, [](float x) { return x; })
                        : verify<uint16_t>(bytes, run, bf16_from_float);
    measure({.operation = "all_reduce", .type = type, .bytes = bytes}, 1, 2 * (n - 1) / n, run);
  }

  void gather(size_t bytes) {
    const auto n = static_cast<double>(comm_.size());
    measure({.operation = "all_gather", .type = Dtype::kU8, .bytes = bytes}, n, (n - 1) / n,
            [&] { comm_.all_gather(in_, out_, bytes, device_.stream()); });
  }

  void there_and_back(size_t bytes) {
    const auto run = [&] {
      void* s = device_.stream();
      if (comm_.rank() == 0) {
        comm_.send(in_, bytes, 1, s);
        comm_.recv(in_, bytes, 1, s);
      } else if (comm_.rank() == 1) {
        comm_.recv(in_, bytes, 0, s);
        comm_.send(in_, bytes, 0, s);
      }
    };
    CommFigure f{.operation = "send_recv", .type = Dtype::kU8, .bytes = bytes};
    figures_.push_back(measured(f, 1, 1, place_.calls, 2 * place_.calls, run));
  }

  // What a decode step has between two linears: a sum over the slots, the residual and a norm to
  // e4m3. Over the communicator and then a norm, and, for few rows, all at once over peer memory.
  void norms() {
    constexpr int64_t kFeatures = 8192, kRows[] = {1, 4, 16, 32, 64};
    constexpr size_t kRowBytes = 2 * kFeatures, kMost = kRows[4] * kRowBytes;
    const int ranks = comm_.size();
    comm_.reserve(kMost);
    const auto sums = place_.backend->peer_sums(ranks, kFeatures);
    const auto memory = sums.rows > 0 ? comm_.share(sums.bytes) : nullptr;
    PeerBuffers peers{.rank = comm_.rank(), .memory = {}, .stop = nullptr};
    for (int r = 0; memory != nullptr && r < ranks; ++r) peers.memory.push_back(memory->of(r));
    if (memory != nullptr) peers.stop = memory->stop();
    const Buffer residual(device_, kMost), delta(device_, kMost), out(device_, kMost);
    const Buffer scales(device_, kRows[4] * sizeof(float));
    const Buffer weight(device_, kFeatures * sizeof(float));
    for (const int64_t rows : kRows) {
      Backend::Norm a{.residual = residual.data,
                      .delta = delta.data,
                      .weight = static_cast<const float*>(weight.data),
                      .out = {out.data, static_cast<float*>(scales.data)},
                      .rows = rows,
                      .features = kFeatures,
                      .epsilon = 1e-5f,
                      .out_rows = rows};
      const auto bytes = static_cast<size_t>(rows) * kRowBytes;
      const double bus = 2 * (ranks - 1.0) / ranks;
      measure({.operation = "reduce_norm", .type = Dtype::kBf16, .bytes = bytes}, 1, bus, [&] {
        comm_.all_reduce_sum(delta.data, bytes / 2, Dtype::kBf16, device_.stream());
        place_.backend->norm(a, device_.stream());
      });
      if (memory == nullptr || rows > sums.rows) continue;
      a.peers = &peers;
      measure({.operation = "peer_norm", .type = Dtype::kBf16, .bytes = bytes}, 1, bus,
              [&] { place_.backend->norm(a, device_.stream()); });
    }
  }

  // A fast wrong sum is no figure.
  template <class Element, class Run, class FromFloat>
  void verify(size_t bytes, Run run, FromFloat from_float) {
    const int n = comm_.size();
    std::vector<Element> data(bytes / sizeof(Element),
                              from_float(static_cast<float>(comm_.rank() + 1)));
    device_.copy_in(in_, data.data(), bytes);
    run();
    device_.copy_out(data.data(), in_, bytes);
    const Element expected = from_float(static_cast<float>(n * (n + 1) / 2));
    for (const Element x : data) {
      DROVER_CHECK(x == expected, ExitCode::kInternal, "all_reduce gave {}, expected {}", x,
                   expected);
    }
    std::fill(data.begin(), data.end(), Element{0});
    device_.copy_in(in_, data.data(), bytes);
  }

  // By itself, and recorded where that is possible.
  template <class Run>
  void measure(CommFigure f, double factor, double bus, Run run) {
    figures_.push_back(measured(f, factor, bus, place_.calls, place_.calls, run));
    if (place_.recorded == 0 || !comm_.capturable() || f.bytes > kRecordedBytes) return;
    const auto replay = device_.record([&] {
      for (int i = 0; i < place_.recorded; ++i) run();
    });
    f.recorded = place_.recorded;
    figures_.push_back(measured(f, factor, bus, 1, place_.recorded, replay));
  }

  // Runs `run` `times` times between two looks at the clock, which is `share` times what is told.
  // Rank 0 says when to stop, in rounds, so that all ranks make the same calls.
  template <class Run>
  CommFigure measured(CommFigure f, double factor, double bus, int times, int share, Run run) {
    constexpr int kRound = 10, kRounds = 100;
    const auto batch = [&] {
      for (int i = 0; i < times; ++i) run();
    };
    for (int i = 0; i < kRound; ++i) device_.time(batch);
    std::vector<double> us;
    const auto end = deadline_in(seconds_);
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kRound; ++i) us.push_back(device_.time(batch) / share);
      uint8_t over = Clock::now() >= end ? 1 : 0;
      place_.host_part->broadcast(&over, 1, 0, nullptr);
      if (over != 0) break;
    }
    f.runs = us.size();
    f.us = percentile(us, 0.5);
    f.us_p90 = percentile(us, 0.9);
    f.algorithm_bandwidth = factor * static_cast<double>(f.bytes) / (f.us * 1e-6);
    f.bus_bandwidth = f.algorithm_bandwidth * bus;
    return f;
  }

  Comm& comm_;
  CommPlace& place_;
  CommDevice& device_;
  double seconds_;
  void* in_ = nullptr;   // [largest size]
  void* out_ = nullptr;  // [ranks, largest size]
  std::vector<CommFigure> figures_;
};

CommPlace host_place(World& world, Interrupt& interrupt, Progress& progress) {
  CommPlace p;
  p.transport = "mpi";
  p.types = {Dtype::kF32};
  p.device = make_host_device();
  p.all = world.make_comm(interrupt, &progress, 60);
  return p;
}

CommPlace gpu_place(World& world, Interrupt& interrupt, Progress& progress) {
  const int gpus = comm_gpu_count();
  DROVER_CHECK(gpus > 0, ExitCode::kEnvironment, "--backend cuda: no GPU here");
  CommPlace p;
  p.types = {Dtype::kF32, Dtype::kBf16};
  p.calls = 20;
  p.recorded = 100;
  p.device = make_gpu_device(world.local_rank() % gpus, interrupt, 60);
#ifdef DROVER_HAVE_CUDA
  p.backend = make_cuda_backend({.device = world.local_rank() % gpus});
#endif
  const bool own = world.agree_min(world.local_size() <= gpus ? 1 : 0, interrupt, 60) == 1;
  p.transport = own ? "nccl" : "staged";
  void* const stream = p.device->stream();
  p.all = own ? world.make_nccl_comm(interrupt, &progress, 60, stream)
              : world.make_staged_comm(interrupt, &progress, 60, stream);
  return p;
}

void report(const Options& o, const CommPlace& place, const std::vector<CommFigure>& figures,
            const Grid& grid, const std::string& command_line) {
  const int ranks = place.part->size();
  std::cout << fmt::format(
      "{} of {} ranks, {}; {} over {}\n{:<11} {:<5} {:<6} {:>9} {:>7} {:>10} {:>10} {:>10} "
      "{:>10}\n",
      o.text("over"), ranks, grid.text(), place.device->name(), place.transport, "operation",
      "type", "calls", "bytes", "runs", "us", "us p90", "algo GB/s", "bus GB/s");
  Json rows = Json::array();
  for (const auto& f : figures) {
    const char* how = f.recorded > 0 ? "graph" : "plain";
    std::cout << fmt::format(
        "{:<11} {:<5} {:<6} {:>9} {:>7} {:>10.1f} {:>10.1f} {:>10.3f} {:>10.3f}\n", f.operation,
        to_string(f.type), how, f.bytes, f.runs, f.us, f.us_p90, f.algorithm_bandwidth / 1e9,
        f.bus_bandwidth / 1e9);
    rows.push_back({{"operation", f.operation},
                    {"type", to_string(f.type)},
                    {"bytes", f.bytes},
                    {"graph_calls", f.recorded},
                    {"runs", f.runs},
                    {"us", f.us},
                    {"us_p90", f.us_p90},
                    {"algorithm_bytes_per_s", f.algorithm_bandwidth},
                    {"bus_bytes_per_s", f.bus_bandwidth}});
  }
  std::cout.flush();
  if (o.text("json").empty()) return;
  RunFacts facts;
  facts.versions = versions();
  facts.command_line = command_line;
  write_json(o.text("json"), {{"bench", "comm"},
                              {"environment", environment_json(facts)},
                              {"grid", grid.text()},
                              {"over", o.text("over")},
                              {"backend", o.text("backend")},
                              {"device", place.device->name()},
                              {"transport", place.transport},
                              {"nccl", nccl_version()},
                              {"ranks", ranks},
                              {"figures", rows}});
}

}  // namespace

int bench_comm(const std::vector<std::string>& arguments) {
  const auto table = bench_comm_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  const auto sizes = sizes_of(o);
  const double seconds = o.number("seconds", 0.001, 60);
  const std::string over = o.text("over");
  DROVER_CHECK(over == "tensor" || over == "pipeline", ExitCode::kUsage,
               "--over {}: expected tensor or pipeline", over);
  const std::string backend = o.text("backend");
  DROVER_CHECK(backend == "cpu" || backend == "cuda", ExitCode::kUsage,
               "--backend {}: expected cpu or cuda", backend);
  const auto make_place = backend == "cuda" ? gpu_place : host_place;
  auto place = std::make_unique<CommPlace>();
  return run_ranks(
      [&](World& world, Interrupt& interrupt, Progress& progress) {
        world.barrier(interrupt, 120, "start of all ranks");
        log::init(world.rank(), "", world.rank() == 0);
        const auto size = [&](const char* name) {
          return static_cast<int>(o.integer(name, 0, 1 << 20));
        };
        const Grid grid = make_grid(size("tp"), size("pp"), size("dp"), world.size());
        const int rank = world.rank();
        const bool tensor = over == "tensor";
        DROVER_CHECK((tensor ? grid.tp : grid.pp) > 1, ExitCode::kUsage,
                     "the {} communicator of {} has one rank: nothing to measure", over,
                     grid.text());
        progress.enter("measuring the communicator", 120);
        *place = make_place(world, interrupt, progress);
        place->host = world.make_comm(interrupt, &progress, 60);
        const int row = rank / grid.tp;
        const int column = grid.replica_of(rank) * grid.tp + grid.slot_of(rank);
        place->host_part = place->host->split(tensor ? row : column, rank, over);
        place->part = place->all->split(tensor ? row : column, rank, over);
        const auto figures = CommBench(*place, seconds).all(sizes);
        if (rank == 0) {
          std::string line = "drover bench comm";
          for (const auto& a : arguments) line += " " + a;
          report(o, *place, figures, grid, line);
        }
        world.barrier(interrupt, 600, "end of all ranks");
        return ExitCode::kOk;
      },
      [&](bool failed) {
        // Posted receives of a failed run still point into them, and they at the interrupt.
        if (failed) (void)place.release();
        place.reset();
      });
}

}  // namespace drover
