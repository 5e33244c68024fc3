// The table at a run's end.
#include <gtest/gtest.h>

#include "serve/summary.h"

namespace drover {
namespace {

Json a_run() {
  Json pass = {{"samples", 1500},
               {"output_tokens", 438311},
               {"duration_s", 168.381},
               {"output_tokens_per_second", 12603.08},
               {"ttft_ms", {{"p50", 79663.04}, {"p99", 133667.08}}},
               {"tpot_ms", {{"p50", 136.2}, {"p99", nullptr}}}};
  return {{"verdict", "VALID under demo settings; not an MLPerf result"},
          {"reasons", Json::array()},
          {"scenario", "offline"},
          {"grid", "tp 1 x pp 1 x dp 1"},
          {"activations", "fp8"},
          {"kv", "fp8"},
          {"backend", "cuda"},
          {"passes", {{"performance", pass}}}};
}

TEST(Summary, HasTheFiguresOfThePerformancePass) {
  const std::string text = summary_text(a_run(), "results/70b");
  for (const char* line :
       {"  LoadGen's verdict      VALID under demo settings; not an MLPerf result\n",
        "  scenario, grid         offline, tp 1 x pp 1 x dp 1\n",
        "  numbers                activations fp8, KV fp8, backend cuda\n",
        "  samples                1,500 (438,311 output tokens in 168.4 s)\n",
        "  output tokens/s        12,603.1\n",
        "  time to first token    p50 79,663.0 ms, p99 133,667.1 ms\n",
        "  time per output token  p50 136.2 ms, p99 not measured\n",
        "  result                 results/70b/result.json\n"})
    EXPECT_NE(text.find(line), std::string::npos) << line << "not in\n" << text;
  EXPECT_EQ(text.find("energy"), std::string::npos);
  EXPECT_EQ(text.find("accuracy run"), std::string::npos);
}

TEST(Summary, TellsWhyItIsNoResultAndHowToGoOn) {
  Json run = a_run();
  run["verdict"] = "ended early; not a result";
  run["reasons"] = {"accuracy: ended early: asked to stop"};
  run["go_on"] = "go on with --resume";
  run["passes"]["accuracy"] = {
      {"verdict", "ended early; not a result"},
      {"resumed", {{"from", "earlier"}, {"samples_taken_over", 1234}, {"samples_run", 5}}}};
  run["passes"]["performance"]["energy"] = {
      {"joules", 1033.0}, {"mean_watts", 523.0}, {"joules_per_output_token", 8.07}};
  const std::string text = summary_text(run, "out");
  for (const char* part :
       {"accuracy: ended early: asked to stop\n", "go on with --resume\n",
        "resumed: 1,234 samples from earlier, 5 run here\n", "  accuracy run           ended early",
        "  energy                 1033 J, 523 W, 8.07 J"})
    EXPECT_NE(text.find(part), std::string::npos) << part << " not in\n" << text;
}

}  // namespace
}  // namespace drover
