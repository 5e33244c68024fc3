#include "job.h"

#include <algorithm>
#include <filesystem>
#include <future>
#include <iostream>
#include <thread>

#include "base/host.h"
#include "base/log.h"
#include "base/trace.h"
#include "choose_backend.h"
#include "comm/singletons.h"
#include "command_line.h"
#include "drover_version.h"
#include "engine/share_weights.h"
#include "engine/worker.h"
#include "gather_trace.h"
#include "machine/energy.h"
#include "planning.h"
#include "serve/session.h"
#include "size_engine.h"
#include "store/store.h"

namespace drover {

namespace {

// Rank 0 speaks for all, and whoever misses it; each rank's log file has the cause.
void tell(const std::string& cause, ExitCode code, bool aloud) {
  log::leave_stderr();
  log::error("{} (exit code {})", cause, static_cast<int>(code));
  log::flush();
  if (aloud) std::cerr << fmt::format("drover: {}\n", cause) << std::flush;
}

// Ends rank 0 when its threads do not: LoadGen sleeps, or the worker hangs.
[[noreturn]] void give_up(const Interrupt& interrupt) {
  tell(interrupt.cause(), interrupt.code(), true);
  std::_Exit(static_cast<int>(interrupt.code()));
}

// Many worlds of one where one of many was meant. One process speaks for all.
void refuse(const Singletons& s) {
  if (s.processes == 0) return;
  DROVER_CHECK(s.number == 0, ExitCode::kEnvironment, "");
  DROVER_FAIL(ExitCode::kEnvironment, "{}", singletons_text(s, own_command_line()));
}

struct MemoryReport {
  uint64_t weights = 0, kv = 0, peak_rss = 0;
};

// Everything one rank owns, in the order it is built; destroyed in reverse.
class Rank {
 public:
  Rank(const Options& options, const JobParts& parts, World& world, Interrupt& interrupt,
       Progress& progress)
      : options_(options),
        parts_(parts),
        world_(world),
        interrupt_(interrupt),
        progress_(progress) {}

  ExitCode run() {
    start();
    if (options_.flag("print-placement")) {
      print_placement(choose_placement(options_, world_, interrupt_), grid_, world_, interrupt_);
      return ExitCode::kOk;
    }
    load();
    if (parts_.measure) measure();
    const ExitCode code = serve();
    if (options_.flag("report-memory")) report_memory();
    end_device_trace();
    if (parts_.after) {
      RankParts mine = own_parts();
      parts_.after(mine);
    }
    if (!options_.text("trace").empty()) {
      gather_trace(options_.text("trace"), world_, *all_);
    }
    // Everybody leaves with rank 0's verdict.
    return static_cast<ExitCode>(-world_.agree_min(-static_cast<int64_t>(code), interrupt_, 60));
  }

 private:
  void start() {
    if (world_.rank() == 0 && parts_.prepare) parts_.prepare();
    world_.barrier(interrupt_, 120, "start of all ranks");
    open_log();
    trace::name_thread(world_.rank() == 0 ? "main" : "worker");
    if (!options_.text("trace").empty() || parts_.trace_events > 0) {
      trace::start(std::max(parts_.trace_events, trace::kEvents));
    }
    grid_ = choose_grid();
    DROVER_CHECK(!options_.text("model").empty() || options_.flag("print-placement"),
                 ExitCode::kUsage, "--model is missing: give a model store, or synthetic:NAME");
    if (world_.rank() == 0) print_resolved();
  }

  void open_log() const {
    std::string file;
    if (!parts_.log_dir.empty()) {
      std::error_code error;
      std::filesystem::create_directories(parts_.log_dir, error);
      DROVER_CHECK(!error, ExitCode::kEnvironment, "{}: cannot be made: {}", parts_.log_dir,
                   error.message());
      file = fmt::format("{}/rank-{:04d}.log", parts_.log_dir, world_.rank());
    }
    log::init(world_.rank(), file, world_.rank() == 0);
    const std::string level = options_.text("log-level");
    DROVER_CHECK(level == "debug" || level == "info" || level == "warn" || level == "error",
                 ExitCode::kUsage, "--log-level {}: expected debug, info, warn or error", level);
    spdlog::set_level(spdlog::level::from_str(level));
  }

