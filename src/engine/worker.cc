#include "engine/worker.h"

#include <algorithm>
#include <limits>

#include "base/log.h"
#include "engine/fault.h"

namespace drover {

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
      max_pages_((limits.max_positions + limits.page_tokens - 1) / limits.page_tokens) {
  const auto slots = static_cast<size_t>(limits.slots);
  const auto rows = static_cast<size_t>(limits.step_tokens);
  const auto ints = [&](size_t n) { return DeviceArray<int32_t>(backend, n, "step rows"); };
  tokens_ =
      DeviceArray<int32_t>(backend, slots * static_cast<size_t>(max_tokens_), "token buffers");
  page_table_ =
      DeviceArray<int32_t>(backend, slots * static_cast<size_t>(max_pages_), "page tables");
  row_slot_ = ints(rows);
  row_position_ = ints(rows);
  chunk_row_ = ints(rows + 1);
  select_ = ints(rows);
  ids_ = ints(rows);
  sample_slot_ = ints(rows);
  sample_position_ = ints(rows);
  forbid_eos_ = DeviceArray<uint8_t>(backend, rows, "step rows");
  host_ids_.resize(rows);
}

void Worker::run() {
  // Every layer ticks: one that takes an eighth of the longest step is a hang (by default 7 s).
  const int patience = std::max(1, static_cast<int>(limits_.step_seconds / 8));
  uint64_t steps = 0, rows = 0, admitted = 0;
  double seconds = 0;
  for (;;) {
    const StepPlan plan = receive_plan();
    if (plan.stop) break;
    progress_.enter("step", patience);
    const auto begin = Clock::now();
    StepResult result;
    result.step = plan.step;
    step(plan, result);
    result.seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    ++steps;
    rows += static_cast<uint64_t>(result.rows);
    admitted += plan.admitted.size();
    seconds += result.seconds;
    if (reports()) {
      encode(result, bytes_);
      mailbox_.post(0, Mailbox::Channel::kResult, bytes_);
    }
    fault_point("step", rank_, plan.step);
  }
  log::info("worked: {} steps, {} rows, {} sequences, {:.1f} s in steps", steps, rows, admitted,
            seconds);
  // What the last stage sent must be received before communicators are freed.
  take_feedback(std::numeric_limits<int32_t>::max());
}

StepPlan Worker::receive_plan() {
  progress_.enter("waiting for a plan", 30);
  progress_.waiting = true;
  // Idle for as long as the leader likes: it is the watchdog that notices a leader that is gone.
  wait_until([this] { return mailbox_.poll(Mailbox::Channel::kPlan, bytes_, nullptr); },
             Deadline::max(), interrupt_, "waiting for a plan");
  progress_.waiting = false;
  const int first = grid_.first_rank(grid_.replica_of(rank_));
  if (rank_ == first) {  // the replica's first rank hands the plan on to its shards
    for (int r = first + 1; r < first + grid_.replica_ranks(); ++r) {
      mailbox_.post(r, Mailbox::Channel::kPlan, bytes_);
    }
  }
  return decode_plan(bytes_);
}

void Worker::step(const StepPlan& plan, StepResult& result) {
  // First: a slot keeps its group for good, and the last id of its old owner must not land in the
  // prompt of the next one.
  if (decoder_.shard().first()) take_feedback(plan.group);
  slots_.apply(plan);
  if (reports()) outputs_.apply(plan);
  upload(plan);
  slots_.lay_out(plan, layout_);
  const int32_t rows = layout_.rows();
  result.rows = rows;
  if (rows == 0) return;
  DROVER_CHECK(rows <= limits_.step_tokens, ExitCode::kInternal,
               "bad plan: {} rows in a step of at most {}", rows, limits_.step_tokens);
  row_slot_.upload(layout_.row_slot);
  row_position_.upload(layout_.row_position);
  chunk_row_.upload(layout_.chunk_row);
  const StepRows step_rows{.rows = rows,
                           .chunks = layout_.chunks(),
                           .row_slot = row_slot_.data(),
                           .row_position = row_position_.data(),
                           .chunk_row = chunk_row_.data(),
                           .page_table = page_table_.data(),
                           .max_pages = max_pages_};
  decoder_.forward(step_rows, tokens_.data(), max_tokens_);

  const auto& shard = decoder_.shard();
  if (shard.last()) sample(step_rows, result);
  if (!shard.last() && shard.first()) {
    Pending p{.group = plan.group, .slot = {}, .position = {}};
    for (const auto& w : layout_.wanted) {
      if (!w.sampled) continue;
      p.slot.push_back(w.slot);
      p.position.push_back(w.position);
    }
    if (!p.slot.empty()) pending_.push_back(std::move(p));
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
    store(p.slot, p.position);
    pending_.pop_front();
  }
}

void Worker::store(std::span<const int32_t> slot, std::span<const int32_t> position) {
  sample_slot_.upload(slot);
  sample_position_.upload(position);
  backend_.store_tokens(ids_.data(), sample_slot_.data(), sample_position_.data(),
                        static_cast<int64_t>(slot.size()), tokens_.data(), max_tokens_,
                        backend_.stream());
}

// A copy is there once what was queued before it has run.
void Worker::read_back(void* host, const void* device, size_t bytes) {
  backend_.copy_out(host, device, bytes, backend_.stream());
  backend_.wait(backend_.record(backend_.stream()), deadline_in(limits_.step_seconds), interrupt_);
}

// Last stage: the best tokens of the wanted rows, in blocks of logit_rows.
void Worker::sample(const StepRows& rows, StepResult& result) {
  const auto& wanted = layout_.wanted;
  std::vector<int32_t> ids, slot, position;
  for (size_t begin = 0; begin < wanted.size();) {
    const size_t count =
        std::min(wanted.size() - begin, static_cast<size_t>(decoder_.logit_rows()));
    std::vector<int32_t> select(count);
    std::vector<uint8_t> forbid(count);
    for (size_t i = 0; i < count; ++i) {
      select[i] = wanted[begin + i].row;
      forbid[i] = wanted[begin + i].first ? 1 : 0;
    }
    select_.upload(select);
    forbid_eos_.upload(forbid);
    decoder_.logits(rows, select_.data(), static_cast<int64_t>(count));
    report_logits(static_cast<int32_t>(begin), static_cast<int32_t>(count), result);
    decoder_.sample(static_cast<int64_t>(count), forbid_eos_.data(), ids_.data());
    read_back(host_ids_.data(), ids_.data(), count * sizeof(int32_t));
    for (size_t i = 0; i < count; ++i) {
      const auto& w = wanted[begin + i];
      if (!w.sampled) continue;
      DROVER_CHECK(host_ids_[i] >= 0, ExitCode::kBadInput,
                   "sequence {}, position {}: no logit is a number: the model's weights hold NaN "
                   "or infinities, or overflow; import the model again",
                   slots_.slot(w.slot).id, w.position);
      ids.push_back(host_ids_[i]);
      slot.push_back(w.slot);
      position.push_back(w.position);
      if (reports()) {
        outputs_.add(slots_.slot(w.slot), w.slot, w.position, host_ids_[i], result);
      }
    }
    begin += count;
  }
  if (ids.empty()) return;
  ids_.upload(ids);
  if (decoder_.shard().first()) {
    store(slot, position);
  } else {
    comms_.feedback->send(ids_.data(), ids.size() * sizeof(int32_t), 0, backend_.stream());
  }
}

// For tests and `drover logits`: rows of sequences that asked for them, all shards put together.
void Worker::report_logits(int32_t first_wanted, int32_t count, StepResult& result) {
  const auto& shard = decoder_.shard();
  const auto* w = layout_.wanted.data() + first_wanted;
  if (std::none_of(w, w + count, [&](const auto& x) { return slots_.slot(x.slot).want_logits; })) {
    return;
  }
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
    const Slot& s = slots_.slot(w[r].slot);
    if (!s.want_logits) continue;
    LogitsBlock block{.id = s.id,
                      .start = w[r].position - 1,
                      .vocab = static_cast<int32_t>(vocab),
                      .logits = std::vector<float>(vocab)};
    for (size_t v = 0; v < vocab; ++v) {
      block.logits[v] = all[(v / part * static_cast<size_t>(count) + r) * part + v % part];
    }
    result.logits.push_back(std::move(block));
  }
}

}  // namespace drover
