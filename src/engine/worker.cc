#include "engine/worker.h"

#include <algorithm>
#include <limits>

#include "base/log.h"
#include "base/trace.h"
#include "engine/fault.h"

namespace drover {

namespace {

int32_t max_pages(const WorkerLimits& l) {
  return (l.max_positions + l.page_tokens - 1) / l.page_tokens;
}

double seconds_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

int64_t nanoseconds(Clock::time_point t) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(t.time_since_epoch()).count();
}

}  // namespace

Worker::Worker(Decoder& decoder, Backend& backend, const ShardComms& comms, Mailbox& mailbox,
               const Grid& grid, int rank, const WorkerLimits& limits, Interrupt& interrupt,
               Progress& progress)
    : decoder_(decoder),
      backend_(backend),
      comms_(comms),
      mailbox_(mailbox),
      grid_(grid),
      rank_(rank),
      limits_(limits),
      interrupt_(interrupt),
      progress_(progress),
      slots_(limits.slots, limits.max_positions, limits.page_tokens, limits.pages),
      outputs_(limits.slots, decoder.architecture().eos_ids),
      max_tokens_(limits.max_positions),
      max_pages_(max_pages(limits)),
      arrays_(backend, limits.step_tokens),
      split_(backend.stream() == nullptr) {
  const auto slots = static_cast<size_t>(limits.slots);
  const auto rows = static_cast<size_t>(limits.step_tokens);
  const auto ints = [&](size_t n) { return DeviceArray<int32_t>(backend, n, "step rows"); };
  tokens_ =
      DeviceArray<int32_t>(backend, slots * static_cast<size_t>(max_tokens_), "token buffers");
  page_table_ =
      DeviceArray<int32_t>(backend, slots * static_cast<size_t>(max_pages_), "page tables");
  ids_ = ints(rows);
  stored_slot_ = ints(rows);
  stored_position_ = ints(rows);
  limits_.replay = limits.replay && backend.replay_rows(1) > 0 && comms.tensor->capturable();
}

// They hold communicators, which would otherwise wait for them.
Worker::~Worker() { backend_.forget_replays(); }

size_t Worker::buffer_bytes(const WorkerLimits& l) {
  const auto slots = static_cast<size_t>(l.slots);
  const auto ints = slots * static_cast<size_t>(l.max_positions + max_pages(l)) +
                    3 * static_cast<size_t>(l.step_tokens);
  return ints * sizeof(int32_t) + StepArrays::bytes(l.step_tokens);
}

void Worker::prepare() {
  if (!limits_.replay) return;
  const int32_t most =
      std::min((limits_.slots + limits_.groups - 1) / limits_.groups, limits_.step_tokens);
  StepLayout nobody;
  nobody.chunk_row = {0};
  int32_t recorded = 0;
  for (int32_t rows = 1; rows <= most; ++rows) {
    const int32_t padded = backend_.replay_rows(rows);
    // Recorded already, or past the step's room: then such steps run as they are.
    if (padded == recorded || padded > limits_.step_tokens) continue;
    recorded = padded;
    arrays_.upload(nobody, padded);
    const StepRows step{.rows = padded,
                        .chunks = padded,
                        .decode_rows = padded,
                        .row_slot = arrays_.row_slot(),
                        .row_position = arrays_.row_position(),
                        .chunk_row = arrays_.chunk_row(),
                        .page_table = page_table_.data(),
                        .max_pages = max_pages_};
    backend_.replay(static_cast<uint64_t>(padded), [&] { work(step, padded); });
    backend_.wait(backend_.record(backend_.stream()), deadline_in(limits_.step_seconds),
                  interrupt_);
    progress_.tick();
  }
}

