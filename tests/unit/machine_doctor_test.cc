// What doctor goes by: who is slow among pairs, and which interfaces libraries choose.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "machine/interfaces.h"
#include "machine/odd_one.h"

namespace drover {
namespace {

std::vector<PairFigure> pairs_of(int ranks, int slow, double factor) {
  std::vector<PairFigure> pairs;
  for (int a = 0; a < ranks; ++a) {
    for (int b = a + 1; b < ranks; ++b) {
      const double f = a == slow || b == slow ? factor : 1 + 0.1 * ((a + b) % 3);
      pairs.push_back({.a = a, .b = b, .same_host = false, .latency_us = 20 * f, .gbytes = 10 / f});
    }
  }
  return pairs;
}

TEST(OddOnes, TheSlowRankIsNamed) {
  for (const int ranks : {3, 4, 5, 8, 16}) {
    for (const int slow : {0, ranks - 1}) {
      const auto odd = odd_ones(pairs_of(ranks, slow, 10));
      ASSERT_EQ(odd.size(), 2u) << ranks;
      for (const OddOne& o : odd) EXPECT_EQ(o.rank, slow);
      EXPECT_EQ(odd[0].what, "latency");
      EXPECT_DOUBLE_EQ(odd[0].value, 200);
      EXPECT_EQ(odd[1].what, "bandwidth");
      EXPECT_DOUBLE_EQ(odd[1].value, 1);
    }
  }
}

TEST(OddOnes, NobodyWhereAllAreAlike) {
  EXPECT_TRUE(odd_ones(pairs_of(8, -1, 1)).empty());
  EXPECT_TRUE(odd_ones(pairs_of(8, 2, 2)).empty());   // within what machines do
  EXPECT_TRUE(odd_ones(pairs_of(2, 0, 50)).empty());  // of two nobody can tell who
  EXPECT_TRUE(odd_ones({}).empty());
}

TEST(OddOnes, ASlowPairIsNamed) {
  auto pairs = pairs_of(6, -1, 1);
  pairs[7].gbytes = 0.5;
  const auto odd = odd_ones(pairs);
  ASSERT_EQ(odd.size(), 1u);
  EXPECT_EQ(odd[0].rank, -1);
  EXPECT_EQ(odd[0].a, pairs[7].a);
  EXPECT_EQ(odd[0].b, pairs[7].b);
}

TEST(OddOnes, FastPairsOfOneHostAreAKindOfTheirOwn) {
  auto pairs = pairs_of(4, -1, 1);
  for (PairFigure& p : pairs) {
    p.same_host = p.a / 2 == p.b / 2;
    if (p.same_host) p.latency_us = 0.5, p.gbytes = 100;
  }
  EXPECT_TRUE(odd_ones(pairs).empty());
}

TEST(Rounds, EveryoneMeetsEveryoneOnce) {
  for (int count = 0; count < 20; ++count) {
    std::set<std::pair<int, int>> met;
    for (const auto& round : rounds_of_pairs(count)) {
      std::set<int> busy;
      for (const auto& [a, b] : round) {
        EXPECT_LT(a, b);
        EXPECT_TRUE(busy.insert(a).second && busy.insert(b).second);
        EXPECT_TRUE(met.insert({a, b}).second);
      }
    }
    EXPECT_EQ(met.size(), static_cast<size_t>(count * (count - 1) / 2));
  }
}

Interface up(const std::string& name, const std::string& address) {
  Interface i;
  i.name = name;
  i.addresses = {address};
  i.up = true;
  i.loopback = name == "lo";
  i.bridge = is_bridge(name);
  return i;
}

std::vector<Interface> node() {
  return {up("docker0", "172.17.0.1/16"), up("eth0", "10.0.0.2/24"), up("eth1", "192.168.7.2/22"),
          up("lo", "127.0.0.1/8")};
}

std::string chosen(const std::vector<Interface>& all, const std::vector<Nic>& nics, size_t library,
                   const std::map<std::string, std::string>& set = {}) {
  const auto c = choices(all, nics, [&](const std::string& name) {
    const auto found = set.find(name);
    return found == set.end() ? "" : found->second;
  })[library];
  std::string names;
  for (const auto& n : c.names) names += (names.empty() ? "" : " ") + n;
  return names;
}

TEST(Interfaces, NcclsChoice) {
  EXPECT_EQ(chosen(node(), {}, 0), "eth0 eth1");
  EXPECT_EQ(chosen({up("docker0", "172.17.0.1/16"), up("lo", "127.0.0.1/8")}, {}, 0), "docker0");
  EXPECT_EQ(chosen({up("lo", "127.0.0.1/8")}, {}, 0), "lo");
  auto with_ib = node();
  with_ib.push_back(up("ib0", "10.1.0.2/16"));
  EXPECT_EQ(chosen(with_ib, {}, 0), "ib0");
  EXPECT_EQ(chosen(node(), {}, 0, {{"NCCL_SOCKET_IFNAME", "eth"}}), "eth0 eth1");
  EXPECT_EQ(chosen(node(), {}, 0, {{"NCCL_SOCKET_IFNAME", "=eth1"}}), "eth1");
  EXPECT_EQ(chosen(node(), {}, 0, {{"NCCL_SOCKET_IFNAME", "^eth0,lo"}}), "docker0 eth1");
  EXPECT_EQ(chosen(node(), {}, 0, {{"NCCL_SOCKET_IFNAME", "^=eth"}}), "docker0 eth0 eth1 lo");
  EXPECT_EQ(chosen(node(), {}, 0, {{"NCCL_SOCKET_IFNAME", "bond"}}), "");
}

TEST(Interfaces, OpenMpisChoiceHasTheBridge) {
  EXPECT_EQ(chosen(node(), {}, 1), "docker0 eth0 eth1");
  EXPECT_EQ(chosen(node(), {}, 1, {{"OMPI_MCA_btl_tcp_if_include", "eth1"}}), "eth1");
  EXPECT_EQ(chosen(node(), {}, 1, {{"OMPI_MCA_btl_tcp_if_include", "192.168.4.0/22"}}), "eth1");
  EXPECT_EQ(chosen(node(), {}, 1, {{"OMPI_MCA_btl_tcp_if_exclude", "docker0,lo"}}), "eth0 eth1");
}

TEST(Interfaces, UcxTakesFabricsFirst) {
  EXPECT_EQ(chosen(node(), {}, 2), "eth0 eth1");
  Nic fabric;
  fabric.name = "mlx5_0";
  fabric.fabric = true;
  EXPECT_EQ(chosen(node(), {fabric}, 2), "eth0 eth1");  // it is down
  fabric.up = true;
  EXPECT_EQ(chosen(node(), {fabric}, 2), "mlx5_0");
  EXPECT_EQ(chosen(node(), {fabric}, 2, {{"UCX_NET_DEVICES", "eth1"}}), "eth1");
  EXPECT_EQ(chosen(node(), {fabric}, 2, {{"UCX_NET_DEVICES", "mlx5_0:1"}}), "mlx5_0");
  EXPECT_EQ(chosen(node(), {}, 2, {{"UCX_NET_DEVICES", "docker0"}}), "docker0");
}

TEST(Interfaces, DownOnesAndNetworks) {
  auto all = node();
  all[1].up = false;
  EXPECT_EQ(chosen(all, {}, 0), "eth1");
  EXPECT_EQ(network_of("192.168.7.2/22"), "192.168.4.0/22");
  EXPECT_EQ(network_of("10.1.2.3/32"), "10.1.2.3/32");
  EXPECT_EQ(network_of("10.1.2.3/0"), "0.0.0.0/0");
  EXPECT_EQ(network_of("eth0"), "");
}

TEST(Interfaces, ThisHost) {
  const auto all = interfaces();
  EXPECT_TRUE(std::any_of(all.begin(), all.end(), [](const Interface& i) { return i.loopback; }));
}

}  // namespace
}  // namespace drover