  void print_resolved() const {
    std::string line;
    for (const auto& [name, value] : options_.values()) {
      if (!value.empty() && value != "no") line += fmt::format(" --{} {}", name, value);
    }
    log::info("{} ranks, {};{}", world_.size(), grid_.text(), line);
  }

  Topology topology() const {
    const std::string file = options_.text("topology");
    return file.empty() ? Topology{} : read_topology(file);
  }

  // Tensor parallelism over a network is slow enough to be told of before the run.
  void warn_of_network(const Architecture& a) const {
    const Topology t = topology();
    if (!t.describes_machine() || t.nodes <= 1) return;
    const int local = std::min(grid_.ranks(), t.ranks_per_node());
    constexpr double kRows = 64;
    const std::string text = tensor_warning(t, a, grid_, kRows, guessed_rates(t, "bf16", local, 1));
    if (!text.empty()) log::warn("{}", text);
  }

  Grid choose_grid() const {
    const Topology t = topology();
    const auto size = [&](const char* name, const std::optional<int>& suggested) {
      if (suggested && !options_.given(name)) return *suggested;
      return static_cast<int>(options_.integer(name, 0, 1 << 20));
    };
    return make_grid(size("tp", t.tp), size("pp", t.pp), size("dp", t.dp), world_.size());
  }

  void load() {
    // A copy of the store (--stage) says nothing while it runs.
    progress_.enter("loading", static_cast<int>(options_.number("load-seconds", 1, 1e6)));
    const double seconds = options_.number("load-seconds", 1, 1e6);
    // One rank of a host copies; the others find the copy.
    if (!options_.text("stage").empty()) {
      if (world_.local_rank() == 0) source_ = open_source();
      meet(seconds, "staging of the store");
    }
    if (!source_) source_ = open_source();
    const Architecture& a = source_->architecture();
    check_grid(a, grid_.tp, grid_.pp, source_->group());
    shard_ = make_shard(a, grid_.tp, grid_.slot_of(world_.rank()), grid_.pp,
                        grid_.stage_of(world_.rank()), source_->group());
    if (world_.rank() == 0) {
      log::info("{}: {}, {}", options_.text("model"), a.summary(), source_->description());
      warn_of_network(a);
    }
    placement_ = choose_placement(options_, world_, interrupt_);
    log::info("placed on {}", placement_text(placement_));
    bind_to_share(placement_, options_);
    choice_ = choose_backend(options_, placement_, world_);
    backend_ = choice_.backend.get();
    if (backend_->makes_weights()) source_->allow_recipes();
    // MPI makes communicators in calls that cannot be interrupted: everybody must be on the way.
    meet(seconds, "opening of the store on all ranks");
    make_comms();
    const EngineSizes sizes = size_engine(options_, a, shard_, source_->group(), grid_, *backend_,
                                          choice_.gpu, world_, interrupt_);
    limits_ = sizes.limits;
    limits_.order = parts_.order;
    kv_ = sizes.kv;
    connect_comms(a, sizes);
    // Synthetic weights are made where they are needed; a CPU replica reads for itself.
    const bool shares = choice_.gpu && grid_.dp > 1 && !source_->synthetic();
    if (!source_->synthetic() && (!shares || grid_.replica_of(world_.rank()) == 0)) {
      source_ = read_ahead(std::move(source_), shard_, size_t{1} << 30, choice_.load_threads);
    }
    if (shares) {
      const int shard = world_.rank() % grid_.replica_ranks();
      host_peers_ = all_->split(shard, world_.rank(), "weights' headers");
      peers_ = device_->split(shard, world_.rank(), "weights");
      source_ = share_weights(std::move(source_), *host_peers_);
    }
    cache_ = std::make_unique<KvCache>(*backend_, kv_, shard_.layers.size());
    decoder_ = std::make_unique<Decoder>(*source_, shard_, *backend_, comms_, *cache_,
                                         limits_.step_tokens, sizes.logit_rows, progress_);
    if (shares) {
      decoder_->share(*peers_);
      backend_->wait(backend_->record(backend_->stream()), deadline_in(seconds), interrupt_);
    }
    worker_ = std::make_unique<Worker>(*decoder_, *backend_, comms_, *mailbox_, grid_,
                                       world_.rank(), sizes.worker, interrupt_, progress_);
    count_energy();
    log::info(
        "shard: layers {}-{}, heads {}-{}, vocabulary {}-{}; weights {:.1f} MiB, KV {:.1f} MiB "
        "in {} pages of {} tokens",
        shard_.layers.begin, shard_.layers.end, shard_.heads.begin, shard_.heads.end,
        shard_.vocab.begin, shard_.vocab.end,
        static_cast<double>(decoder_->weight_bytes()) / (1 << 20),
        static_cast<double>(kv_bytes()) / (1 << 20), kv_.pages, kv_.page_tokens);
    meet(seconds, "loading of all ranks");
    worker_->prepare();
    meet(seconds, "recording of steps on all ranks");
  }

