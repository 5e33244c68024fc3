// Tuning files: what is written is read, and what is no such file is told by line.
#include "backend/tuning.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"

namespace drover {
namespace {

constexpr const char* kGpu = "NVIDIA H100 80GB HBM3";

class TuningFile : public testing::Test {
 protected:
  ~TuningFile() override { std::filesystem::remove(file_); }
  void write(const std::string& text) const { std::ofstream(file_) << text; }
  // The message of the refusal.
  std::string refusal(const std::string& text) const {
    write(text);
    try {
      read_tuning(file_);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput);
      EXPECT_NE(std::string(e.what()).find(file_), std::string::npos) << e.what();
      return e.what();
    }
    return "";
  }
  const std::string file_ = testing::TempDir() + "drover_tuning.txt";
};

LinearChoice choice(const char* format, int64_t n, int64_t rows, int tokens) {
  return {.format = format,
          .n = n,
          .k = 8192,
          .rows = rows,
          .way = {.tokens = tokens, .cluster = 1, .per_sm = 2, .stages = 11, .split = false},
          .us = 98.25,
          .rule_us = 101.5};
}

TEST_F(TuningFile, ComesBackSorted) {
  write_tuning(file_, {kGpu,
                       {choice("w4a8", 57344, 64, 64), choice("w4a8", 57344, 8, 8),
                        choice("w4a16", 8192, 8, 16)}});
  const Tuning t = read_tuning(file_);
  EXPECT_EQ(t.gpu, kGpu);
  ASSERT_EQ(t.choices.size(), 3u);
  EXPECT_EQ(t.choices[0].format, "w4a16");
  EXPECT_EQ(t.choices[1].rows, 8);
  const auto found = t.of("w4a8", 57344, 8192);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[1].way, choice("w4a8", 57344, 64, 64).way);
  EXPECT_DOUBLE_EQ(found[1].us, 98.25);
  EXPECT_DOUBLE_EQ(found[1].rule_us, 101.5);
  EXPECT_TRUE(t.of("w4a8", 57344, 28672).empty());
}

TEST_F(TuningFile, MergesByShape) {
  Tuning t{kGpu, {choice("w4a8", 57344, 64, 64), choice("w4a8", 8192, 64, 64)}};
  merge(t, {choice("w4a8", 57344, 16, 16), choice("w4a16", 8192, 16, 16)});
  EXPECT_EQ(t.choices.size(), 3u);
  ASSERT_EQ(t.of("w4a8", 57344, 8192).size(), 1u);
  EXPECT_EQ(t.of("w4a8", 57344, 8192)[0].rows, 16);
  EXPECT_EQ(t.of("w4a8", 8192, 8192).size(), 1u);
}

TEST_F(TuningFile, IsRefusedByLine) {
  const std::string head = std::string("drover-tuning 1\n# a comment\ngpu ") + kGpu + "\n";
  const std::string good = "w4a8 57344 8192 64  64 1 1 32 yes  98.2 101.4\n";
  EXPECT_EQ(refusal(head + good + "\n  # more\n"), "");
  EXPECT_NE(refusal("").find("drover-tuning 1"), std::string::npos);
  EXPECT_NE(refusal("drover-tuning 2\ngpu x\n").find("line 1"), std::string::npos);
  EXPECT_NE(refusal("drover-tuning 1\nw4a8 1\n").find("line 2: expected `gpu"), std::string::npos);
  for (const char* bad : {"w4a8 57344 8192 64  64 1 1 32 yes  98.2\n",
                          "w4a8 57344 8192 64  64 1 1 32 yes  98.2 101.4 7\n",
                          "w4a4 57344 8192 64  64 1 1 32 yes  98.2 101.4\n",
                          "w4a8 57344 8192 64  64 1 1 32 1  98.2 101.4\n",
                          "w4a8 57344 8192 0  64 1 1 32 yes  98.2 101.4\n",
                          "w4a8 57344 8192 x  64 1 1 32 yes  98.2 101.4\n",
                          "w4a8 57344 8192 64  64 1 1 32 yes  nan 101.4\n",
                          "w4a8 57344 99999999999999999999 64  64 1 1 32 yes  98.2 101.4\n"}) {
    EXPECT_NE(refusal(head + bad).find("line 4"), std::string::npos) << bad;
  }
  EXPECT_NE(refusal(head + good + good).find("line 5: lines are sorted"), std::string::npos);
  std::filesystem::remove(file_);
  EXPECT_THROW(read_tuning(file_), Error);
}

TEST_F(TuningFile, OfAnotherGpuIsRefused) {
  const Tuning t{kGpu, {}};
  check_gpu(t, file_, kGpu);
  try {
    check_gpu(t, file_, "NVIDIA H200");
    FAIL() << "a file of another GPU was taken";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kBadInput);
    EXPECT_NE(std::string(e.what()).find("NVIDIA H200"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find(kGpu), std::string::npos);
  }
}

TEST_F(TuningFile, IsNotWrittenWhereItCannotBe) {
  try {
    write_tuning("/nonexistent/folder/tuning.txt", {kGpu, {}});
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kEnvironment);
  }
}

}  // namespace
}  // namespace drover