void Worker::run() {
  backend_.enter_thread();
  for (;;) {
    if (running_.empty()) {
      progress_.enter("waiting for a plan", 30);
      progress_.waiting = true;
    }
    // Idle for as long as the leader likes: it is the watchdog that notices a leader that is gone.
    bool plan_there = false, step_done = false;
    const bool idle = running_.empty();
    const auto deadline = running_.empty() ? Deadline::max() : step_deadline();
    wait_until(
        [&] {
          // Results first: the leader plans the next step by them.
          step_done = !running_.empty() &&
                      (!running_.front()->queued || backend_.done(running_.front()->event));
          plan_there = !step_done && poll_plan();
          if (idle && !plan_there) read_energy_when_idle();
          return step_done || plan_there;
        },
        deadline, interrupt_,
        running_.empty() ? "waiting for a plan" : "a step of the device (raise --step-seconds)");
    progress_.waiting = false;
    if (step_done) {
      finish();
      continue;
    }
    StepPlan plan = decode_plan(bytes_);
    if (plan.stop) break;
    if (plan.tell_times) {
      tell_times(plan.step);
      continue;
    }
    const auto now = Clock::now();
    begin_times(now, idle);
    start(plan, now);
  }
  log::info("worked: {} steps, {} rows, {} sequences, {:.1f} s in steps", steps_done_, rows_done_,
            admitted_, seconds_);
  // What the last stage sent must be received before communicators are freed.
  take_feedback(std::numeric_limits<int32_t>::max());
  backend_.wait(backend_.record(backend_.stream()), deadline_in(limits_.step_seconds), interrupt_);
}

// The first of the queued steps began when it was queued, or when the one before it ended.
Deadline Worker::step_deadline() const {
  return std::max(running_.front()->begin, last_end_) +
         std::chrono::duration_cast<Clock::duration>(
             std::chrono::duration<double>(limits_.step_seconds));
}

// A plan with a step has come. The wait for it counts, unless it is the first: what went before the
// first step is no part of the work.
void Worker::begin_times(Clock::time_point now, bool idle) {
  if (times_.any) {
    if (idle) times_.plan_wait += seconds_between(last_end_, now);
    return;
  }
  times_ = {.any = true,
            .begin = now,
            .end = now,
            .communication_ns = progress_.communication_ns,
            .receive_ns = progress_.receive_ns};
  times_.energy_begin = read_energy();
}

void Worker::count_energy(RankTimes::Meter how, std::unique_ptr<EnergyMeter> meter) {
  meter_how_ = how;
  meter_ = std::move(meter);
}

std::optional<Worker::Energy> Worker::read_energy() {
  if (!meter_) return std::nullopt;
  const auto joules = meter_->joules();
  meter_read_ = Clock::now();
  if (!joules) return std::nullopt;
  return Energy{meter_read_, *joules};
}

// Soon after the last step, not when LoadGen has written its logs and the leader asks; but not
// between steps, where a plan would wait for the driver's answer.
void Worker::read_energy_when_idle() {
  constexpr auto kPause = std::chrono::milliseconds(50);
  if (!meter_ || !times_.any || times_.energy_end || Clock::now() - last_end_ < kPause) return;
  times_.energy_end = read_energy();
}

void Worker::tell_energy(RankTimes& t) {
  if (times_.any && !times_.energy_end) times_.energy_end = read_energy();
  t.meter = meter_how_;
  if (meter_how_ != RankTimes::Meter::kCounted) return;
  if (!times_.energy_begin || !times_.energy_end) {
    t.meter = RankTimes::Meter::kAbsent;
    return;
  }
  t.joules = times_.energy_end->joules - times_.energy_begin->joules;
  t.joules_seconds = seconds_between(times_.energy_begin->at, times_.energy_end->at);
}

// The leader asks when it has all results; this rank's part of the last steps may still run.
void Worker::tell_times(uint64_t asking) {
  while (!running_.empty()) {
    const Running& first = *running_.front();
    if (first.queued) backend_.wait(first.event, step_deadline(), interrupt_);
    finish();
  }
  RankTimes t{.asking = asking, .rank = rank_, .split = split_, .steps = times_.steps};
  t.seconds = seconds_between(times_.begin, times_.end);
  t.plan_wait = times_.plan_wait;
  if (split_) {
    const auto part = [](int64_t from, int64_t to) { return static_cast<double>(to - from) / 1e9; };
    t.communication = part(times_.communication_ns, times_.communication_end_ns);
    t.stage_wait = part(times_.receive_ns, times_.receive_end_ns);
    t.compute = times_.work - times_.work_waits;
    t.host = t.seconds - t.compute - t.communication - t.stage_wait - t.plan_wait;
  } else {
    t.device = times_.device;
    t.host = times_.host;
  }
  tell_energy(t);
  encode(t, bytes_);
  mailbox_.post(0, Mailbox::Channel::kTimes, bytes_);
  times_ = {};
}