  void count_energy() {
    using Meter = RankTimes::Meter;
    if (!placement_.counts_energy) return worker_->count_energy(Meter::kAnothers, nullptr);
    auto meter = placement_.gpu ? gpu_energy(placement_.mine.gpu) : host_energy();
    const auto how = meter ? Meter::kCounted : Meter::kAbsent;
    worker_->count_energy(how, std::move(meter));
  }

  // A wait for the others, for which this rank is not to blame.
  void meet(double seconds, const char* what) {
    progress_.waiting = true;
    world_.barrier(interrupt_, seconds, what);
    progress_.waiting = false;
  }

  std::unique_ptr<WeightSource> open_source() const {
    return open_weights(options_.text("model"), options_.text("stage"));
  }
  double step_seconds() const { return options_.number("step-seconds", 1, 1e6); }

  void make_comms() {
    mailbox_ = world_.make_mailbox();
    all_ = world_.make_comm(interrupt_, &progress_, step_seconds());
    const int rank = world_.rank();
    device_ = choice_.make_comm(interrupt_, &progress_, step_seconds());
    replica_ = device_->split(grid_.replica_of(rank), rank, "replica");
    tensor_ = replica_->split(grid_.stage_of(rank), rank, "tensor");
    pipeline_ = replica_->split(grid_.slot_of(rank), rank, "pipeline");
    feedback_ = replica_->split(grid_.slot_of(rank), rank, "feedback");
    comms_ = {tensor_.get(), pipeline_.get(), feedback_.get()};
  }

  // What steps will send, so that nothing is made in one: sums and gathers within a stage,
  // activations from each stage to the next, sampled ids back to the first.
  void connect_comms(const Architecture& a, const EngineSizes& sizes) {
    const auto rows = static_cast<size_t>(backend_->padded_rows(limits_.step_tokens));
    const size_t activations =
        rows * static_cast<size_t>(a.hidden) * dtype_bytes(backend_->activation_dtype());
    // Act-order gathers a layer's widest input from every slot.
    const size_t widest = rows * static_cast<size_t>(std::max(a.hidden, a.intermediate)) *
                          dtype_bytes(backend_->activation_dtype());
    tensor_->reserve(std::max({activations, widest / static_cast<size_t>(grid_.tp) + 1,
                               static_cast<size_t>(sizes.logit_rows) * sizeof(Candidate)}));
    // Few rows are summed by the backend itself, where the slots' memory is in its reach.
    if (const auto sums = backend_->peer_sums(grid_.tp, a.hidden); sums.rows > 0) {
      tensor_memory_ = tensor_->share(sums.bytes);
      comms_.peers = tensor_memory_.get();
      log::info("sums over tensor slots: {}",
                comms_.peers == nullptr ? std::string("the communicator's, whatever their size")
                                        : fmt::format("up to {} rows over peer memory", sums.rows));
    }
    // One message a group, and one for the step that is planned ahead.
    const int messages = limits_.groups + 1;
    for (int stage = 0; stage + 1 < grid_.pp; ++stage) {
      pipeline_->connect(stage, stage + 1, activations, messages);
    }
    if (grid_.pp > 1) {
      feedback_->connect(grid_.pp - 1, 0,
                         static_cast<size_t>(limits_.step_tokens) * sizeof(int32_t), messages);
    }
  }

