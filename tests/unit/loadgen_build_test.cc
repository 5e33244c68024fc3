// LoadGen as drover builds it: the released sources, in every build type, that finish an Offline
// run with token latencies (which libstdc++'s assertions would abort) and do not call themselves
// modified.
#include <gtest/gtest.h>
#include <loadgen.h>
#include <query_sample_library.h>
#include <system_under_test.h>
#include <test_settings.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "drover_version.h"

namespace {

constexpr size_t kSamples = 16;

// Answers every sample at once with four tokens.
class FourTokens : public mlperf::SystemUnderTest {
 public:
  const std::string& Name() override { return name_; }
  void FlushQueries() override {}
  void IssueQuery(const std::vector<mlperf::QuerySample>& samples) override {
    for (const mlperf::QuerySample& sample : samples) {
      const int32_t tokens[4] = {1, 2, 3, static_cast<int32_t>(sample.index)};
      mlperf::QuerySampleResponse response{sample.id, reinterpret_cast<uintptr_t>(tokens),
                                           sizeof(tokens), 4};
      mlperf::QuerySamplesComplete(&response, 1);
    }
    answered_ += samples.size();
  }
  size_t answered() const { return answered_; }

 private:
  std::string name_ = "four tokens";
  size_t answered_ = 0;
};

class Numbers : public mlperf::QuerySampleLibrary {
 public:
  const std::string& Name() override { return name_; }
  size_t TotalSampleCount() override { return kSamples; }
  size_t PerformanceSampleCount() override { return kSamples; }
  void LoadSamplesToRam(const std::vector<mlperf::QuerySampleIndex>&) override {}
  void UnloadSamplesFromRam(const std::vector<mlperf::QuerySampleIndex>&) override {}

 private:
  std::string name_ = "numbers";
};

std::string read(const std::filesystem::path& file) {
  std::ifstream in(file);
  std::stringstream all;
  all << in.rdbuf();
  return all.str();
}

TEST(LoadGenBuild, OfflineTokenRunIsValidAndUnmodified) {
  const auto folder = std::filesystem::temp_directory_path() /
                      ("drover_loadgen_build_" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "user.conf") << "small.*.use_token_latencies = 1\n"
                                         "*.Offline.min_query_count = 16\n"
                                         "*.Offline.min_duration = 0\n"
                                         "*.Offline.target_qps = 16\n";
  mlperf::TestSettings settings;
  ASSERT_EQ(0, settings.FromConfig((folder / "user.conf").string(), "small", "Offline"));
  settings.scenario = mlperf::TestScenario::Offline;
  settings.mode = mlperf::TestMode::PerformanceOnly;
  mlperf::LogSettings log;
  log.log_output.outdir = folder.string();
  log.enable_trace = false;
  FourTokens sut;
  Numbers library;
  mlperf::StartTest(&sut, &library, settings, log, (folder / "no_audit.config").string());

  EXPECT_GE(sut.answered(), kSamples);
  const std::string summary = read(folder / "mlperf_log_summary.txt");
  const std::string detail = read(folder / "mlperf_log_detail.txt");
  EXPECT_NE(summary.find("Result is : VALID"), std::string::npos) << summary;
  EXPECT_NE(summary.find("Tokens per second"), std::string::npos) << summary;
  EXPECT_NE(summary.find("No errors encountered"), std::string::npos) << summary;
  EXPECT_EQ(detail.find("error_uncommitted_loadgen_changes"), std::string::npos);
  EXPECT_NE(detail.find(std::string("\"") + drover::version::kLoadGen + " @ "), std::string::npos);
  std::filesystem::remove_all(folder);
}

}  // namespace
