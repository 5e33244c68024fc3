// drover generate: the quick look that everyone wants first.
#include <fmt/format.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <map>
#include <mutex>

#include "base/log.h"
#include "command_line.h"
#include "commands.h"
#include "job.h"
#include "open_dataset.h"
#include "store/store.h"

namespace drover {

namespace {

namespace fs = std::filesystem;

struct Prompt {
  std::string title;
  std::vector<int32_t> tokens;
  std::vector<int32_t> answer;
  std::string printed;  // text that is out already
};

// The data tools lie beside the binary: in an installed tree, or in the source tree it was built
// in.
fs::path find_tool(const std::string& name) {
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path();
  for (const auto& folder : {bin / "../share/drover/data", bin / "../../data", bin / "../data"}) {
    if (fs::exists(folder / name)) return fs::weakly_canonical(folder / name);
  }
  DROVER_FAIL(ExitCode::kEnvironment, "data/{} was not found beside {}", name, bin.string());
}

std::string find_python() {
  if (const char* set = std::getenv("DROVER_PYTHON")) return set;
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path();
  for (const auto& venv : {bin / "../venv/bin/python3", bin / "../../build/venv/bin/python3"}) {
    if (fs::exists(venv)) return venv.string();
  }
  return "python3";
}

std::string quoted(const std::string& text) {
  std::string out = "'";
  for (char c : text) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

// Encoding goes through the data tools: a tokenizer library is theirs.
std::vector<int32_t> encode_text(const std::string& text, const std::string& model) {
  const std::string command =
      fmt::format("{} {} --model {} --text {}", quoted(find_python()),
                  quoted(find_tool("encode.py").string()), quoted(model), quoted(text));
  FILE* pipe = popen(command.c_str(), "r");
  DROVER_CHECK(pipe != nullptr, ExitCode::kEnvironment, "cannot start: {}", command);
  std::string output;
  std::array<char, 4096> part{};
  for (size_t n = 0; (n = fread(part.data(), 1, part.size(), pipe)) > 0;)
    output.append(part.data(), n);
  const int status = pclose(pipe);
  DROVER_CHECK(
      status == 0, ExitCode::kEnvironment,
      "encoding the text failed; it needs Python with the packages of data/requirements.txt "
      "(launch/setup.sh makes such an environment; DROVER_PYTHON names another). Tried: {}",
      command);
  return Json::parse(output).get<std::vector<int32_t>>();
}

std::vector<Prompt> read_prompts(const Options& o, const WeightSource& source) {
  std::vector<Prompt> prompts;
  if (!o.text("text").empty()) {
    DROVER_CHECK(!source.synthetic(), ExitCode::kUsage,
                 "--text needs a tokenizer, which synthetic models have not");
    prompts.push_back({o.text("text"), encode_text(o.text("text"), o.text("model")), {}, {}});
  }
  if (!o.text("dataset").empty()) {
    const auto dataset = open_dataset(o.text("dataset"), source);
    std::vector<std::string> numbers = o.list("samples");
    if (numbers.empty()) numbers = {"0"};
    for (const auto& n : numbers) {
      const auto i = static_cast<size_t>(std::strtoull(n.c_str(), nullptr, 10));
      DROVER_CHECK(i < dataset->size() && n.find_first_not_of("0123456789") == std::string::npos,
                   ExitCode::kUsage, "--samples {}: {} has samples 0 to {}", n, o.text("dataset"),
                   dataset->size() - 1);
      prompts.push_back(
          {fmt::format("[{}] {}", i, dataset->question_text(i)), dataset->sample(i).input, {}, {}});
    }
  }
  if (!o.text("tokens").empty()) {
    try {
      for (const auto& list : read_json(o.text("tokens"))) {
        prompts.push_back({"", list.get<std::vector<int32_t>>(), {}, {}});
      }
    } catch (const Json::exception& e) {
      DROVER_FAIL(ExitCode::kBadInput, "{}: expected a list of lists of token ids: {}",
                  o.text("tokens"), e.what());
    }
  }
  DROVER_CHECK(!prompts.empty(), ExitCode::kUsage,
               "nothing to answer: give --text, --dataset with --samples, or --tokens");
  return prompts;
}

// The part of a text that can be printed now: not a cut character at its end.
std::string whole_characters(const std::string& text) {
  size_t end = text.size();
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto c = static_cast<unsigned char>(text[text.size() - back]);
    if ((c & 0xC0) == 0x80) continue;
    const size_t need = c >= 0xF0 ? 4 : c >= 0xE0 ? 3 : c >= 0xC0 ? 2 : 1;
    if (need > back) end = text.size() - back;
    break;
  }
  return text.substr(0, end);
}

class Printer {
 public:
  Printer(std::vector<Prompt>& prompts, const DecodingTable& table)
      : prompts_(prompts), table_(table) {}

