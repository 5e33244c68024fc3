// drover bench comm: latency and bandwidth of the communicator that activations move over.
#include <fmt/format.h>

#include <algorithm>
#include <iostream>
#include <memory>

#include "base/host.h"
#include "base/log.h"
#include "bench.h"
#include "command_line.h"
#include "job.h"
#include "serve/results.h"

namespace drover {

namespace {

struct CommFigure {
  std::string operation;
  size_t bytes = 0;  // of one rank's buffer
  size_t runs = 0;
  double us = 0, us_p90 = 0;
  // Bytes over time, and what that asks of a link whatever the number of ranks, both as
  // nccl-tests' PERFORMANCE.md defines them (there a gather's size is that of its whole result).
  double algorithm_bandwidth = 0, bus_bandwidth = 0;
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
  CommBench(Comm& comm, double seconds) : comm_(comm), seconds_(seconds) {}

  std::vector<CommFigure> all(const std::vector<size_t>& sizes) {
    std::vector<CommFigure> figures;
    const auto n = static_cast<double>(comm_.size());
    for (const size_t bytes : sizes) {
      in_.assign(bytes / sizeof(float), 0.0f);
      out_.assign(in_.size() * static_cast<size_t>(comm_.size()), 0.0f);
      verify();
      figures.push_back(measure("all_reduce", bytes, 1, 2 * (n - 1) / n, [this] {
        comm_.all_reduce_sum(in_.data(), in_.size(), Dtype::kF32, nullptr);
      }));
      figures.push_back(measure("all_gather", bytes, n, (n - 1) / n, [&] {
        comm_.all_gather(in_.data(), out_.data(), bytes, nullptr);
      }));
      figures.push_back(measure("send_recv", bytes, 1, 1, [&] { there_and_back(bytes); }));
      figures.back().us /= 2;
      figures.back().us_p90 /= 2;
      figures.back().algorithm_bandwidth *= 2;
      figures.back().bus_bandwidth *= 2;
    }
    return figures;
  }

 private:
  // A fast wrong sum is no figure.
  void verify() {
    std::fill(in_.begin(), in_.end(), static_cast<float>(comm_.rank() + 1));
    comm_.all_reduce_sum(in_.data(), in_.size(), Dtype::kF32, nullptr);
    const auto expected = static_cast<float>(comm_.size() * (comm_.size() + 1) / 2);
    for (const float x : in_) {
      DROVER_CHECK(x == expected, ExitCode::kInternal, "all_reduce gave {}, expected {}", x,
                   expected);
    }
    std::fill(in_.begin(), in_.end(), 0.0f);
  }

  void there_and_back(size_t bytes) {
    if (comm_.rank() == 0) {
      comm_.send(in_.data(), bytes, 1, nullptr);
      comm_.recv(in_.data(), bytes, 1, nullptr);
    } else if (comm_.rank() == 1) {
      comm_.recv(in_.data(), bytes, 0, nullptr);
      comm_.send(in_.data(), bytes, 0, nullptr);
    }
  }

  // Rank 0's clock; it also says when to stop, in rounds, so that all ranks make the same calls.
  template <typename Operation>
  CommFigure measure(const char* name, size_t bytes, double factor, double bus, Operation run) {
    constexpr int kRound = 10, kRounds = 100;
    for (int i = 0; i < kRound; ++i) run();
    std::vector<double> us;
    const auto end = deadline_in(seconds_);
    for (int round = 0; round < kRounds; ++round) {
      for (int i = 0; i < kRound; ++i) {
        const auto begin = Clock::now();
        run();
        us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
      }
      uint8_t over = Clock::now() >= end ? 1 : 0;
      comm_.broadcast(&over, 1, 0, nullptr);
      if (over != 0) break;
    }
    CommFigure f{.operation = name, .bytes = bytes, .runs = us.size()};
    f.us = percentile(us, 0.5);
    f.us_p90 = percentile(us, 0.9);
    f.algorithm_bandwidth = factor * static_cast<double>(bytes) / (f.us * 1e-6);
    f.bus_bandwidth = f.algorithm_bandwidth * bus;
    return f;
  }

  Comm& comm_;
  double seconds_;
  std::vector<float> in_, out_;
};

void report(const Options& o, const std::vector<CommFigure>& figures, const Grid& grid, int ranks,
            const std::string& command_line) {
  std::cout << fmt::format("{} of {} ranks, {}\n{:<11} {:>9} {:>7} {:>10} {:>10} {:>10} {:>10}\n",
                           o.text("over"), ranks, grid.text(), "operation", "bytes", "runs", "us",
                           "us p90", "algo GB/s", "bus GB/s");
  Json rows = Json::array();
  for (const auto& f : figures) {
    std::cout << fmt::format("{:<11} {:>9} {:>7} {:>10.1f} {:>10.1f} {:>10.3f} {:>10.3f}\n",
                             f.operation, f.bytes, f.runs, f.us, f.us_p90,
                             f.algorithm_bandwidth / 1e9, f.bus_bandwidth / 1e9);
    rows.push_back({{"operation", f.operation},
                    {"bytes", f.bytes},
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
  std::unique_ptr<Comm> all, comm;
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
        all = world.make_comm(interrupt, &progress, 60);
        const int row = rank / grid.tp;
        const int column = grid.replica_of(rank) * grid.tp + grid.slot_of(rank);
        comm = all->split(tensor ? row : column, rank, over);
        const auto figures = CommBench(*comm, seconds).all(sizes);
        if (rank == 0) {
          std::string line = "drover bench comm";
          for (const auto& a : arguments) line += " " + a;
          report(o, figures, grid, comm->size(), line);
        }
        world.barrier(interrupt, 600, "end of all ranks");
        return ExitCode::kOk;
      },
      [&](bool failed) {
        // Posted receives of a failed run still point into them, and they at the interrupt.
        if (failed) {
          (void)comm.release();
          (void)all.release();
        }
        comm.reset();
        all.reset();
      });
}

}  // namespace drover
