#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "plan/topology.h"

namespace drover {
namespace {

namespace fs = std::filesystem;

const char* const kTwoNodes = R"(
[machine]
nodes = 2
gpus_per_node = 8
measured = gpu.copy_gb_per_s
[gpu]
name = some GPU
memory_gib = 79.2
copy_gb_per_s = 2900
bf16_tflops = 989
fp8_tflops = 1979
compute_capability = 9.0
[link]
latency_us = 7
gb_per_s = 266
[network]
latency_us = 25
gb_per_s = 45
[grid]
tp = 2
pp = 1
dp = 0
)";

class TopologyFile : public ::testing::Test {
 protected:
  fs::path path_ = fs::temp_directory_path() / ("drover_topology_" + std::to_string(getpid()));
  ~TopologyFile() override { fs::remove(path_); }

  Topology read(const std::string& text) {
    std::ofstream(path_) << text;
    return read_topology(path_.string());
  }
  // Of kTwoNodes with the line that begins with `line` replaced.
  std::string with(const std::string& line, const std::string& by) {
    std::string text = kTwoNodes;
    const size_t at = text.find("\n" + line) + 1;
    EXPECT_NE(at, 0u) << line;
    return text.replace(at, text.find('\n', at) - at, by);
  }
  // The message, which must name the file and be of the class of bad input.
  std::string complaint(const std::string& text) {
    try {
      read(text);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kBadInput) << e.what();
      EXPECT_NE(std::string(e.what()).find(path_.string()), std::string::npos) << e.what();
      return e.what();
    }
    ADD_FAILURE() << "accepted:\n" << text;
    return {};
  }
  void expect_complaint(const std::string& text, const std::string& words) {
    const std::string said = complaint(text);
    EXPECT_NE(said.find(words), std::string::npos) << said;
  }
};

TEST_F(TopologyFile, IsReadWhole) {
  const Topology t = read(kTwoNodes);
  EXPECT_EQ(t.ranks(), 16);
  EXPECT_EQ(t.gpu_name, "some GPU");
  EXPECT_EQ(t.memory_gib, 79.2);
  EXPECT_EQ(t.network.gb_per_s, 45);
  EXPECT_EQ(t.link.send_latency_us, 7);  // not given: as an all-reduce
  EXPECT_EQ(t.tp, 2);
  EXPECT_EQ(t.dp, 0);
  EXPECT_EQ(t.measured.count("gpu.copy_gb_per_s"), 1u);
}

TEST_F(TopologyFile, IsWrittenAsItIsRead) {
  const std::string text = topology_ini(read(kTwoNodes));
  EXPECT_EQ(topology_ini(read(text)), text);
  EXPECT_EQ(read(text).network.latency_us, 25);
}

TEST_F(TopologyFile, MayHaveAGridOnly) {
  const Topology t = read("[grid]\ntp = 3\n");
  EXPECT_EQ(t.tp, 3);
  EXPECT_FALSE(t.pp.has_value());
  EXPECT_FALSE(t.describes_machine());
}

TEST_F(TopologyFile, RefusesWhatItDoesNotKnow) {
  expect_complaint(with("tp = 2", "tp = 2\ncp = 1"), "unknown key grid.cp");
  expect_complaint(with("[grid]", "[gird]"), "unknown key gird");
  expect_complaint(with("tp = 2", "tp = 2\ntp = 4"), "grid.tp is given twice");
  expect_complaint(with("measured", "measured = gpu.speed"), "names gpu.speed");
}

TEST_F(TopologyFile, RefusesWhatIsNoNumber) {
  expect_complaint(with("tp = 2", "tp = two"), "grid.tp = two: expected a whole number");
  expect_complaint(with("tp = 2", "tp = -2"), "grid.tp = -2");
  expect_complaint(with("nodes", "nodes = 0"), "machine.nodes = 0");
  expect_complaint(with("nodes", "nodes = 1.5"), "machine.nodes = 1.5");
  for (const char* key : {"copy_gb_per_s", "latency_us", "bf16_tflops", "memory_gib"}) {
    for (const char* value : {"0", "-1", "fast", "nan", "inf", "", "1e30", "12 GB"}) {
      expect_complaint(with(key, std::string(key) + " = " + value), "expected a number above 0");
    }
  }
}

TEST_F(TopologyFile, RefusesWhatContradictsItself) {
  expect_complaint(with("tp = 2", "tp = 32"), "[grid] needs 32 ranks, but the machine has 2 nodes");
  expect_complaint(with("pp = 1", "pp = 0"), "only one of tp, pp and dp");
  expect_complaint(with("gpus_per_node", "gpus_per_node = 0"), "gpus_per_node is 0");
  expect_complaint(with("[network]", "[host]"), "unknown key host.gb_per_s");
  std::string text = kTwoNodes;
  expect_complaint(text.erase(text.find("[network]"), text.find("[grid]") - text.find("[network]")),
                   "no network between them");
  text = kTwoNodes;
  expect_complaint(text.erase(text.find("[link]"), text.find("[network]") - text.find("[link]")),
                   "nothing between them");
  expect_complaint(with("gb_per_s", ""), "needs both");
  expect_complaint(with("gb_per_s", "gb_per_s = 3600"), "gigabytes are meant, not gigabits");
  expect_complaint(with("fp8_tflops", "fp8_tflops = 500"), "is below gpu.bf16_tflops");
  expect_complaint("[gpu]\nmemory_gib = 80\n", "not both nodes and gpus_per_node");
  expect_complaint("[machine]\nnodes = 1\n", "not both nodes and gpus_per_node");
  expect_complaint("[machine]\nnodes = 1\ngpus_per_node = 0\n", "host.cores");
}

TEST_F(TopologyFile, SaysWhenItIsNotThere) {
  EXPECT_THROW(read_topology(path_.string() + "-not"), Error);
  expect_complaint("tp 2\n", path_.string());
}

TEST(Topologies, OfTheRepositoryAreRead) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(DROVER_SOURCE_DIR "/topology")) {
    if (entry.path().extension() != ".ini") continue;
    const Topology t = read_topology(entry.path().string());
    EXPECT_TRUE(t.describes_machine()) << entry.path();
    ASSERT_TRUE(t.tp && t.pp && t.dp) << entry.path();
    if (t.gpu()) {
      EXPECT_EQ(*t.tp * *t.pp * *t.dp, t.ranks()) << entry.path();
    }
    ++files;
  }
  EXPECT_EQ(files, 9);
}

TEST(Grids, WhoseTensorSlotsLieOnSeveralNodes) {
  EXPECT_EQ(nodes_of_tensor_group({8, 1, 2}, 8), 1);
  EXPECT_EQ(nodes_of_tensor_group({16, 1, 1}, 8), 2);
  EXPECT_EQ(nodes_of_tensor_group({3, 2, 2}, 8), 2);  // ranks 6, 7 and 8
  EXPECT_EQ(nodes_of_tensor_group({3, 2, 1}, 8), 1);  // ranks 0-2 and 3-5
  EXPECT_EQ(nodes_of_tensor_group({5, 1, 1}, 4), 2);
  EXPECT_FALSE(stages_cross_nodes({4, 2, 2}, 8));
  EXPECT_TRUE(stages_cross_nodes({8, 2, 1}, 8));
  EXPECT_TRUE(stages_cross_nodes({1, 3, 4}, 8));  // the third replica has ranks 6, 7 and 8
  EXPECT_FALSE(stages_cross_nodes({8, 1, 4}, 8));
}

}  // namespace
}  // namespace drover
