// drover logits: teacher-forced logits of given tokens, for comparisons between runs.
#include <fmt/format.h>

#include <filesystem>
#include <fstream>
#include <iostream>

#include "command_line.h"
#include "commands.h"
#include "job.h"

namespace drover {

namespace {

struct Sequence {
  std::vector<int32_t> tokens;
  int32_t from = 0;
  uint64_t place = 0;  // first row of the file
};

std::vector<Sequence> read_sequences(const std::string& file, int32_t vocab) {
  std::vector<Sequence> all;
  uint64_t rows = 0;
  for (const auto& item : read_json(file)) {
    Sequence s;
    try {
      s.tokens = item.at("tokens").get<std::vector<int32_t>>();
      s.from = item.value("from", 0);
    } catch (const Json::exception& e) {
      DROVER_FAIL(ExitCode::kBadInput,
                  "{}: expected a list of {{\"tokens\": [ids], \"from\": position}}: {}", file,
                  e.what());
    }
    DROVER_CHECK(s.from >= 0 && s.from < static_cast<int32_t>(s.tokens.size()), ExitCode::kBadInput,
                 "{}: sequence {}: from {} of {} tokens", file, all.size(), s.from,
                 s.tokens.size());
    for (int32_t t : s.tokens) {
      DROVER_CHECK(t >= 0 && t < vocab, ExitCode::kBadInput,
                   "{}: sequence {}: token id {} is not of the vocabulary of {}", file, all.size(),
                   t, vocab);
    }
    s.place = rows;
    rows += s.tokens.size() - static_cast<size_t>(s.from);
    all.push_back(std::move(s));
  }
  return all;
}

ExitCode logits(const Options& o, Job& job) {
  const auto vocab = job.source.architecture().vocab;
  const auto sequences = read_sequences(o.text("tokens"), vocab);
  std::filesystem::create_directories(o.text("out"));
  const std::string file = o.text("out") + "/logits.f32";
  std::ofstream out(file, std::ios::binary | std::ios::trunc);
  DROVER_CHECK(out.good(), ExitCode::kEnvironment, "{} cannot be written", file);

  LeaderEvents events;
  events.logits = [&](LogitsBlock&& block) {
    const auto& s = sequences[block.id];
    if (block.start < s.from) return;
    const uint64_t row = s.place + static_cast<uint64_t>(block.start - s.from);
    out.seekp(static_cast<std::streamoff>(row * static_cast<uint64_t>(vocab) * sizeof(float)));
    out.write(reinterpret_cast<const char*>(block.logits.data()),
              static_cast<std::streamsize>(block.logits.size() * sizeof(float)));
  };
  job.leader.listen(std::move(events));
  std::vector<Request> requests;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Request r;
    r.id = i;
    r.prompt = sequences[i].tokens;
    r.max_new_tokens = 1;
    r.want_logits = true;
    requests.push_back(std::move(r));
  }
  job.leader.submit(std::move(requests));
  job.leader.drain();
  out.close();
  DROVER_CHECK(!out.fail(), ExitCode::kEnvironment, "{}: writing failed: is the disk full?", file);
  Json index{{"vocab", vocab}, {"sequences", Json::array()}};
  for (const auto& s : sequences) {
    index["sequences"].push_back({{"row", s.place},
                                  {"from", s.from},
                                  {"rows", s.tokens.size() - static_cast<size_t>(s.from)}});
  }
  write_json(o.text("out") + "/index.json", index);
  return ExitCode::kOk;
}

}  // namespace

int logits_command(const std::vector<std::string>& arguments) {
  const auto table = logits_options();
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  DROVER_CHECK(!o.text("tokens").empty() && !o.text("out").empty(), ExitCode::kUsage,
               "drover logits needs --tokens FILE and --out DIR");
  JobParts parts;
  parts.body = [&](Job& job) { return logits(o, job); };
  return run_job(o, parts);
}

}  // namespace drover
