#include "gather_trace.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/log.h"
#include "base/trace.h"

namespace drover {

namespace {

constexpr int kProbes = 32;
// MPI counts bytes in an int.
constexpr size_t kMostBytes = size_t{1} << 30;

// This rank's offset to rank 0's clock. Rank 0 answers one rank of another host after the other.
int64_t clock_offset(World& world, Comm& all) {
  const auto& peers = world.peers();
  trace::ClockProbe probe;
  for (int r = 1; r < world.size(); ++r) {
    if (peers[static_cast<size_t>(r)].host == peers[0].host) continue;
    for (int i = 0; i < kProbes; ++i) {
      int64_t time = 0;
      if (world.rank() == 0) {
        all.recv(&time, sizeof(time), r, nullptr);
        time = trace::now_ns();
        all.send(&time, sizeof(time), r, nullptr);
      } else if (world.rank() == r) {
        const int64_t sent = trace::now_ns();
        all.send(&sent, sizeof(sent), 0, nullptr);
        all.recv(&time, sizeof(time), 0, nullptr);
        probe.sample(sent, time, trace::now_ns());
      }
    }
  }
  return probe.offset_ns;
}

}  // namespace

std::vector<std::string> gather_texts(std::string mine, World& world, Comm& all) {
  const auto size = static_cast<uint64_t>(mine.size());
  std::vector<uint64_t> sizes(static_cast<size_t>(world.size()));
  all.all_gather(&size, sizes.data(), sizeof(size), nullptr);
  if (world.rank() != 0) {
    if (size > 0) all.send(mine.data(), mine.size(), 0, nullptr);
    return {};
  }
  std::vector<std::string> texts{std::move(mine)};
  for (int r = 1; r < world.size(); ++r) {
    std::string text(sizes[static_cast<size_t>(r)], ' ');
    if (!text.empty()) all.recv(text.data(), text.size(), r, nullptr);
    texts.push_back(std::move(text));
  }
  return texts;
}

void gather_trace(const std::string& file, World& world, Comm& all) {
  trace::stop();
  const int64_t offset = clock_offset(world, all);
  int64_t begin = trace::started_ns();
  all.broadcast(&begin, sizeof(begin), 0, nullptr);
  std::string mine = trace::take_json_events(world.rank(), offset - begin);
  if (mine.size() > kMostBytes) {
    log::warn("the trace of this rank is {} bytes, too many to send: left out", mine.size());
    mine.clear();
  }
  const auto events = gather_texts(std::move(mine), world, all);
  if (world.rank() == 0) trace::write(file, events);
}

}  // namespace drover
