// The loop of one rank: a plan comes, its rows are queued on the device, a result goes once they
// have run. The next plan's rows are queued behind, so that the device never waits for the host:
// sampled ids go from the device's argmax to the device's token buffers.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "comm/grid.h"
#include "comm/world.h"
#include "engine/decoder.h"
#include "engine/outputs.h"
#include "engine/slots.h"
#include "engine/step_arrays.h"
#include "machine/energy.h"
#include "sched/step.h"

namespace drover {

struct WorkerLimits {
  int32_t slots = 64;
  int32_t groups = 1;
  int32_t max_positions = 0;
  int32_t step_tokens = 512;  // rows of a step at most
  int32_t page_tokens = 16;
  int32_t pages = 0;
  double step_seconds = 60;  // longest step; an eighth of it without progress is a hang
  bool replay = true;        // record decode steps and replay them (Backend::replay)
};

class Worker {
 public:
  // Runs on the thread that calls run(); `rank` is this rank of the world's grid.
  Worker(Decoder& decoder, Backend& backend, const ShardComms& comms, Mailbox& mailbox,
         const Grid& grid, int rank, const WorkerLimits& limits, Interrupt& interrupt,
         Progress& progress);

  ~Worker();  // forgets the records
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Records the steps that will be replayed and runs each once, on rows that are all padding.
  // Every rank of the replica at once.
  void prepare();
  // How RankTimes come to an energy: kCounted with a meter, read by the worker's thread.
  void count_energy(RankTimes::Meter how, std::unique_ptr<EnergyMeter> meter);
  // Until a plan says stop. Throws what went wrong; the caller raises the interrupt.
  void run();

  // Device memory of the token buffers, page tables and step arrays.
  static size_t buffer_bytes(const WorkerLimits& limits);

 private:
  // A step whose rows are queued on the device and may not have run yet.
  struct Running {
    StepResult result;
    std::vector<Admission> admitted;
    std::vector<WantedRow> wanted;
    std::vector<int32_t> ids;  // of the wanted rows, once the event is done
    DeviceEvent event;
    bool queued = false;   // on the device: there is an event
    bool decodes = false;  // no rows of prompts
    Clock::time_point begin;
  };
  // Sampled ids on their way from the last stage to the first.
  struct Pending {
    int32_t group = 0;
    std::vector<int32_t> slot, position;
  };

  struct Energy {
    Clock::time_point at;
    double joules = 0;
  };

  // Where this thread's time went since the leader last asked.
  struct Times {
    bool any = false;  // a plan with a step has come
    Clock::time_point begin, end;
    int64_t communication_ns = 0, receive_ns = 0;  // Progress's, at begin
    int64_t communication_end_ns = 0, receive_end_ns = 0;
    uint64_t steps = 0;
    double work = 0;        // in queue()
    double work_waits = 0;  // of it, in communicators
    double plan_wait = 0, device = 0, host = 0;
    std::optional<Energy> energy_begin{}, energy_end{};  // the end: not while steps run
  };

  bool poll_plan();
  void tell_times(uint64_t asking);
  void begin_times(Clock::time_point now, bool idle);
  std::optional<Energy> read_energy();
  void read_energy_when_idle();
  void tell_energy(RankTimes& t);
  void start(StepPlan& plan, Clock::time_point now);
  void finish();
  Deadline step_deadline() const;
  void queue(const StepPlan& plan, Running& running);
  void upload(const StepPlan& plan);
  void take_feedback(int32_t group);
  void work(const StepRows& rows, int32_t wanted);
  void read_back(void* host, const void* device, size_t bytes);
  void report_logits(StepResult& result);
  void report_block(std::span<const WantedRow> wanted, StepResult& result);
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
  std::deque<std::unique_ptr<Running>> running_;
  std::deque<Pending> pending_;
  int64_t max_tokens_;  // of a slot's token buffer
  int32_t max_pages_;   // of a slot's page table
  Clock::time_point last_end_{};

  DeviceArray<int32_t> tokens_;      // [slots, max_tokens]
  DeviceArray<int32_t> page_table_;  // [slots, max_pages]
  StepArrays arrays_;
  DeviceArray<int32_t> ids_;  // [step_tokens] best tokens of the wanted rows
  DeviceArray<int32_t> stored_slot_, stored_position_;  // [step_tokens] of fed back ids
  std::vector<std::byte> bytes_;
  uint64_t rows_done_ = 0, steps_done_ = 0, admitted_ = 0;
  double seconds_ = 0;
  bool split_;  // the host's times are the device's: a CPU rank
  Times times_;
  RankTimes::Meter meter_how_ = RankTimes::Meter::kAbsent;
  std::unique_ptr<EnergyMeter> meter_;
  Clock::time_point meter_read_{};
};

}  // namespace drover
