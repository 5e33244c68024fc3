// What tests of GPU ranks under mpirun have in common: the world, this rank's device, vectors on
// it, and a main in which all ranks fail together.
#pragma once

#include <gtest/gtest.h>

#include <cstdio>
#include <vector>

#include "comm/device.h"
#include "comm/world.h"

namespace drover {

inline World* g_world = nullptr;
inline CommDevice* g_device = nullptr;
inline const Interrupt g_none;

// A vector on the GPU.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& host)
      : count_(host.size()), data_(g_device->alloc(bytes())) {
    g_device->copy_in(data_, host.data(), bytes());
  }
  ~Array() { g_device->free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return count_ * sizeof(T); }
  std::vector<T> host() const {
    std::vector<T> all(count_);
    g_device->copy_out(all.data(), data_, bytes());
    return all;
  }

 private:
  size_t count_;
  void* data_;
};

// run_tests(world): makes g_device and runs them; how many failed.
inline int run_ranks_tests(int argc, char** argv, int (*run_tests)(World&)) {
  testing::InitGoogleTest(&argc, argv);
  World world;
  g_world = &world;
  // One rank speaks; all fail together.
  if (world.rank() != 0) {
    delete testing::UnitTest::GetInstance()->listeners().Release(
        testing::UnitTest::GetInstance()->listeners().default_result_printer());
  }
  int failed = 1;
  try {
    failed = run_tests(world);
  } catch (const std::exception& e) {
    fprintf(stderr, "rank %d: %s\n", world.rank(), e.what());
  }
  const auto worst = -world.agree_min(-static_cast<int64_t>(failed), g_none, 60);
  if (failed != 0) fprintf(stderr, "rank %d: tests failed\n", world.rank());
  return static_cast<int>(worst);
}

}  // namespace drover
