// The loop of one rank: a plan comes, its rows run, a result goes.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "comm/grid.h"
#include "comm/world.h"
#include "engine/decoder.h"
#include "engine/outputs.h"
#include "engine/slots.h"

namespace drover {

struct WorkerLimits {
  int32_t slots = 64;
  int32_t max_positions = 0;
  int32_t step_tokens = 512;  // rows of a step at most
  int32_t page_tokens = 16;
  int32_t pages = 0;
  double step_seconds = 60;  // longest step; an eighth of it without progress is a hang
};

class Worker {
 public:
  // Runs on the thread that calls run(); `rank` is this rank of the world's grid.
  Worker(Decoder& decoder, Backend& backend, const ShardComms& comms, Mailbox& mailbox,
         const Grid& grid, int rank, const WorkerLimits& limits, Interrupt& interrupt,
         Progress& progress);

  // Until a plan says stop. Throws what went wrong; the caller raises the interrupt.
  void run();

 private:
  // Sampled ids on their way from the last stage to the first.
  struct Pending {
    int32_t group = 0;
    std::vector<int32_t> slot, position;
  };

  StepPlan receive_plan();
  void step(const StepPlan& plan, StepResult& result);
  void upload(const StepPlan& plan);
  void take_feedback(int32_t group);
  void store(std::span<const int32_t> slot, std::span<const int32_t> position);
  void read_back(void* host, const void* device, size_t bytes);
  void sample(const StepRows& rows, StepResult& result);
  void report_logits(int32_t first_wanted, int32_t rows, StepResult& result);
  bool reports() const { return decoder_.shard().last() && decoder_.shard().tp_slot == 0; }

  Decoder& decoder_;
  Backend& backend_;
  ShardComms comms_;
  Mailbox& mailbox_;
  Grid grid_;
  int rank_;
  WorkerLimits limits_;
  Interrupt& interrupt_;
  Progress& progress_;

  Slots slots_;
  Outputs outputs_;
  StepLayout layout_;
  std::deque<Pending> pending_;
  int64_t max_tokens_;  // of a slot's token buffer
  int32_t max_pages_;   // of a slot's page table

  DeviceArray<int32_t> tokens_;      // [slots, max_tokens]
  DeviceArray<int32_t> page_table_;  // [slots, max_pages]
  DeviceArray<int32_t> row_slot_, row_position_, chunk_row_;
  DeviceArray<int32_t> select_;  // [step_tokens] rows whose logits are wanted
  DeviceArray<int32_t> ids_;     // [step_tokens] their best tokens
  DeviceArray<int32_t> sample_slot_, sample_position_;
  DeviceArray<uint8_t> forbid_eos_;
  std::vector<int32_t> host_ids_;
  std::vector<std::byte> bytes_;
};

}  // namespace drover