bool Worker::poll_plan() {
  if (!mailbox_.poll(Mailbox::Channel::kPlan, bytes_, nullptr)) return false;
  const int first = grid_.first_rank(grid_.replica_of(rank_));
  if (rank_ == first) {  // the replica's first rank hands the plan on to its shards
    for (int r = first + 1; r < first + grid_.replica_ranks(); ++r) {
      mailbox_.post(r, Mailbox::Channel::kPlan, bytes_);
    }
  }
  return true;
}

void Worker::start(StepPlan& plan, Clock::time_point now) {
  const trace::Scope scope("queue a step", {"step", static_cast<int64_t>(plan.step)});
  // Every layer ticks: one that takes an eighth of the longest step is a hang (by default 7 s).
  progress_.enter("step", std::max(1, static_cast<int>(limits_.step_seconds / 8)));
  auto running = std::make_unique<Running>();
  running->begin = now;
  running->result.step = plan.step;
  // First: a slot keeps its group for good, and the last id of its old owner must not land in the
  // prompt of the next one.
  if (decoder_.shard().first()) take_feedback(plan.group);
  slots_.apply(plan);
  upload(plan);
  slots_.lay_out(plan, layout_);
  if (layout_.rows() > 0) queue(plan, *running);
  running->admitted = std::move(plan.admitted);
  running_.push_back(std::move(running));
  if (!split_) times_.host += seconds_between(running_.back()->begin, Clock::now());
  // While the device works for a peer, it is not this rank that hangs.
  progress_.waiting = grid_.replica_ranks() > 1;
}

// The first of the queued steps has run.
void Worker::finish() {
  const std::unique_ptr<Running> r = std::move(running_.front());
  running_.pop_front();
  const auto now = Clock::now();
  StepResult& result = r->result;
  const trace::Scope scope("report a step", {"step", static_cast<int64_t>(result.step)});
  const auto begin = std::max(r->begin, last_end_);
  result.seconds = std::chrono::duration<double>(now - begin).count();
  last_end_ = now;
  if (r->queued && trace::on()) {
    static const int steps = trace::track("steps", "step");
    trace::span(steps, r->decodes ? "decode step" : "mixed step", nanoseconds(begin),
                nanoseconds(now), {"step", static_cast<int64_t>(result.step)},
                {"rows", result.rows});
  }
  ++steps_done_;
  rows_done_ += static_cast<uint64_t>(result.rows);
  admitted_ += r->admitted.size();
  seconds_ += result.seconds;
  progress_.tick();
  if (reports()) {
    outputs_.admit(r->admitted);
    for (size_t i = 0; i < r->wanted.size(); ++i) {
      outputs_.add(r->wanted[i].slot, r->wanted[i].position, r->ids[i], result);
    }
    encode(result, bytes_);
    mailbox_.post(0, Mailbox::Channel::kResult, bytes_);
  }
  if (r->queued) {
    ++times_.steps;
    times_.device += result.seconds;
  }
  times_.end = split_ ? now : Clock::now();
  times_.communication_end_ns = progress_.communication_ns;
  times_.receive_end_ns = progress_.receive_ns;
  if (!split_) times_.host += seconds_between(now, times_.end);
  times_.energy_end.reset();
  // A counter that wraps is read in time.
  if (meter_ && now - meter_read_ > std::chrono::minutes(1)) read_energy();
  fault_point("step", rank_, result.step);
}

