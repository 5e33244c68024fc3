#include "serve/resume.h"

#include <filesystem>
#include <fstream>

#include "base/log.h"
#include "base/sha256.h"
#include "serve/sut.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

std::string text_of(const Json& j) { return j.is_string() ? j.get<std::string>() : j.dump(); }

std::string build_of(const RunFacts& facts) {
  const Json& v = facts.versions;
  if (!v.is_object()) return "";
  return v.value("drover", "?") + " " + v.value("commit", "");
}

// What differs, in words; empty: nothing.
std::string differences(const Json& here, const Json& there, bool inputs) {
  std::string out;
  const auto note = [&](const std::string& key, const std::string& mine, const std::string& other) {
    const bool input = key == "model" || key == "dataset";
    if (mine == other || input != inputs) return;
    out += fmt::format("{}{} is {} here and {} there", out.empty() ? "" : "; ", key, mine, other);
  };
  for (const auto& [key, value] : here.items()) {
    note(key, text_of(value), there.contains(key) ? text_of(there.at(key)) : "not known");
  }
  for (const auto& [key, value] : there.items()) {
    if (!here.contains(key)) note(key, "not known", text_of(value));
  }
  return out;
}

Json read_identity(const std::string& file) {
  DROVER_CHECK(fs::exists(file), ExitCode::kBadInput,
               "{} is not there: an accuracy run writes it before its first sample, so this is no "
               "folder that can be resumed",
               file);
  const Json j = read_json(file);
  const bool whole = j.is_object() && j.contains("identity") && j.at("identity").is_object() &&
                     j.value("hash", "") == identity_hash(j.at("identity"));
  DROVER_CHECK(whole, ExitCode::kBadInput,
               "{}: its hash is not that of what it holds: the file was changed or is damaged; run "
               "without --resume",
               file);
  return j;
}

// One line; false: damaged. Throws when it is another run's.
bool read_line(const std::string& line, const std::string& run, size_t samples, int32_t vocab,
               const std::string& where, KnownSamples& out) {
  const Json j = Json::parse(line, nullptr, false);
  if (!j.is_object()) return false;
  try {
    DROVER_CHECK(j.value("run", "") == run && j.value("pass", "") == "accuracy",
                 ExitCode::kBadInput,
                 "{}: a line of another run ({} {}, expected accuracy {}): this journal is not the "
                 "one of identity.json beside it",
                 where, j.value("pass", "no pass"), j.value("run", "of no run"), run);
    KnownSample s;
    const auto index = j.at("sample").get<uint64_t>();
    s.tokens = j.at("tokens").get<std::vector<int32_t>>();
    s.by_eos = j.at("by_eos").get<bool>();
    s.ttft_ms = j.at("ttft_ms").get<double>();
    s.latency_ms = j.at("latency_ms").get<double>();
    if (index >= samples || s.tokens.empty() || j.at("n_tokens") != s.tokens.size()) return false;
    if (j.at("hash") != fmt::format("{:016x}", hash_tokens(s.tokens.data(), s.tokens.size()))) {
      return false;
    }
    for (const int32_t t : s.tokens)
      if (t < 0 || (vocab > 0 && t >= vocab)) return false;
    out.emplace(static_cast<uint32_t>(index), std::move(s));
  } catch (const Json::exception&) {
    return false;
  }
  return true;
}

}  // namespace

Json run_identity(const ServeOptions& o, const RunFacts& facts, size_t samples) {
  Json j;
  j["model"] = facts.model.is_object() ? facts.model.value("fingerprint", "") : "";
  j["dataset"] = facts.dataset.is_object() ? facts.dataset.value("fingerprint", "") : "";
  j["samples"] = samples;
  j["max-new-tokens"] = o.max_new_tokens;
  j["min-new-tokens"] = o.min_new_tokens;
  j["scenario"] = to_string(o.scenario);
  j["benchmark"] = o.model_name;
  j["backend"] = facts.backend;
  j["activations"] = facts.activations;
  j["kv"] = facts.kv;
  if (facts.shape.is_object())
    for (const auto& [key, value] : facts.shape.items()) j[key] = value;
  return j;
}

std::string identity_hash(const Json& identity) {
  return sha256_hex(identity.dump()).substr(0, 16);
}

void write_identity(const std::string& pass_dir, const Json& identity, const RunFacts& facts) {
  write_json(pass_dir + "/identity.json", {{"format", "drover-identity"},
                                           {"format_version", 1},
                                           {"hash", identity_hash(identity)},
                                           {"identity", identity},
                                           {"build", build_of(facts)}});
}

void check_resume(const ServeOptions& o) {
  if (o.resume_from.empty()) return;
  DROVER_CHECK(o.modes == std::vector<Mode>{Mode::kAccuracy}, ExitCode::kUsage,
               "--resume goes on with an accuracy run, and performance runs are never resumed: add "
               "--mode accuracy, and run the performance pass by itself");
  DROVER_CHECK(fs::is_directory(o.resume_from), ExitCode::kBadInput,
               "{}: no such folder; --resume names the --out folder of the run to go on with",
               o.resume_from);
  std::error_code ec;
  const auto from = fs::weakly_canonical(o.resume_from, ec),
             to = fs::weakly_canonical(o.out_dir, ec);
  DROVER_CHECK(from != to, ExitCode::kUsage,
               "--resume and --out are both {}: what is finished there stays as it is; choose "
               "another --out folder",
               o.out_dir);
  const std::string journal = o.resume_from + "/accuracy/journal.jsonl";
  DROVER_CHECK(fs::is_regular_file(journal), ExitCode::kBadInput,
               "{} is not there: no accuracy run has begun in that folder, so there is nothing to "
               "resume; run without --resume",
               journal);
}

EarlierRun read_earlier_run(const std::string& folder, const Json& identity, size_t samples,
                            int32_t vocab) {
  const Json there = read_identity(folder + "/accuracy/identity.json");
  for (const bool inputs : {true, false}) {
    const std::string what = differences(identity, there.at("identity"), inputs);
    DROVER_CHECK(what.empty(), inputs ? ExitCode::kBadInput : ExitCode::kUsage,
                 "--resume {}: {}: its answers would not be this run's; give the same {}, or run "
                 "without --resume",
                 folder, what, inputs ? "model and dataset" : "options");
  }
  EarlierRun run;
  run.folder = folder;
  run.build = there.value("build", "");
  const std::string file = folder + "/accuracy/journal.jsonl";
  std::ifstream in(file, std::ios::binary);
  DROVER_CHECK(in.good(), ExitCode::kBadInput, "{}: cannot be read", file);
  std::string line;
  size_t number = 0;
  while (std::getline(in, line)) {
    ++number;
    // Only a line with its newline was written whole.
    const bool torn = in.eof();
    if (torn || !read_line(line, identity_hash(identity), samples, vocab,
                           fmt::format("{}:{}", file, number), run.samples))
      ++run.damaged;
  }
  DROVER_CHECK(!in.bad(), ExitCode::kBadInput, "{}: reading failed after line {}", file, number);
  DROVER_CHECK(!run.samples.empty() || run.damaged < 2, ExitCode::kBadInput,
               "{}: none of its {} lines is a finished sample: this is no journal of drover's",
               file, number);
  return run;
}

}  // namespace drover
