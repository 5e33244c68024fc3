// What `drover bench --json` wrote, as observations of a machine's rates.
#pragma once

#include <string>
#include <vector>

#include "base/json.h"
#include "plan/calibrate.h"
#include "plan/topology.h"

namespace drover {

// A model, its number formats, and what a bench file of it must agree with.
struct PlannedModel {
  std::string name;
  Architecture arch;
  int group = 0;  // of the quantization
  bool gpu = false;
  std::string activations;  // "fp8", "bf16" or "f32"
  std::string kv;
};
NumberSizes number_sizes(const PlannedModel& m);

// One file of `drover bench step`.
struct StepBenchFile {
  std::string file;
  Grid grid;
  ReplicaLimits limits;
  int threads = 1;  // of a rank
  int prompt_tokens = 0, new_tokens = 0;
  struct Figure {
    int batch = 0;
    double prompt_rate = 0, step_seconds = 0;
    double noise = 0;  // relative, between repetitions
  };
  std::vector<Figure> figures;
};

// All files of one kind of machine, sorted by what they measured.
struct BenchFiles {
  std::vector<StepBenchFile> steps;
  std::vector<Observation> operations;  // linear, attention, comm
  std::vector<std::string> names;       // of all files
  std::vector<std::string> devices;     // of each, as the backend describes it; may be empty
};

// Throws kBadInput for what is no file of a bench, or has sizes or rates that cannot be; kUsage for
// one of another model or of other number formats, naming both.
BenchFiles read_bench_files(const std::vector<std::string>& files, const PlannedModel& model);

// Two observations for each batch of a step file: the rate of prompts and the time of a decode
// step. `scaled` turns the rates that are fitted into those of a rank of that file.
std::vector<Observation> step_observations(const StepBenchFile& file, const PlannedModel& model,
                                           const std::function<Rates(const Rates&)>& scaled);

}  // namespace drover
