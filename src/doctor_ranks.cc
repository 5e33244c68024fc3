// What doctor looks at once MPI is up: libraries, clocks, and what pairs of ranks give.
#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <set>

#include "doctor.h"
#include "machine/machine.h"

namespace drover {

namespace {

constexpr size_t kLarge = 1 << 20;     // bytes of a message that shows bandwidth
constexpr int kMostRanksOfPairs = 64;  // more are a sample: a host's first ranks

// A library that MPI has loaded; null: it has not.
void* loaded(const char* name) { return ::dlopen(name, RTLD_LAZY | RTLD_NOLOAD); }

Finding check_pmix() {
  Finding f{Verdict::kOk, "PMIx", "not used: no launcher", ""};
  void* library = loaded("libpmix.so.2");
  std::string client = "inside of MPI";
  if (library != nullptr) {
    using Version = const char* (*)();
    const auto version = reinterpret_cast<Version>(::dlsym(library, "PMIx_Get_version"));
    if (version != nullptr) client = version();
    client = client.substr(0, client.find(" ("));
  }
  const char* server = std::getenv("PMIX_VERSION");
  if (std::getenv("PMIX_RANK") == nullptr) {
    if (library != nullptr) f.text += fmt::format(" (library: {})", client);
    return f;
  }
  f.text =
      fmt::format("launcher's {}, MPI's {}", server != nullptr ? server : "does not tell", client);
  // The PMIx standard's cross-version rule: clients and servers from 3 on understand each other.
  if (server != nullptr && std::atoi(server) < 3) {
    f.verdict = Verdict::kWarn;
    f.advice =
        "a server older than 3 may not understand this client: use a newer launcher, or the "
        "mpirun of this MPI";
  }
  return f;
}

double now_seconds() {
  timespec t{};
  ::clock_gettime(CLOCK_REALTIME, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// The first rank of each host.
std::vector<int> first_ranks(const World& world) {
  std::set<std::string> seen;
  std::vector<int> ranks;
  for (int r = 0; r < world.size(); ++r) {
    if (seen.insert(world.peers()[static_cast<size_t>(r)].host).second) ranks.push_back(r);
  }
  return ranks;
}

void meet(Comm& comm) {
  char mine = 0;
  std::vector<char> all(static_cast<size_t>(comm.size()));
  comm.all_gather(&mine, all.data(), 1, nullptr);
}

// Microseconds one way of `bytes`: the best of some batches. The lower rank measures.
double time_of_pair(Comm& comm, int peer, bool measures, std::vector<char>& buffer, size_t bytes,
                    int batches, int trips) {
  double best = 1e18;
  for (int b = 0; b < batches; ++b) {
    const auto begin = Clock::now();
    for (int i = 0; i < trips; ++i) {
      if (measures) {
        comm.send(buffer.data(), bytes, peer, nullptr);
        comm.recv(buffer.data(), bytes, peer, nullptr);
      } else {
        comm.recv(buffer.data(), bytes, peer, nullptr);
        comm.send(buffer.data(), bytes, peer, nullptr);
      }
    }
    best = std::min(best, seconds_since(begin) * 1e6 / (2 * trips));
  }
  return best;
}

PairFigure measure_pair(World& world, Comm& comm, int a, int b, std::vector<char>& buffer) {
  const int rank = comm.rank();
  const int peer = rank == a ? b : a;
  PairFigure p{.a = a, .b = b, .same_host = false, .latency_us = 0, .gbytes = 0};
  p.same_host =
      world.peers()[static_cast<size_t>(a)].host == world.peers()[static_cast<size_t>(b)].host;
  time_of_pair(comm, peer, rank == a, buffer, kLarge, 1, 1);
  // Trip by trip: a wait that went to sleep costs ten times the latency, which is not the
  // network's.
  p.latency_us = time_of_pair(comm, peer, rank == a, buffer, 8, 100, 1);
  p.gbytes =
      static_cast<double>(kLarge) / time_of_pair(comm, peer, rank == a, buffer, kLarge, 4, 2) / 1e3;
  return p;
}

// The pairs that this rank measured as their lower one. Some turns, the best of each pair: what was
// busy for a moment is not accused.
std::vector<PairFigure> best_of_turns(World& world, Comm& comm, const std::vector<int>& ranks,
                                      const std::vector<std::vector<std::pair<int, int>>>& rounds) {
  constexpr int kTurns = 4;
  std::vector<PairFigure> mine;
  std::vector<char> buffer(kLarge);
  for (int turn = 0; turn < kTurns; ++turn) {
    size_t at = 0;
    for (const auto& round : rounds) {
      for (const auto& [i, j] : round) {
        const int a = ranks[static_cast<size_t>(i)], b = ranks[static_cast<size_t>(j)];
        if (comm.rank() != a && comm.rank() != b) continue;
        const PairFigure p = measure_pair(world, comm, a, b, buffer);
        if (comm.rank() != a) continue;
        if (turn == 0) mine.push_back(p);
        PairFigure& best = mine[at++];
        best.latency_us = std::min(best.latency_us, p.latency_us);
        best.gbytes = std::max(best.gbytes, p.gbytes);
      }
      meet(comm);
    }
  }
  return mine;
}

std::vector<PairFigure> gather(Comm& comm, const std::vector<PairFigure>& mine) {
  const auto count = static_cast<int64_t>(mine.size());
  std::vector<int64_t> counts(static_cast<size_t>(comm.size()));
  comm.all_gather(&count, counts.data(), sizeof(count), nullptr);
  std::vector<PairFigure> all;
  const auto bytes = [](int64_t n) { return static_cast<size_t>(n) * sizeof(PairFigure); };
  if (comm.rank() != 0) {
    if (count > 0) comm.send(mine.data(), bytes(count), 0, nullptr);
    return all;
  }
  all = mine;
  for (int r = 1; r < comm.size(); ++r) {
    std::vector<PairFigure> theirs(static_cast<size_t>(counts[static_cast<size_t>(r)]));
    if (theirs.empty()) continue;
    comm.recv(theirs.data(), bytes(static_cast<int64_t>(theirs.size())), r, nullptr);
    all.insert(all.end(), theirs.begin(), theirs.end());
  }
  return all;
}

std::string summary(const std::vector<PairFigure>& pairs, bool same_host) {
  std::vector<double> latency, gbytes;
  for (const PairFigure& p : pairs) {
    if (p.same_host != same_host) continue;
    latency.push_back(p.latency_us);
    gbytes.push_back(p.gbytes);
  }
  if (latency.empty()) return "";
  std::sort(latency.begin(), latency.end());
  std::sort(gbytes.begin(), gbytes.end());
  return fmt::format("{} {} pairs: {:.1f} us (worst {:.1f}), {:.2f} GB/s (worst {:.2f})",
                     latency.size(), same_host ? "within hosts" : "between hosts",
                     latency[latency.size() / 2], latency.back(), gbytes[gbytes.size() / 2],
                     gbytes.front());
}

std::string who(const World& world, int rank) {
  return fmt::format("rank {} ({})", rank, world.peers()[static_cast<size_t>(rank)].host);
}

Finding told(const World& world, const OddOne& o) {
  const std::string unit = o.what == "latency" ? "us" : "GB/s";
  const std::string subject =
      o.rank >= 0 ? who(world, o.rank) : who(world, o.a) + " with " + who(world, o.b);
  return {
      Verdict::kWarn, "odd one out",
      fmt::format("{}: {} {:.2f} {}, the others {:.2f}", subject, o.what, o.value, unit, o.usual),
      o.same_host ? "look for what else runs on its cores"
                  : "leave it out, or look at its NIC, cable and switch port"};
}

}  // namespace

std::vector<Finding> check_libraries(const World& world) {
  std::vector<Finding> all;
  all.push_back({Verdict::kOk, "MPI",
                 fmt::format("{}, thread level multiple, {} ranks", mpi_version(), world.size()),
                 ""});
  all.push_back(check_pmix());
  if (void* ucp = loaded("libucp.so.0")) {
    using Version = const char* (*)();
    const auto version = reinterpret_cast<Version>(::dlsym(ucp, "ucp_get_version_string"));
    all.push_back({Verdict::kOk, "UCX", version != nullptr ? version() : "loaded", ""});
  } else {
    all.push_back({Verdict::kOk, "UCX", "MPI does not use it here", ""});
  }
  const bool wanted = !has_nccl() && this_machine().gpus().size() > 1;
  all.push_back({wanted ? Verdict::kWarn : Verdict::kOk, "NCCL",
                 has_nccl() ? nccl_version() : "this build has none",
                 wanted ? "several GPUs want it: build where CMake finds NCCL 2.18 or later" : ""});
  return all;
}

std::vector<Finding> check_clocks(World& world, Comm& comm) {
  const auto firsts = first_ranks(world);
  double worst = 0;
  int whose = 0;
  for (const int r : firsts) {
    if (r == 0) continue;
    double best_trip = 1e18, offset = 0;
    for (int i = 0; i < 8; ++i) {
      double theirs = 0;
      if (comm.rank() == 0) {
        const double begin = now_seconds();
        comm.send(&theirs, sizeof(theirs), r, nullptr);
        comm.recv(&theirs, sizeof(theirs), r, nullptr);
        const double end = now_seconds();
        if (end - begin < best_trip) {
          best_trip = end - begin;
          offset = theirs - (begin + end) / 2;
        }
      } else if (comm.rank() == r) {
        comm.recv(&theirs, sizeof(theirs), 0, nullptr);
        theirs = now_seconds();
        comm.send(&theirs, sizeof(theirs), 0, nullptr);
      }
    }
    if (std::fabs(offset) > std::fabs(worst)) worst = offset, whose = r;
  }
  meet(comm);
  if (comm.rank() != 0) return {};
  if (firsts.size() < 2) return {{Verdict::kOk, "clocks", "one host", ""}};
  const bool apart = std::fabs(worst) > 0.1;
  return {{apart ? Verdict::kWarn : Verdict::kOk, "clocks",
           fmt::format("at most {:.3f} ms from rank 0's ({})", std::fabs(worst) * 1e3,
                       who(world, whose)),
           apart ? "logs of different hosts will not line up: start chrony or ntpd there" : ""}};
}

std::vector<Finding> check_pairs(World& world, Comm& comm, std::vector<PairFigure>& pairs) {
  std::vector<int> ranks(static_cast<size_t>(world.size()));
  for (int r = 0; r < world.size(); ++r) ranks[static_cast<size_t>(r)] = r;
  if (world.size() > kMostRanksOfPairs) {
    ranks = first_ranks(world);
    if (ranks.size() > kMostRanksOfPairs) ranks.resize(kMostRanksOfPairs);
  }
  if (ranks.size() < 2) {
    return {{Verdict::kOk, "pairs",
             "one rank: start it as the job will be (launch/run.sh -np N -- doctor)", ""}};
  }
  // Few: one pair at a time, so that none disturbs another.
  std::vector<std::vector<std::pair<int, int>>> rounds;
  for (const auto& round : rounds_of_pairs(static_cast<int>(ranks.size()))) {
    if (ranks.size() > 8) {
      rounds.push_back(round);
    } else {
      for (const auto& pair : round) rounds.push_back({pair});
    }
  }
  pairs = gather(comm, best_of_turns(world, comm, ranks, rounds));
  if (comm.rank() != 0) return {};
  std::vector<Finding> all;
  for (const bool same_host : {true, false}) {
    const std::string text = summary(pairs, same_host);
    if (!text.empty()) all.push_back({Verdict::kOk, "pairs", text, ""});
  }
  if (static_cast<int>(ranks.size()) < world.size()) {
    all.back().text += fmt::format("; {} of {} ranks", ranks.size(), world.size());
  }
  for (const OddOne& o : odd_ones(pairs)) all.push_back(told(world, o));
  return all;
}

}  // namespace drover
