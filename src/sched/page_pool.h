// Which pages of a replica's KV pool are free. Page ids mean the same on every rank of the replica.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/error.h"

namespace drover {

class PagePool {
 public:
  explicit PagePool(int32_t pages) : pages_(pages) {
    free_.reserve(static_cast<size_t>(pages));
    for (int32_t p = pages; p-- > 0;) free_.push_back(p);
  }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }
  int32_t used() const { return pages_ - free(); }

  // The caller has made sure that a page is free. Last freed, first taken: it is warm.
  int32_t take() {
    DROVER_CHECK(!free_.empty(), ExitCode::kInternal, "no free page left of {}", pages_);
    const int32_t page = free_.back();
    free_.pop_back();
    return page;
  }
  // Takes all of `pages` back and leaves it empty.
  void give_back(std::vector<int32_t>& pages) {
    free_.insert(free_.end(), pages.rbegin(), pages.rend());
    pages.clear();
  }

 private:
  int32_t pages_;
  std::vector<int32_t> free_;
};

}  // namespace drover