void Worker::queue(const StepPlan& plan, Running& running) {
  const int32_t rows = layout_.rows();
  running.result.rows = rows;
  DROVER_CHECK(rows <= limits_.step_tokens, ExitCode::kInternal,
               "bad plan: {} rows in a step of at most {}", rows, limits_.step_tokens);
  const bool decodes = layout_.decode_rows == rows && layout_.looked_at.empty();
  const int32_t recorded = decodes && limits_.replay ? backend_.replay_rows(rows) : 0;
  const bool replays = recorded > 0 && recorded <= limits_.step_tokens;
  const int32_t padded = replays ? recorded : rows;
  arrays_.upload(layout_, padded);
  const StepRows step{.rows = padded,
                      .chunks = layout_.chunks() + padded - rows,
                      .decode_rows = layout_.decode_rows + padded - rows,
                      .row_slot = arrays_.row_slot(),
                      .row_position = arrays_.row_position(),
                      .chunk_row = arrays_.chunk_row(),
                      .page_table = page_table_.data(),
                      .max_pages = max_pages_};
  const auto& shard = decoder_.shard();
  const auto wanted = static_cast<int32_t>(layout_.wanted.size());
  const auto waits = [&] { return progress_.communication_ns + progress_.receive_ns; };
  const auto work_begin = Clock::now();
  const int64_t waits_begin = waits();
  decoder_.receive(rows);
  if (replays) {
    backend_.replay(static_cast<uint64_t>(padded), [&] { work(step, padded); });
  } else {
    work(step, wanted);
  }
  decoder_.send(rows);

  if (shard.last()) {
    if (!layout_.looked_at.empty()) report_logits(running.result);
    if (!shard.first() && wanted > 0) {
      comms_.feedback->send(ids_.data(), layout_.wanted.size() * sizeof(int32_t), 0,
                            backend_.stream());
    }
    if (reports() && wanted > 0) {
      running.wanted = layout_.wanted;
      running.ids.resize(layout_.wanted.size());
      backend_.copy_out(running.ids.data(), ids_.data(), running.ids.size() * sizeof(int32_t),
                        backend_.stream());
    }
  } else if (shard.first() && wanted > 0) {
    Pending p{.group = plan.group, .slot = {}, .position = {}};
    for (const auto& w : layout_.wanted) {
      p.slot.push_back(w.slot);
      p.position.push_back(w.position);
    }
    pending_.push_back(std::move(p));
  }
  times_.work += seconds_between(work_begin, Clock::now());
  times_.work_waits += static_cast<double>(waits() - waits_begin) / 1e9;
  running.event = backend_.record(backend_.stream());
  running.queued = true;
  running.decodes = decodes;
}

// What is replayed: nothing here may depend on the host but through `rows` and `wanted`.
void Worker::work(const StepRows& rows, int32_t wanted) {
  decoder_.layers(rows, tokens_.data(), max_tokens_);
  if (!decoder_.shard().last()) return;
  for (int32_t begin = 0; begin < wanted;) {
    const auto count =
        static_cast<int32_t>(std::min<int64_t>(wanted - begin, decoder_.logit_rows()));
    decoder_.logits(arrays_.select() + begin, count);
    decoder_.sample(count, arrays_.forbid_eos() + begin, ids_.data() + begin);
    begin += count;
  }
  if (decoder_.shard().first() && wanted > 0) {
    backend_.store_tokens(ids_.data(), arrays_.sample_slot(), arrays_.sample_position(), wanted,
                          tokens_.data(), max_tokens_, backend_.stream());
  }
}

void Worker::upload(const StepPlan& plan) {
  if (decoder_.shard().first()) {
    for (const auto& a : plan.admitted) {
      tokens_.upload(a.prompt, static_cast<size_t>(a.slot) * static_cast<size_t>(max_tokens_));
    }
  }
  for (const auto& g : plan.grants) {
    DROVER_CHECK(g.first_index + static_cast<int32_t>(g.pages.size()) <= max_pages_,
                 ExitCode::kInternal, "bad plan: slot {} has more than {} pages", g.slot,
                 max_pages_);
    page_table_.upload(g.pages, static_cast<size_t>(g.slot) * static_cast<size_t>(max_pages_) +
                                    static_cast<size_t>(g.first_index));
  }
}