  RankParts own_parts() {
    return {world_,
            interrupt_,
            *backend_,
            *all_,
            choice_.threads,
            choice_.gpu,
            decoder_->step_weight_bytes()};
  }

  void measure() {
    progress_.enter("measuring the machine", 120);
    RankParts mine = own_parts();
    parts_.measure(mine);
  }

  size_t kv_bytes() const {
    return KvCache::page_bytes(kv_, shard_.layers.size()) * static_cast<size_t>(kv_.pages);
  }

  ExitCode serve() {
    if (world_.rank() != 0) {
      worker_->run();
      return ExitCode::kOk;
    }
    // Rank 0: the worker and the leader have threads of their own, LoadGen has this one.
    std::promise<void> ended;
    std::thread worker([this, &ended] {
      trace::name_thread("worker");
      try {
        worker_->run();
      } catch (const Error& e) {
        interrupt_.raise(e.code(),
                         fmt::format("rank 0 ({}): {}", progress_.phase.load(), e.what()));
      } catch (const std::exception& e) {
        interrupt_.raise(ExitCode::kInternal, fmt::format("rank 0: {}", e.what()));
      }
      ended.set_value();
    });
    // The worker has the rank's cores; LoadGen and the leader go where there is room.
    unbind(placement_);
    ExitCode code = ExitCode::kOk;
    try {
      Leader leader(*mailbox_, grid_, limits_, interrupt_, step_seconds());
      Job job{world_,
              grid_,
              *source_,
              leader,
              interrupt_,
              limits_,
              backend_->name(),
              options_.text("kv"),
              choice_.activations,
              pages_json(),
              settings(),
              versions(),
              [this] { give_up(interrupt_); }};
      job.versions["backend"] = backend_->description();
      code = parts_.body(job);
      leader.stop();
    } catch (const Error& e) {
      interrupt_.raise(e.code(), e.what());
    } catch (const std::exception& e) {
      interrupt_.raise(ExitCode::kInternal, e.what());
    }
    // A worker that hangs is not waited for; the results are on disk.
    if (interrupt_.raised() &&
        ended.get_future().wait_for(std::chrono::seconds(1)) != std::future_status::ready) {
      give_up(interrupt_);
    }
    worker.join();
    interrupt_.check();
    return code;
  }

  Json pages_json() const {
    return {{"count", kv_.pages}, {"tokens", kv_.page_tokens}, {"bytes_per_rank", kv_bytes()}};
  }
  Json settings() const {
    Json values;
    for (const auto& [name, value] : options_.values()) values[name] = value;
    values["max-positions"] = limits_.max_positions;
    values["groups"] = limits_.groups;
    return values;
  }

