// LoadGen's settings from drover's options. Only for src/serve: it includes LoadGen.
#pragma once

#include <cstdint>
#include <string>

#include "serve/session.h"
#include "test_settings.h"

namespace drover {

struct LoadgenPlan {
  mlperf::TestSettings settings;  // mode as of the performance pass
  bool known_benchmark = false;   // mlperf.conf has token latencies for this name
  bool whole_set = true;          // not fewer samples than mlperf.conf has for this name
  double ttft_limit_ms = 0;       // in force; 0 in Offline and SingleStream
  double tpot_limit_ms = 0;
  std::string departures;       // how user.conf departs from mlperf.conf's limits; or empty
  size_t expected_queries = 0;  // of the performance pass, about; for the progress display
};

// LoadGen's name of the scenario: Interactive is Server with other limits.
const char* loadgen_scenario(Scenario scenario);

// The user.conf that LoadGen will read: the user's own, then drover's lines. `samples`: the set's.
std::string compose_user_conf(const ServeOptions& options, size_t samples);

// Reads mlperf.conf and `user_conf_file`. Once a process (LoadGen counts). Throws kBadInput when
// LoadGen cannot read the file, kUsage when the options cannot work under LoadGen's rules.
LoadgenPlan make_loadgen_plan(const ServeOptions& options, const std::string& user_conf_file,
                              size_t samples);

}  // namespace drover