// A group's step needs what its earlier steps sampled; ids come in step order.
void Worker::take_feedback(int32_t group) {
  const auto all = group == std::numeric_limits<int32_t>::max();
  const auto last = std::find_if(pending_.rbegin(), pending_.rend(),
                                 [&](const Pending& p) { return all || p.group == group; });
  const auto count = static_cast<size_t>(std::distance(last, pending_.rend()));
  for (size_t i = 0; i < count; ++i) {
    const Pending& p = pending_.front();
    comms_.feedback->recv(ids_.data(), p.slot.size() * sizeof(int32_t), decoder_.shard().pp - 1,
                          backend_.stream());
    stored_slot_.upload(p.slot);
    stored_position_.upload(p.position);
    backend_.store_tokens(ids_.data(), stored_slot_.data(), stored_position_.data(),
                          static_cast<int64_t>(p.slot.size()), tokens_.data(), max_tokens_,
                          backend_.stream());
    pending_.pop_front();
  }
}

// A copy is there once what was queued before it has run.
void Worker::read_back(void* host, const void* device, size_t bytes) {
  backend_.copy_out(host, device, bytes, backend_.stream());
  backend_.wait(backend_.record(backend_.stream()), deadline_in(limits_.step_seconds), interrupt_);
}

// For tests and `drover logits`, which wait for the device: rows of sequences that asked for their
// logits, in blocks.
void Worker::report_logits(StepResult& result) {
  const std::span<const WantedRow> all = layout_.looked_at;
  DeviceArray<int32_t> select(backend_, static_cast<size_t>(decoder_.logit_rows()), "logits");
  for (size_t begin = 0; begin < all.size();) {
    const auto block = all.subspan(
        begin, std::min(all.size() - begin, static_cast<size_t>(decoder_.logit_rows())));
    std::vector<int32_t> rows;
    for (const auto& w : block) rows.push_back(w.row);
    select.upload(rows);
    decoder_.logits(select.data(), static_cast<int64_t>(rows.size()));
    report_block(block, result);
    begin += block.size();
  }
}

// The logits just computed, all shards put together.
void Worker::report_block(std::span<const WantedRow> wanted, StepResult& result) {
  const auto& shard = decoder_.shard();
  const auto count = static_cast<int32_t>(wanted.size());
  const auto vocab = static_cast<size_t>(decoder_.architecture().vocab);
  const size_t part = (vocab + static_cast<size_t>(shard.tp) - 1) / static_cast<size_t>(shard.tp);
  const auto own = static_cast<size_t>(shard.vocab.size());
  std::vector<float> mine(static_cast<size_t>(count) * own);
  read_back(mine.data(), decoder_.logits_data(), mine.size() * sizeof(float));
  // Shards may differ in width by the remainder: gathered at the widest.
  std::vector<float> wide(static_cast<size_t>(count) * part);
  for (size_t r = 0; r < static_cast<size_t>(count); ++r) {
    std::copy_n(mine.data() + r * own, own, wide.data() + r * part);
  }
  DeviceArray<float> in(backend_, wide.size(), "gathered logits");
  DeviceArray<float> out(backend_, wide.size() * static_cast<size_t>(shard.tp), "gathered logits");
  in.upload(wide);
  comms_.tensor->all_gather(in.data(), out.data(), wide.size() * sizeof(float), backend_.stream());
  std::vector<float> all(out.size());
  read_back(all.data(), out.data(), all.size() * sizeof(float));
  if (!reports()) return;
  for (size_t r = 0; r < static_cast<size_t>(count); ++r) {
    LogitsBlock block{.id = slots_.slot(wanted[r].slot).id,
                      .start = wanted[r].position - 1,
                      .vocab = static_cast<int32_t>(vocab),
                      .logits = std::vector<float>(vocab)};
    for (size_t v = 0; v < vocab; ++v) {
      block.logits[v] = all[(v / part * static_cast<size_t>(count) + r) * part + v % part];
    }
    result.logits.push_back(std::move(block));
  }
}

}  // namespace drover
