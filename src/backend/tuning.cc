#include "backend/tuning.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <tuple>

#include "base/error.h"

namespace drover {
namespace {

constexpr const char* kHead = "drover-tuning 1";

auto key(const LinearChoice& c) { return std::tie(c.format, c.n, c.k, c.rows); }

// One file's lines, and where in it we are.
class Lines {
 public:
  explicit Lines(const std::string& file) : file_(file), in_(file) {
    DROVER_CHECK(in_.good(), ExitCode::kBadInput, "{}: cannot be read: {}", file,
                 std::strerror(errno));
  }
  // The next one without comment and with something on it.
  bool next(std::string& line) {
    while (std::getline(in_, line)) {
      ++number_;
      line.resize(std::min(line.find('#'), line.size()));
      while (!line.empty() && std::isspace(static_cast<unsigned char>(line.back())))
        line.pop_back();
      if (line.find_first_not_of(" \t") != std::string::npos) return true;
    }
    return false;
  }
  [[noreturn]] void fail(const std::string& what) const {
    DROVER_FAIL(ExitCode::kBadInput, "{}, line {}: {}; `drover bench tune --out` writes such files",
                file_, number_, what);
  }

 private:
  std::string file_;
  std::ifstream in_;
  int number_ = 0;
};

LinearChoice parse(const std::string& line, const Lines& lines) {
  LinearChoice c;
  std::string split, more;
  std::istringstream in(line);
  in >> c.format >> c.n >> c.k >> c.rows >> c.way.tokens >> c.way.cluster >> c.way.per_sm >>
      c.way.stages >> split >> c.us >> c.rule_us;
  if (in.fail() || in >> more) {
    lines.fail(
        "expected format, N, K, rows, tokens, cluster, per_sm, stages, split and two times, "
        "found: " +
        line);
  }
  if (c.format != "w4a8" && c.format != "w4a16")
    lines.fail(fmt::format("the format {} is neither w4a8 nor w4a16", c.format));
  if (split != "yes" && split != "no")
    lines.fail(fmt::format("split is {}, neither yes nor no", split));
  const bool sizes = c.n > 0 && c.k > 0 && c.rows > 0 && c.way.tokens > 0 && c.way.cluster > 0 &&
                     c.way.per_sm > 0 && c.way.stages > 0;
  if (!sizes || !std::isfinite(c.us) || !std::isfinite(c.rule_us) || c.us <= 0 || c.rule_us <= 0)
    lines.fail("every number is above 0, found: " + line);
  c.way.split = split == "yes";
  return c;
}

}  // namespace

std::vector<LinearChoice> Tuning::of(const std::string& format, int64_t n, int64_t k) const {
  std::vector<LinearChoice> found;
  for (const auto& c : choices) {
    if (c.format == format && c.n == n && c.k == k) found.push_back(c);
  }
  return found;
}

Tuning read_tuning(const std::string& file) {
  Lines lines(file);
  std::string line;
  if (!lines.next(line) || line != kHead)
    lines.fail(fmt::format("expected `{}`: no tuning file of this drover", kHead));
  Tuning t;
  if (!lines.next(line) || !line.starts_with("gpu ")) lines.fail("expected `gpu NAME`");
  t.gpu = line.substr(4);
  while (lines.next(line)) {
    t.choices.push_back(parse(line, lines));
    if (t.choices.size() > 1 && !(key(t.choices[t.choices.size() - 2]) < key(t.choices.back())))
      lines.fail("lines are sorted by format, N, K and rows, each once");
  }
  return t;
}

void write_tuning(const std::string& file, Tuning t) {
  std::sort(t.choices.begin(), t.choices.end(),
            [](const auto& a, const auto& b) { return key(a) < key(b); });
  const std::string aside = file + ".tmp";
  std::ofstream out(aside);
  out << kHead << "\ngpu " << t.gpu
      << "\n# format  N  K  rows  tokens cluster per_sm stages split  us  us of the built-in "
         "rule\n";
  for (const auto& c : t.choices) {
    out << fmt::format("{} {} {} {}  {} {} {} {} {}  {:.3f} {:.3f}\n", c.format, c.n, c.k, c.rows,
                       c.way.tokens, c.way.cluster, c.way.per_sm, c.way.stages,
                       c.way.split ? "yes" : "no", c.us, c.rule_us);
  }
  out.close();
  DROVER_CHECK(out.good() && std::rename(aside.c_str(), file.c_str()) == 0, ExitCode::kEnvironment,
               "{}: cannot be written: {}; check that the folder exists and has room", file,
               std::strerror(errno));
}

void check_gpu(const Tuning& tuning, const std::string& file, const std::string& gpu) {
  DROVER_CHECK(tuning.gpu == gpu, ExitCode::kBadInput,
               "{}: tuned for {}, and this is {}: run `drover bench tune` here, or leave --tuning "
               "out",
               file, tuning.gpu, gpu);
}

void merge(Tuning& tuning, const std::vector<LinearChoice>& more) {
  std::erase_if(tuning.choices, [&](const LinearChoice& old) {
    return std::any_of(more.begin(), more.end(), [&](const LinearChoice& c) {
      return c.format == old.format && c.n == old.n && c.k == old.k;
    });
  });
  tuning.choices.insert(tuning.choices.end(), more.begin(), more.end());
}

}  // namespace drover
