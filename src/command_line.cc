#include "command_line.h"

namespace drover {

namespace {

std::vector<OptionRow> join(std::vector<OptionRow> a, const std::vector<OptionRow>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace

std::vector<OptionRow> engine_options() {
  return {
      {"model", "", "model store (HDF5), or synthetic:NAME[:seed]"},
      {"tp", "1", "tensor-parallel slots of a stage (0: what is left)"},
      {"pp", "1", "pipeline stages (0: what is left)"},
      {"dp", "0", "replicas (0: what is left)"},
      {"topology", "", "INI file whose [grid] gives tp, pp and dp where they are not given here"},
      {"backend", "auto", "auto (a GPU for each rank where there are GPUs), cpu or cuda"},
      {"activations", "auto",
       "inputs of INT4 layers: bf16, fp8 (e4m3, a scale per token), f32 (CPU; exact, slower); "
       "auto: "
       "fp8 on Hopper, else bf16"},
      {"kv", "fp8", "KV cache: fp8 (e4m3, a scale per token and head), bf16 or f32"},
      {"kv-memory", "",
       "bytes of KV cache per rank, such as 2GiB (empty: what the sequences need, at most what the "
       "GPU has left; CPU: a fifth of the host's memory shared by its ranks)"},
      {"gpu-memory-fraction", "0.94", "of a GPU's free memory: what drover may take"},
      {"tuning", "",
       "file of `drover bench tune` that says how linears run on this GPU (empty: a built-in "
       "rule)"},
      {"share-gpu", "no", "let ranks share a GPU (slow: they communicate through the host)"},
      {"page-tokens", "16", "tokens of a KV page"},
      {"max-sequences", "0",
       "sequences at once per replica (0: 64 on the CPU, what the KV cache suits on a GPU)"},
      {"max-length", "0", "longest sequence, prompt and answer (0: what the model allows)"},
      {"step-tokens", "0", "rows of one step at most (0: 256 on the CPU, 2048 on a GPU)"},
      {"chunk-tokens", "0",
       "rows of one prompt's chunk at most (0: 128 on the CPU, 2048 on a GPU)"},
      {"graphs", "yes", "GPU: record decode steps as CUDA graphs"},
      {"groups", "0", "groups of sequences in flight (0: one for each stage)"},
      {"batching", "continuous", "continuous, or static (a batch ends before the next begins)"},
      {"threads", "0", "threads of a CPU rank (0: the host's cores shared by its ranks)"},
      {"bind", "yes", "run a rank on its share of the cores that several ranks were given"},
      {"print-placement", "no", "print each rank's host, GPU, cores, NUMA node and NIC, and end"},
      {"stage", "", "folder on a local disk: the store is copied there first"},
      {"step-seconds", "60", "longest wait for one step before the run is given up"},
      {"load-seconds", "1800", "longest wait for all ranks to load"},
      {"trace", "", "write a trace of all ranks, host and device, to this file (Perfetto, Chrome)"},
      {"report-memory", "no", "print weights, KV and peak memory of every rank at the end"},
      {"log-level", "info", "debug, info, warn or error"},
      {"config", "", "file of key = value lines with these same keys"},
      {"help", "no", "print this"},
  };
}

std::vector<OptionRow> run_options() {
  return join(
      {
          {"dataset", "", "dataset (HDF5), or synthetic:openorca[:n] or synthetic:INxOUT[:n]"},
          {"scenario", "offline", "offline, server, interactive or singlestream"},
          {"mode", "performance", "performance, accuracy, or both with a comma, in that order"},
          {"out", "", "folder of the results"},
          {"force", "no", "replace results that are there"},
          {"resume", "",
           "an earlier run's --out folder: its finished accuracy samples are taken over (with "
           "--mode "
           "accuracy; the same model, data and options)"},
          {"stop-seconds", "60",
           "after SIGUSR1: longest time that an accuracy run's running sequences get to end"},
          {"samples", "0", "use the first so many samples (0: all)"},
          {"copies", "1", "Offline with --demo: take them so many times over (weak scaling)"},
          {"max-new-tokens", "1024", "longest answer"},
          {"demo", "no", "short run: the set's size decides, not MLPerf's minimum length"},
          {"benchmark", "",
           "LoadGen's name of the benchmark: llama2-70b, ... (empty: drover-demo "
           "with --demo, else llama2-70b)"},
          {"user-conf", "", "LoadGen's user.conf"},
          {"audit-conf", "", "LoadGen's audit.config (a compliance test)"},
          {"target-qps", "0",
           "queries a second: Server issues them, Offline sizes the run by them"},
          {"ttft-ms", "0", "limit on the time to first token with --demo (0: the scenario's)"},
          {"tpot-ms", "0", "limit on the time per output token with --demo (0: the scenario's)"},
          {"sort", "yes", "Offline: longest prompts first within what is queued"},
          {"warmup", "4", "sequences run before the clock starts"},
          {"progress", "yes", "show progress"},
      },
      engine_options());
}

std::vector<OptionRow> generate_options() {
  return join(
      {
          {"text", "", "a question, put through the store's chat template"},
          {"dataset", "", "dataset whose samples are answered"},
          {"samples", "", "sample numbers, with commas"},
          {"tokens", "", "JSON file: a list of lists of token ids"},
          {"json", "", "write prompts, token ids and text to this file"},
          {"max-new-tokens", "64", "longest answer"},
          {"one-by-one", "no", "each alone instead of all in one batch"},
      },
      engine_options());
}

std::vector<OptionRow> bench_step_options() {
  return join(
      {
          {"prompt-tokens", "128", "random tokens of each prompt"},
          {"new-tokens", "64", "answer of each sequence, hidden from the scheduler"},
          {"batches", "1,8,64", "sequences at once (over all replicas), with commas"},
          {"repeat", "3", "repetitions; the median is told"},
          {"budget", "no",
           "a table of where each microsecond of a step goes, by operation (recording costs time)"},
          {"json", "", "write all figures to this file"},
          {"floor-prompt", "0", "prompt tokens/s below which a batch makes the exit status 5"},
          {"floor-decode", "0", "decode tokens/s below which a batch makes the exit status 5"},
      },
      engine_options());
}

namespace {

// Of the benches of single operations.
std::vector<OptionRow> device_options() {
  return {
      {"model", "synthetic:llama2-70b", "model store, or synthetic:NAME[:seed]"},
      {"tp", "1", "shapes of a rank of so many tensor-parallel slots"},
      {"backend", "auto", "auto, cpu or cuda"},
      {"activations", "auto", "inputs of INT4 layers: bf16, fp8, f32 (CPU)"},
      {"threads", "0", "threads of the CPU (0: all cores)"},
      {"share-gpu", "no", "let ranks share a GPU"},
      {"steady", "0", "seconds of load before each figure (a GPU's clock falls under load)"},
      {"json", "", "write all figures to this file"},
      {"help", "no", "print this"},
  };
}

}  // namespace

std::vector<OptionRow> bench_linear_options() {
  return join({{"rows", "1,16,64,256,1024,2048", "tokens of a step, with commas"},
               {"tuning", "", "file of `drover bench tune` (empty: the built-in rule)"}},
              device_options());
}

std::vector<OptionRow> bench_tune_options() {
  return join({{"rows", "1,8,16,32,64,96,128,192,256,384,512,768,1024,1536,2048",
                "tokens of a step, with commas: each choice holds from the last one up to its own"},
               {"out", "", "the file; what it has of other shapes stays"}},
              device_options());
}

std::vector<OptionRow> bench_attention_options() {
  return join(
      {
          {"sequences", "1,64,256", "sequences of a step, with commas"},
          {"context", "512", "tokens of each, with commas"},
          {"rows", "1", "of these, rows in the step: 1 decodes"},
          {"kv", "fp8", "KV cache: fp8, bf16 or f32"},
          {"page-tokens", "16", "tokens of a KV page"},
      },
      device_options());
}

std::vector<OptionRow> bench_comm_options() {
  return {
      {"tp", "0", "tensor-parallel slots of a stage (0: what is left)"},
      {"pp", "1", "pipeline stages (0: what is left)"},
      {"dp", "1", "replicas (0: what is left)"},
      {"over", "tensor", "communicator to measure: tensor or pipeline"},
      {"backend", "cpu",
       "where the buffers are: cpu (MPI), or cuda (NCCL; MPI where ranks share a GPU)"},
      {"sizes", "64,2304,18432,147456,589824,4194304", "bytes of each rank's buffer, with commas"},
      {"seconds", "0.5", "longest time of one measurement"},
      {"json", "", "write all figures to this file"},
      {"help", "no", "print this"},
  };
}

std::vector<OptionRow> doctor_options() {
  return {
      {"model", "", "model store that a job would read: its file system"},
      {"pairs", "yes", "latency and bandwidth between all pairs of ranks, over MPI"},
      {"backend", "auto", "what ranks would compute on: auto, cpu or cuda"},
      {"share-gpu", "yes", "look on where ranks would share a GPU (told as bad)"},
      {"json", "", "write all of it to this file"},
      {"help", "no", "print this"},
  };
}

std::vector<OptionRow> topology_options() {
  return {
      {"file", "", "the file to write (empty: it is printed), or without --detect to check"},
      {"detect", "no", "describe the machine at hand; under mpirun also what is between ranks"},
      {"measure", "yes", "measure the cores' rates and the messages of ranks (some seconds)"},
      {"backend", "auto", "auto (GPUs where there are any) or cpu"},
      {"threads", "0", "threads of a rank while it measures (0: the host's cores, shared)"},
      {"activations", "bf16", "what the cores' linears are measured with"},
      {"share-gpu", "no", "let ranks share a GPU"},
      {"force", "no", "replace a file that is there"},
      {"help", "no", "print this"},
  };
}

std::vector<OptionRow> logits_options() {
  return join(
      {
          {"tokens", "", "JSON file: a list of {\"tokens\": [ids], \"from\": first position}"},
          {"out", "", "folder for logits.f32 (raw) and index.json"},
      },
      engine_options());
}

}  // namespace drover
