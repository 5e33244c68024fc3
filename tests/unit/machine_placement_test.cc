// Placement's promises, on machines that are described.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "base/error.h"
#include "machine/placement.h"
#include "two_sockets.h"

namespace drover {
namespace {

using testing::eight_gpus;
using testing::two_sockets_xml;

const Machine& eight() {
  static const Machine m = machine_from_xml(two_sockets_xml(), eight_gpus());
  return m;
}

std::vector<std::string> uuids(size_t count = 8) {
  std::vector<std::string> all;
  for (size_t i = 0; i < count; ++i) all.push_back("GPU-" + std::to_string(i));
  return all;
}

std::vector<RankGiven> alike(size_t ranks, const std::string& cpus,
                             const std::vector<std::string>& gpus) {
  return std::vector<RankGiven>(ranks, {parse_cpu_list(cpus), gpus});
}

TEST(Placement, EightRanksOnEightGpus) {
  const auto places = place_ranks(eight(), alike(8, "0-31", uuids()), false);
  std::set<std::string> gpus, nics;
  CpuSet used;
  for (size_t r = 0; r < 8; ++r) {
    const RankPlace& p = places[r];
    gpus.insert(p.gpu);
    nics.insert(p.nic);
    EXPECT_TRUE(p.shared_out);
    EXPECT_EQ(p.cores, 2);  // of the socket's eight, for its four GPUs
    EXPECT_EQ(p.threads, 2);
    EXPECT_EQ(p.numa, (std::vector<int>{eight().gpu(p.gpu)->numa}));
    EXPECT_TRUE((p.cpus & ~eight().gpu(p.gpu)->near).none());
    EXPECT_TRUE((p.cpus & used).none()) << "a core twice";
    used |= p.cpus;
    EXPECT_EQ(p.nic_nearness, Nearness::kSwitch);
  }
  EXPECT_EQ(gpus.size(), 8u);
  EXPECT_EQ(used.count(), 32u);
  EXPECT_EQ(nics, (std::set<std::string>{"mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"}));
}

TEST(Placement, NeighboursHaveTheBestLink) {
  // In whatever order CUDA shows the GPUs.
  auto seen = uuids();
  std::mt19937 random(7);
  for (int i = 0; i < 20; ++i) {
    std::shuffle(seen.begin(), seen.end(), random);
    const auto places = place_ranks(eight(), alike(8, "0-31", seen), false);
    for (size_t r = 0; r < 8; r += 2) {
      const int a = std::stoi(places[r].gpu.substr(4)), b = std::stoi(places[r + 1].gpu.substr(4));
      EXPECT_EQ(a / 2, b / 2) << "ranks " << r << " and " << r + 1 << " without NVLink";
    }
  }
}

TEST(Placement, FewRanksStayNearTheirGpus) {
  const auto places = place_ranks(eight(), alike(2, "0-31", uuids()), false);
  EXPECT_EQ(cpu_list(places[0].cpus), "0-7");
  EXPECT_EQ(cpu_list(places[1].cpus), "8-15");
  // Given the far socket only, they share that.
  const auto far = place_ranks(eight(), alike(2, "16-31", uuids()), false);
  EXPECT_EQ(cpu_list(far[0].cpus), "16-23");
  EXPECT_EQ(cpu_list(far[1].cpus), "24-31");
}

TEST(Placement, WhatIsARanksOwnIsLeft) {
  std::vector<RankGiven> ranks{{parse_cpu_list("0-3"), uuids()},
                               {parse_cpu_list("20-31"), uuids()}};
  const auto places = place_ranks(eight(), ranks, false);
  for (size_t r = 0; r < 2; ++r) {
    EXPECT_EQ(places[r].cpus, ranks[r].cpus);
    EXPECT_FALSE(places[r].shared_out);
    EXPECT_FALSE(places[r].crowded);
  }
  EXPECT_EQ(places[1].threads, 6);
  const auto one = place_ranks(eight(), alike(1, "0-31", uuids()), false);
  EXPECT_EQ(cpu_list(one[0].cpus), "0-31");
}

TEST(Placement, MoreRanksThanCoresAreLeft) {
  const auto places = place_ranks(eight(), alike(5, "0-3", {}), false);
  for (const RankPlace& p : places) {
    EXPECT_EQ(cpu_list(p.cpus), "0-3");
    EXPECT_TRUE(p.crowded);
    EXPECT_EQ(p.threads, 1);
  }
}

TEST(Placement, PartlyTheSameCoresAreLeft) {
  std::vector<RankGiven> ranks{{parse_cpu_list("0-15"), {}}, {parse_cpu_list("8-23"), {}}};
  const auto places = place_ranks(eight(), ranks, false);
  EXPECT_EQ(places[0].cpus, ranks[0].cpus);
  EXPECT_TRUE(places[0].crowded);
  EXPECT_EQ(places[0].threads, 6);  // twelve cores for two
}

TEST(Placement, OneGpuSeenIsTaken) {
  std::vector<RankGiven> ranks;
  for (int r = 0; r < 4; ++r) ranks.push_back({parse_cpu_list("0-31"), {uuids()[size_t(7 - r)]}});
  const auto places = place_ranks(eight(), ranks, false);
  for (size_t r = 0; r < 4; ++r) EXPECT_EQ(places[r].gpu, ranks[r].gpus[0]);
  // Who has a choice leaves them to those who have none.
  ranks[0].gpus = uuids();
  const auto mixed = place_ranks(eight(), ranks, false);
  EXPECT_EQ(mixed[1].gpu, "GPU-6");
  std::set<std::string> gpus;
  for (const auto& p : mixed) gpus.insert(p.gpu);
  EXPECT_EQ(gpus.size(), 4u);
}

TEST(Placement, TooManyRanksForTheGpus) {
  try {
    place_ranks(eight(), alike(3, "0-31", uuids(2)), false);
    FAIL() << "three ranks on two GPUs";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ExitCode::kUsage);
    EXPECT_NE(std::string(e.what()).find("--share-gpu"), std::string::npos);
  }
  const auto shared = place_ranks(eight(), alike(5, "0-31", uuids(2)), true);
  EXPECT_EQ(std::count_if(shared.begin(), shared.end(),
                          [](const RankPlace& p) { return p.gpu == "GPU-0"; }),
            3);
}

TEST(Placement, CpuRanksOfOneSocketEach) {
  const auto places = place_ranks(eight(), alike(4, "0-31", {}), false);
  EXPECT_EQ(cpu_list(places[0].cpus), "0-7");
  EXPECT_EQ(places[1].numa, (std::vector<int>{0}));
  EXPECT_EQ(places[2].numa, (std::vector<int>{1}));
  EXPECT_EQ(places[0].nic_nearness, Nearness::kNuma);
}

TEST(Placement, EveryShareIsWithinWhatWasGiven) {
  // Whatever is given: nothing outside of it, nothing shared that was not, nobody without a core.
  std::mt19937 random(std::random_device{}());
  const auto number = [&](int least, int most) {
    return std::uniform_int_distribution<int>(least, most)(random);
  };
  for (int round = 0; round < 300; ++round) {
    const auto seed = random();
    SCOPED_TRACE(seed);
    random.seed(seed);
    std::vector<CpuSet> sets(static_cast<size_t>(number(1, 3)));
    for (CpuSet& s : sets) {
      for (int i = number(1, 32); i > 0; --i) s.set(static_cast<size_t>(number(0, 31)));
    }
    std::vector<RankGiven> ranks;
    for (int i = number(1, 8); i > 0; --i) {
      ranks.push_back({sets[static_cast<size_t>(number(0, static_cast<int>(sets.size()) - 1))],
                       round % 2 == 0 ? uuids() : std::vector<std::string>{}});
    }
    const auto places = place_ranks(eight(), ranks, false);
    for (size_t a = 0; a < ranks.size(); ++a) {
      EXPECT_TRUE(places[a].cpus.any());
      EXPECT_TRUE((places[a].cpus & ~ranks[a].cpus).none());
      EXPECT_GE(places[a].threads, 1);
      if (!places[a].shared_out) {
        EXPECT_EQ(places[a].cpus, ranks[a].cpus);
      }
      for (size_t b = 0; b < a; ++b) {
        if (places[a].shared_out && ranks[a].cpus == ranks[b].cpus) {
          EXPECT_TRUE((places[a].cpus & places[b].cpus).none());
        }
      }
    }
  }
}

}  // namespace
}  // namespace drover
