// One run under MLPerf's LoadGen: warm-up, the performance pass, the accuracy pass, the results.
// No LoadGen type leaves this room.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/interrupt.h"
#include "base/json.h"
#include "serve/request_sink.h"
#include "store/store.h"

namespace drover {

enum class Scenario : uint8_t { kOffline, kServer, kInteractive, kSingleStream };
enum class Mode : uint8_t { kPerformance, kAccuracy };

const char* to_string(Scenario scenario);  // "offline", "server", "interactive", "singlestream"
const char* to_string(Mode mode);          // "performance", "accuracy"
Scenario parse_scenario(const std::string& text);        // kUsage, naming the choices
std::vector<Mode> parse_modes(const std::string& text);  // "performance,accuracy"; kUsage

struct ServeOptions {
  Scenario scenario = Scenario::kOffline;
  std::vector<Mode> modes{Mode::kPerformance, Mode::kAccuracy};  // in this order, each at most once
  size_t samples = 0;             // the first so many of the dataset; 0: all
  int32_t max_new_tokens = 1024;  // at least 2 where LoadGen measures token latencies
  int32_t min_new_tokens = 1;     // the engine's rule: the first new token is never an end
  std::string out_dir;
  // An earlier run's out_dir, whose finished accuracy samples are taken over; empty: none.
  std::string resume_from;
  bool force = false;  // replace results that are already in out_dir
  // LoadGen's name for the benchmark: mlperf.conf and user.conf are looked up by it. A name that
  // mlperf.conf does not know gets the token latencies and equal issue of its LLM benchmarks.
  std::string model_name = "drover-demo";
  std::string user_conf;   // may be empty
  std::string audit_conf;  // LoadGen's audit.config; empty: none, wherever one may lie
  // Short run: as many queries as samples (Server and SingleStream: as many as LoadGen's early
  // stopping needs), no shortest duration. Marked as not of MLPerf length.
  bool demo = false;
  size_t copies = 1;          // Offline with `demo`: the set so many times over
  double target_qps = 0;      // 0: user.conf's, or LoadGen's own. SingleStream: 1 / latency
  double ttft_limit_ms = 0;   // demo and names unknown to mlperf.conf; 0: Llama-2-70B's
  double tpot_limit_ms = 0;   // likewise
  int warmup_requests = 4;    // before the clock starts; one has the longest prompt; 0: none
  int32_t warmup_tokens = 4;  // new tokens of each
  bool progress = true;       // to standard error
  // Asked to stop in an accuracy pass: longest time that running sequences get to end.
  double stop_seconds = 60;
  // In Server, LoadGen sleeps until its next arrival and nothing can wake it. When it has not come
  // back `stuck_seconds` after the interrupt, the results are written with the cause and this is
  // called, on a thread of the session's: it should end the process. Empty: the sleep is awaited.
  double stuck_seconds = 3;
  std::function<void()> on_stuck;
};

// What only main knows; written into the results as it is.
struct RunFacts {
  std::string grid;         // "tp 3 x pp 2 x dp 1"
  std::string backend;      // "cpu"
  std::string kv;           // "fp8"
  std::string activations;  // "f32"
  Json pages;               // count, tokens of one, bytes
  Json model;               // name, architecture, quantization, fingerprint, calibration set ...
  Json dataset;             // name, fingerprint, file ...
  bool synthetic_model = false;
  Json shape;     // what else answers depend on: tp, pp, the longest sequence
  Json settings;  // scheduler and anything else worth telling (may be null)
  Json versions;  // drover, MPI, HDF5 ...; LoadGen's is added
  std::string command_line;
};

// Before anything expensive: on rank 0 at start-up. Creates out_dir. Throws kUsage when it holds
// results and `force` is not set (with it they are removed), kEnvironment when it cannot be
// written to, kUsage or kBadInput for options that cannot work (checks all that need no dataset).
void prepare_out_dir(const ServeOptions& options);

// When the interrupt is asked to stop, the pass ends at a safe point: nothing more is issued or
// admitted, an accuracy pass's running sequences get `stop_seconds` to end, a performance pass's
// are dropped after the step. What is finished is written, valid = false, and kInvalidResult
// returned.
//
// Call once a process, from the main thread, after prepare_out_dir: LoadGen issues queries from
// the calling thread. kOk when every pass is valid, else kInvalidResult. When the interrupt is
// raised the passes end early, what there is gets written with valid = false and the cause, and
// the cause is thrown: within half a second, but for the sleep told of at on_stuck.
ExitCode run_session(RequestSink& sink, Dataset& dataset, const ServeOptions& options,
                     const RunFacts& facts, Interrupt& interrupt);

std::string loadgen_version();

}  // namespace drover