  // One prompt: as it comes. Several: each when it is finished.
  LeaderEvents events() {
    LeaderEvents e;
    e.streamed = [this](const StreamedToken& t) {
      Prompt& p = prompts_[t.id];
      p.answer.push_back(t.token);
      const std::string text = whole_characters(decode(p));
      if (prompts_.size() > 1) return;
      std::cout << text.substr(p.printed.size()) << std::flush;
      p.printed = text;
    };
    e.finished = [this](Finished&& f) {
      Prompt& p = prompts_[f.id];
      p.answer = std::move(f.tokens);
      if (prompts_.size() > 1) {
        std::cout << p.title << "\n" << decode(p) << "\n\n" << std::flush;
      } else {
        std::cout << decode(p).substr(p.printed.size()) << std::endl;
      }
    };
    return e;
  }
  std::string decode(const Prompt& p) const {
    if (table_.pieces.empty()) return fmt::format("{}", fmt::join(p.answer, " "));
    return table_.decode(p.answer.data(), p.answer.size());
  }

 private:
  std::vector<Prompt>& prompts_;
  const DecodingTable& table_;
};

void write_answers(const std::string& file, const std::vector<Prompt>& prompts,
                   const Printer& printer) {
  Json json = Json::array();
  for (const auto& p : prompts) {
    json.push_back({{"prompt", p.tokens}, {"tokens", p.answer}, {"text", printer.decode(p)}});
  }
  write_json(file, json);
}

ExitCode generate(const Options& o, Job& job) {
  const auto store = job.source.synthetic() ? nullptr : ModelStore::open(o.text("model"));
  DecodingTable table;
  if (store) table = store->decoding_table();
  std::vector<Prompt> prompts = read_prompts(o, job.source);
  Printer printer(prompts, table);
  job.leader.listen(printer.events());
  std::vector<Request> requests;
  for (size_t i = 0; i < prompts.size(); ++i) {
    for (int32_t t : prompts[i].tokens) {
      DROVER_CHECK(t >= 0 && t < job.source.architecture().vocab, ExitCode::kBadInput,
                   "prompt {}: token id {} is not of the model's vocabulary of {}", i, t,
                   job.source.architecture().vocab);
    }
    Request r;
    r.id = i;
    r.prompt = prompts[i].tokens;
    r.max_new_tokens = static_cast<int32_t>(o.integer("max-new-tokens", 1, 1 << 24));
    r.stream_tokens = true;
    requests.push_back(std::move(r));
  }
  if (o.flag("one-by-one")) {
    for (auto& r : requests) {
      job.leader.submit({r});
      job.leader.drain();
    }
  } else {
    job.leader.submit(std::move(requests));
    job.leader.drain();
  }
  if (!o.text("json").empty()) write_answers(o.text("json"), prompts, printer);
  const auto c = job.leader.counters();
  log::debug("{} steps, {} rows, {} preemptions, {} recomputed rows", c.steps, c.plan_rows,
             c.preemptions, c.recomputed_rows);
  return ExitCode::kOk;
}

}  // namespace

int generate_command(const std::vector<std::string>& arguments) {
  auto table = generate_options();
  for (auto& row : table) {
    if (std::string(row.name) == "log-level") row.value = "warn";
  }
  const Options o = Options::parse(table, arguments);
  if (o.flag("help")) {
    std::cout << Options::help(table);
    return 0;
  }
  JobParts parts;
  parts.body = [&](Job& job) { return generate(o, job); };
  return run_job(o, parts);
}

}  // namespace drover
