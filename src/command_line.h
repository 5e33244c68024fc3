// The options of the subcommands: one line each, name, default, help.
#pragma once

#include <span>
#include <vector>

#include "base/options.h"

namespace drover {

// Those of every subcommand that starts the engine.
std::vector<OptionRow> engine_options();
std::vector<OptionRow> run_options();           // drover run
std::vector<OptionRow> generate_options();      // drover generate
std::vector<OptionRow> logits_options();        // drover logits
std::vector<OptionRow> doctor_options();        // drover doctor
std::vector<OptionRow> topology_options();      // drover topology
std::vector<OptionRow> bench_step_options();    // drover bench step
std::vector<OptionRow> bench_linear_options();  // drover bench linear
std::vector<OptionRow> bench_tune_options();
std::vector<OptionRow> bench_attention_options();  // drover bench attention
std::vector<OptionRow> bench_comm_options();       // drover bench comm

}  // namespace drover
