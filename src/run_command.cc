// drover run: the benchmark.
#include <fmt/format.h>

#include <cstdlib>
#include <iostream>

#include "base/log.h"
#include "command_line.h"
#include "commands.h"
#include "job.h"
#include "open_dataset.h"
#include "serve/session.h"

namespace drover {

namespace {

ServeOptions serve_options(const Options& o) {
  ServeOptions s;
  s.scenario = parse_scenario(o.text("scenario"));
  s.modes = parse_modes(o.text("mode"));
  s.samples = static_cast<size_t>(o.integer("samples", 0, 1 << 24));
  s.copies = static_cast<size_t>(o.integer("copies", 1, 1 << 20));
  s.max_new_tokens = static_cast<int32_t>(o.integer("max-new-tokens", 1, 1 << 24));
  s.out_dir = o.text("out");
  DROVER_CHECK(!s.out_dir.empty(), ExitCode::kUsage, "--out is missing: a folder for the results");
  DROVER_CHECK(!o.text("dataset").empty(), ExitCode::kUsage,
               "--dataset is missing: give a dataset, or synthetic:openorca");
  s.force = o.flag("force");
  s.resume_from = o.text("resume");
  s.stop_seconds = o.number("stop-seconds", 0, 1e6);
  s.demo = o.flag("demo");
  s.model_name = o.text("benchmark");
  if (s.model_name.empty()) {
    s.model_name = s.demo                                 ? "drover-demo"
                   : s.scenario == Scenario::kInteractive ? "llama2-70b-interactive"
                                                          : "llama2-70b";
  }
  s.user_conf = o.text("user-conf");
  s.audit_conf = o.text("audit-conf");
  s.target_qps = o.number("target-qps", 0, 1e9);
  s.ttft_limit_ms = o.number("ttft-ms", 0, 1e9);
  s.tpot_limit_ms = o.number("tpot-ms", 0, 1e9);
  s.warmup_requests = static_cast<int>(o.integer("warmup", 0, 1 << 20));
  s.progress = o.flag("progress");
  return s;
}

QueueOrder queue_order(const Options& o, Scenario scenario) {
  if (scenario == Scenario::kOffline) {
    return o.flag("sort") ? QueueOrder::kLongest : QueueOrder::kArrival;
  }
  return scenario == Scenario::kSingleStream ? QueueOrder::kArrival : QueueOrder::kDeadline;
}

RunFacts facts(const Options& o, const Job& job, const Dataset& dataset) {
  RunFacts f;
  f.grid = job.grid.text();
  f.backend = job.backend;
  f.kv = job.kv;
  f.activations = job.activations;
  f.pages = job.pages;
  f.model = {{"name", o.text("model")},
             {"architecture", job.source.architecture().summary()},
             {"weights", job.source.description()},
             {"fingerprint", job.source.fingerprint()},
             {"provenance", job.source.provenance()}};
  f.dataset = {{"file", o.text("dataset")},
               {"name", dataset.name()},
               {"samples", dataset.size()},
               {"synthetic", dataset.synthetic()},
               {"fingerprint", dataset.fingerprint()}};
  f.synthetic_model = job.source.synthetic();
  f.shape = {{"tp", job.grid.tp}, {"pp", job.grid.pp}, {"max-length", job.limits.max_positions}};
  f.settings = job.settings;
  f.versions = job.versions;
  return f;
}

}  // namespace

int run_command(const std::vector<std::string>& arguments) {
  const auto table = run_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  if (o.flag("print-placement")) return run_job(o, {});
  ServeOptions serve = serve_options(o);
  JobParts parts;
  parts.log_dir = serve.out_dir + "/logs";
  parts.order = queue_order(o, serve.scenario);
  parts.prepare = [&] { prepare_out_dir(serve); };
  parts.body = [&](Job& job) {
    serve.on_stuck = [&job] {
      log::flush();
      std::_Exit(static_cast<int>(job.interrupt.code()));
    };
    const auto dataset = open_dataset(o.text("dataset"), job.source);
    RunFacts f = facts(o, job, *dataset);
    f.command_line = "drover run";
    for (const auto& a : arguments) f.command_line += " " + a;
    ServeOptions session = serve;
    session.on_stuck = job.give_up;
    return run_session(job.leader, *dataset, session, f, job.interrupt);
  };
  return run_job(o, parts);
}

}  // namespace drover
