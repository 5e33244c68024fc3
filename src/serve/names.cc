// The scenarios and modes as the user writes them.
#include <algorithm>

#include "serve/session.h"

namespace drover {

const char* to_string(Scenario scenario) {
  switch (scenario) {
    case Scenario::kOffline:
      return "offline";
    case Scenario::kServer:
      return "server";
    case Scenario::kInteractive:
      return "interactive";
    case Scenario::kSingleStream:
      return "singlestream";
  }
  return "?";
}

const char* to_string(Mode mode) { return mode == Mode::kPerformance ? "performance" : "accuracy"; }

Scenario parse_scenario(const std::string& text) {
  for (const Scenario s :
       {Scenario::kOffline, Scenario::kServer, Scenario::kInteractive, Scenario::kSingleStream})
    if (text == to_string(s)) return s;
  DROVER_FAIL(ExitCode::kUsage,
              "scenario '{}' is unknown: offline, server, interactive or singlestream", text);
}

std::vector<Mode> parse_modes(const std::string& text) {
  std::vector<Mode> modes;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    DROVER_CHECK(word == "performance" || word == "accuracy", ExitCode::kUsage,
                 "mode '{}' is unknown: performance, accuracy or performance,accuracy", word);
    const Mode mode = word == "performance" ? Mode::kPerformance : Mode::kAccuracy;
    for (const Mode m : modes)
      DROVER_CHECK(m != mode, ExitCode::kUsage, "mode '{}' is named twice", word);
    modes.push_back(mode);
    begin = end + 1;
  }
  return modes;
}

}  // namespace drover