  void report_memory() {
    const MemoryReport mine{decoder_->weight_bytes(), kv_bytes(), peak_rss_bytes()};
    std::vector<MemoryReport> everybody(static_cast<size_t>(world_.size()));
    all_->all_gather(&mine, everybody.data(), sizeof(mine), nullptr);
    if (world_.rank() != 0) return;
    std::cout << fmt::format("{:>5} {:>14} {:>14} {:>14}\n", "rank", "weights MiB", "KV pool MiB",
                             "peak RSS MiB");
    const auto mib = [](uint64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
    for (size_t r = 0; r < everybody.size(); ++r) {
      const auto& m = everybody[r];
      std::cout << fmt::format("{:>5} {:>14.1f} {:>14.1f} {:>14.1f}\n", r, mib(m.weights),
                               mib(m.kv), mib(m.peak_rss));
    }
    std::cout.flush();
  }

  const Options& options_;
  const JobParts& parts_;
  World& world_;
  Interrupt& interrupt_;
  Progress& progress_;
  Grid grid_;
  Shard shard_;
  ReplicaLimits limits_;
  KvShape kv_;
  std::unique_ptr<WeightSource> source_;
  PlacedRank placement_;
  BackendChoice choice_;
  Backend* backend_ = nullptr;  // choice_'s
  std::unique_ptr<Comm> all_;   // host memory
  std::unique_ptr<Comm> device_, replica_, tensor_, pipeline_, feedback_;
  std::unique_ptr<Comm> host_peers_, peers_;  // the ranks that own this shard: weights
  std::unique_ptr<PeerMemory> tensor_memory_;
  ShardComms comms_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Mailbox> mailbox_;
  std::unique_ptr<Worker> worker_;
};

}  // namespace

int run_ranks(const std::function<ExitCode(World&, Interrupt&, Progress&)>& body,
              const std::function<void(bool)>& release) {
  install_signal_handlers();
  refuse(singletons_before_mpi());
  World world;
  refuse(find_singletons(world.size()));
  Interrupt interrupt;
  Progress progress;
  auto watchdog = world.make_watchdog(interrupt, progress);
  auto code = ExitCode::kOk;
  try {
    code = body(world, interrupt, progress);
  } catch (const Error& e) {
    interrupt.raise(e.code(),
                    fmt::format("rank {} ({}): {}", world.rank(), progress.phase.load(), e.what()));
  } catch (const std::exception& e) {
    interrupt.raise(ExitCode::kInternal,
                    fmt::format("rank {} ({}): {}", world.rank(), progress.phase.load(), e.what()));
  }
  progress.enter("leaving", 60);
  if (interrupt.raised()) {
    const auto first = watchdog->first_cause(0.5);
    code = first.code;
    tell(first.text, first.code, world.rank() == 0 || !first.agreed);
  }
  // A lost peer never says goodbye; whoever failed in the same way everywhere does.
  const bool lost = code == ExitCode::kLostPeer;
  const bool together = watchdog->leave(code == ExitCode::kOk ? 5.0 : lost ? 0.5 : 2.5);
  log::flush();
  if (interrupt.raised()) abort_all_nccl();  // GPUs may wait for a peer that is gone
  // MPI_Finalize would wait for a lost peer, and for mpirun while it sleeps before it kills.
  if (!together || interrupt.raised()) std::_Exit(static_cast<int>(code));
  release(interrupt.raised());
  watchdog.reset();
  return static_cast<int>(code);
}

int run_job(const Options& options, const JobParts& parts) {
  std::unique_ptr<Rank> rank;
  return run_ranks(
      [&](World& world, Interrupt& interrupt, Progress& progress) {
        rank = std::make_unique<Rank>(options, parts, world, interrupt, progress);
        return rank->run();
      },
      [&](bool failed) {
        if (failed) {
          (void)rank.release();  // posted receives still point into it
        } else {
          rank.reset();
        }
      });
}

Json versions() {
  return {{"drover", version::kDrover},    {"commit", version::kCommit},
          {"build", version::kBuildType},  {"compiler", version::kCompiler},
          {"loadgen", loadgen_version()},  {"mpi", mpi_version()},
          {"nccl", nccl_version()},        {"hdf5", hdf5_version()},
          {"backends", backend_versions()}};
}

}  // namespace drover
