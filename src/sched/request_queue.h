// What is queued with one replica and not admitted yet, in the order of admission.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "sched/scheduler.h"

namespace drover {

struct QueuedRequest {
  double key = 0;        // smaller goes first
  uint64_t arrival = 0;  // over all replicas: decides between equal keys
  std::unique_ptr<Request> request;

  int64_t tokens() const {
    return static_cast<int64_t>(request->prompt.size()) + request->max_new_tokens;
  }
};

inline QueuedRequest make_queued(QueueOrder order, uint64_t arrival, Request r) {
  double key = 0;
  if (order == QueueOrder::kLongest) key = -static_cast<double>(r.prompt.size());
  if (order == QueueOrder::kDeadline) key = r.deadline;
  return {key, arrival, std::make_unique<Request>(std::move(r))};
}

// A binary heap: O(log n) in and out, and a leaf (never the one that is next, unless it is the only
// one) can be given away in O(1). For kArrival pushes come in order and cost O(1).
class RequestQueue {
 public:
  size_t size() const { return heap_.size(); }
  bool empty() const { return heap_.empty(); }
  const QueuedRequest& next() const { return heap_.front(); }

  void push(QueuedRequest q) {
    heap_.push_back(std::move(q));
    std::push_heap(heap_.begin(), heap_.end(), later);
  }
  QueuedRequest pop() {
    std::pop_heap(heap_.begin(), heap_.end(), later);
    return pop_leaf();
  }
  const QueuedRequest& leaf() const { return heap_.back(); }
  QueuedRequest pop_leaf() {
    QueuedRequest q = std::move(heap_.back());
    heap_.pop_back();
    return q;
  }

 private:
  static bool later(const QueuedRequest& a, const QueuedRequest& b) {
    return std::tie(a.key, a.arrival) > std::tie(b.key, b.arrival);
  }
  std::vector<QueuedRequest> heap_;
};

}  // namespace drover
