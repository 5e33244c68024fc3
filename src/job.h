// The wiring: options, MPI, grid, backend, communicators, leader and worker, and how they end.
#pragma once

#include <functional>
#include <string>

#include "backend/backend.h"
#include "base/interrupt.h"
#include "base/json.h"
#include "base/options.h"
#include "comm/grid.h"
#include "comm/world.h"
#include "model/weights.h"
#include "sched/scheduler.h"
#include "serve/leader.h"

namespace drover {

// What rank 0 may use once all ranks have loaded.
struct Job {
  World& world;
  const Grid& grid;
  WeightSource& source;
  Leader& leader;
  Interrupt& interrupt;
  const ReplicaLimits& limits;
  std::string backend;      // "cpu"
  std::string kv;           // "fp8"
  std::string activations;  // "bf16"
  Json pages;               // count, tokens, bytes of a rank
  Json settings;            // the resolved options
  Json versions;
  std::function<void()> give_up;  // ends the process with the interrupt's cause
};

// What each rank may use for measurements of its own, between loading and serving.
struct RankParts {
  World& world;
  const Interrupt& interrupt;
  Backend& backend;
  Comm& all;        // every rank
  int threads = 1;  // of this rank
  bool gpu = false;
  size_t step_weight_bytes = 0;  // what each step reads of the weights on this rank
};

struct JobParts {
  std::string log_dir;  // a log file for each rank; empty: none
  QueueOrder order = QueueOrder::kArrival;
  std::function<void()> prepare;            // rank 0, before anything expensive; may be null
  std::function<void(RankParts&)> measure;  // every rank, once all have loaded; may be null
  std::function<ExitCode(Job&)> body;       // rank 0, on the main thread
  size_t trace_events = 0;                  // recorded though there is no --trace; 0: only with it
  std::function<void(RankParts&)> after;    // every rank, once all is served; may be null
};

// Runs the job on all ranks and returns the exit code, the same on each.
// Rank 0 prints the first cause of a failure; every rank logs it.
int run_job(const Options& options, const JobParts& parts);

// The frame of run_job: MPI, watchdog, one exit code and first cause for all ranks. `release`, told
// whether the body failed, frees what it made with communicators once all ranks have left it (it is
// not called when MPI cannot be finalized any more). After a failure messages may still be under
// way: buffers must then be left alone.
int run_ranks(const std::function<ExitCode(World&, Interrupt&, Progress&)>& body,
              const std::function<void(bool failed)>& release);

Json versions();  // drover, build, MPI, HDF5, LoadGen, oneDNN

}  // namespace drover
