#include "backend/cpu/cpu_backend.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "backend/cpu/dnnl_linear.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_pages.h"
#include "base/error.h"
#include "base/formats.h"
#include "base/host.h"
#include "base/log.h"

namespace drover {
namespace {

using cpu::AttentionScratch;
using cpu::AttentionTask;
using cpu::Kernels;

// The table as the store has it; rows are dequantized as they are looked up.
class StoredEmbedding : public Embedding {
 public:
  WeightTensor table;
};

// Cosines and sines of a step's positions, kept from layer to layer.
struct RopeAngles {
  std::vector<float> frequencies;
  std::vector<int32_t> positions;
  std::vector<float> cos_sin;  // [rows, rope_dims]: the cosines, then the sines
};

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuOptions& options)
      : threads_(options.threads),
        kernels_(cpu::choose_kernels()),
        linears_(options.linear_type, options.threads, kernels_),
        scratch_(static_cast<size_t>(options.threads)) {
    // libgomp reads this once, before main: it cannot be set from here.
    if (threads_ > 1 && std::getenv("OMP_WAIT_POLICY") == nullptr &&
        std::getenv("GOMP_SPINCOUNT") == nullptr)
      log::info("idle OpenMP threads will spin: set OMP_WAIT_POLICY=passive in the environment");
  }

  std::string name() const override { return "cpu"; }
  std::string description() const override {
    return fmt::format("cpu: {}, kernels {}, linears {}, {} thread{}", cpu::dnnl_description(),
                       kernels_.name, linears_.description(), threads_, threads_ == 1 ? "" : "s");
  }
  Dtype activation_dtype() const override { return Dtype::kF32; }
  int64_t padded_rows(int64_t rows) const override { return linears_.padded_rows(rows); }
  Stream stream() override { return nullptr; }
  void enter_thread() override {}

  void* alloc(size_t bytes, std::string_view purpose) override;
  void free(void* p) noexcept override { std::free(p); }
  void copy_in(void* device, const void* host, size_t bytes, Stream) override {
    if (bytes > 0) std::memcpy(device, host, bytes);
  }
  void copy_out(void* host, const void* device, size_t bytes, Stream) override {
    if (bytes > 0) std::memcpy(host, device, bytes);
  }
  void copy(void* to, const void* from, size_t bytes, Stream) override {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  // Operations are done when they return.
  DeviceEvent record(Stream) override { return {}; }
  bool done(DeviceEvent) override { return true; }
  void wait(DeviceEvent, Deadline, const Interrupt& interrupt) override { interrupt.check(); }
  void replay(uint64_t, const std::function<void()>& operations) override { operations(); }
  void forget_replays() override {}
  int32_t replay_rows(int32_t) const override { return 0; }
  Memory memory() const override { return {memory_total_bytes(), memory_total_bytes()}; }

  bool makes_weights() const override { return false; }
  std::unique_ptr<Linear> load_linear(std::span<const WeightTensor> parts) override {
    return linears_.load(parts);
  }
  std::unique_ptr<Linear> load_gate_up(std::span<const WeightTensor> parts) override {
    return linears_.load(parts);
  }
  std::unique_ptr<Embedding> load_embedding(const WeightTensor& table) override;
  void loaded() override {}
  std::unique_ptr<Linear> library_linear(int64_t, int64_t) override { return nullptr; }
  std::vector<LinearWay> linear_ways(const Linear&, int64_t) override { return {}; }
  void run_linear_as(Linear&, const LinearWay* way) override {
    DROVER_CHECK(way == nullptr, ExitCode::kInternal, "the CPU's linears have one way");
  }
  void embed(const Embedding& table, int64_t vocab_begin, const int32_t* tokens, int64_t max_tokens,
             const StepRows& step, void* out, Stream) override;
  void norm(const Norm& a, Stream) override;
  PeerSums peer_sums(int, int64_t) const override { return {}; }
  void linear(const Linear& w, const LinearInput& in, void* out, int64_t rows, bool,
              Stream) override {
    linears_.run(w, static_cast<const float*>(in.data), static_cast<float*>(out), rows);
  }
  void gather_columns(const void* in, int64_t segments, int64_t segment_cols, const int32_t* index,
                      const LinearInput& out, int64_t rows, int64_t cols, Stream) override;
  void rope_append(const RopeAppend& a, const StepRows& step, Stream) override;
  void attention(const Attention& a, const StepRows& step, Stream) override;
  void silu_gate(const void* in, const LinearInput& out, int64_t rows, int64_t features,
                 Stream) override;
  void gate_up(const Linear& w, const LinearInput& in, void* scratch, const LinearInput& out,
               int64_t rows, Stream s) override {
    linear(w, in, scratch, rows, false, s);
    silu_gate(scratch, out, rows, w.rows / 2, s);
  }
  void argmax(const Argmax& a, Stream) override;
  void merge_argmax(const Candidate* candidates, int32_t shards, int64_t rows, int32_t* ids,
                    Stream) override;
  void store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position, int64_t rows,
                    int32_t* tokens, int64_t max_tokens, Stream) override;
  size_t page_bytes(const KvShape& shape) const override { return cpu::KvPage(shape).bytes(); }
  void gather_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                    int32_t count, void* packed, Stream) override {
    cpu::gather_pages(shape, layers, pages, count, static_cast<std::byte*>(packed));
  }
  void scatter_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                     int32_t count, const void* packed, Stream) override {
    cpu::scatter_pages(shape, layers, pages, count, static_cast<const std::byte*>(packed));
  }

 private:
  // Row r of a linear's input has been written as activations: quantizes it where that is wanted.
  void finish(const LinearInput& out, int64_t r, int64_t features) const {
    if (out.scale != nullptr)
      out.scale[r] = kernels_.through_fp8(static_cast<float*>(out.data) + r * features, features);
  }
  void update_angles(const RopeAppend& a, const StepRows& step);
  void append(const float* head, const KvShape& shape, void* values, float* scales, int64_t token);
  Candidate best_of(const float* logits, const Argmax& a, bool forbid) const;

  int threads_;
  const Kernels& kernels_;
  cpu::LinearEngine linears_;
  std::vector<AttentionScratch> scratch_;  // one a thread
  RopeAngles angles_;
};

void check_shape(const KvShape& s, int32_t heads) {
  const bool known = s.head_size == 16 || s.head_size == 32 || s.head_size == 64 ||
                     s.head_size == 128 || s.head_size == 256;
  DROVER_CHECK(known, ExitCode::kUsage,
               "the CPU backend has heads of 16, 32, 64, 128 or 256 features, not of {}",
               s.head_size);
  DROVER_CHECK(s.kv_heads > 0 && s.page_tokens > 0 && heads % s.kv_heads == 0, ExitCode::kInternal,
               "{} query heads on {} KV heads, pages of {} tokens", heads, s.kv_heads,
               s.page_tokens);
}

void* CpuBackend::alloc(size_t bytes, std::string_view purpose) {
  constexpr size_t kAlignment = 64;
  const bool fits = bytes <= std::numeric_limits<size_t>::max() - kAlignment;
  const size_t rounded = fits ? (bytes + kAlignment - 1) / kAlignment * kAlignment : 0;
  void* p = fits ? std::aligned_alloc(kAlignment, std::max(rounded, kAlignment)) : nullptr;
  DROVER_CHECK(p != nullptr, ExitCode::kEnvironment,
               "no memory for {} ({:.1f} MiB): use more ranks, fewer KV pages or a smaller model",
               purpose, static_cast<double>(bytes) / (1 << 20));
  return p;
}

std::unique_ptr<Embedding> CpuBackend::load_embedding(const WeightTensor& table) {
  DROVER_CHECK(table.permutation.empty(), ExitCode::kBadInput,
               "an embedding table cannot have permuted columns (act-order)");
  auto e = std::make_unique<StoredEmbedding>();
  e->table = table;
  e->rows = table.rows;
  e->cols = table.cols;
  e->bytes = table.bytes();
  return e;
}

void CpuBackend::embed(const Embedding& embedding, int64_t vocab_begin, const int32_t* tokens,
                       int64_t max_tokens, const StepRows& step, void* out, Stream) {
  const WeightTensor& table = static_cast<const StoredEmbedding&>(embedding).table;
  for (int32_t r = 0; r < step.rows; ++r) {
    const bool padding = step.row_slot[r] < 0;
    const int64_t token =
        padding ? -1 : tokens[step.row_slot[r] * max_tokens + step.row_position[r]];
    const int64_t row = token - vocab_begin;
    float* to = static_cast<float*>(out) + r * table.cols;
    if (!padding && row >= 0 && row < table.rows)
      dequantize_row(table, row, {to, static_cast<size_t>(table.cols)});
    else
      std::fill_n(to, table.cols, 0.0f);
  }
}

void CpuBackend::norm(const Norm& a, Stream) {
  float* residual = static_cast<float*>(a.residual);
  const float* delta = static_cast<const float*>(a.delta);
  float* out = static_cast<float*>(a.out.data);
  const auto write = [&](const float* row, int64_t i) {
    kernels_.rms_norm(row, a.weight, out + i * a.features, a.features, a.epsilon);
    finish(a.out, i, a.features);
  };
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
  for (int64_t r = 0; r < a.rows; ++r) {
    float* row = residual + r * a.features;
    if (delta != nullptr) kernels_.add(row, delta + r * a.features, a.features);
    if (a.weight != nullptr && a.select == nullptr) write(row, r);
  }
  if (a.weight == nullptr || a.select == nullptr) return;
  for (int64_t i = 0; i < a.out_rows; ++i) write(residual + a.select[i] * a.features, i);
}

void CpuBackend::gather_columns(const void* in, int64_t, int64_t segment_cols, const int32_t* index,
                                const LinearInput& out, int64_t rows, int64_t cols, Stream) {
  const float* from = static_cast<const float*>(in);
  float* to = static_cast<float*>(out.data);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t segment = index[j] / segment_cols;
      to[r * cols + j] =
          from[(segment * rows + r) * segment_cols + (index[j] - segment * segment_cols)];
    }
    finish(out, r, cols);
  }
}

// Angles in double: a float's rounding of position * frequency would be 1e-3 at position 8192.
void CpuBackend::update_angles(const RopeAppend& a, const StepRows& step) {
  const size_t half = static_cast<size_t>(a.rope_dims / 2), rows = static_cast<size_t>(step.rows);
  RopeAngles& t = angles_;
  if (std::equal(t.frequencies.begin(), t.frequencies.end(), a.inverse_frequencies,
                 a.inverse_frequencies + half) &&
      std::equal(t.positions.begin(), t.positions.end(), step.row_position,
                 step.row_position + rows))
    return;
  t.frequencies.assign(a.inverse_frequencies, a.inverse_frequencies + half);
  t.positions.assign(step.row_position, step.row_position + rows);
  t.cos_sin.resize(rows * half * 2);
  for (size_t r = 0; r < rows; ++r)
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(t.positions[r]) * t.frequencies[i];
      t.cos_sin[r * half * 2 + i] = static_cast<float>(std::cos(angle));
      t.cos_sin[r * half * 2 + half + i] = static_cast<float>(std::sin(angle));
    }
}

void rotate(float* head, const float* cos_sin, int32_t rope_dims, bool half_pairing) {
  const int32_t half = rope_dims / 2;
  const int32_t step = half_pairing ? 1 : 2, partner = half_pairing ? half : 1;
  for (int32_t i = 0; i < half; ++i) {
    const float c = cos_sin[i], s = cos_sin[half + i];
    float& x = head[i * step];
    float& y = head[i * step + partner];
    const float rotated = x * c - y * s;
    y = x * s + y * c;
    x = rotated;
  }
}

void CpuBackend::append(const float* head, const KvShape& shape, void* values, float* scales,
                        int64_t token) {
  const int64_t at = token * shape.head_size;
  switch (shape.format) {
    case KvFormat::kF32:
      std::copy_n(head, shape.head_size, static_cast<float*>(values) + at);
      break;
    case KvFormat::kBf16:
      kernels_.to_bf16(head, static_cast<uint16_t*>(values) + at, shape.head_size);
      break;
    case KvFormat::kFp8:
      scales[token] = kernels_.to_fp8(head, static_cast<uint8_t*>(values) + at, shape.head_size);
      break;
  }
}

void CpuBackend::rope_append(const RopeAppend& a, const StepRows& step, Stream) {
  const KvShape& s = a.shape;
  check_shape(s, a.heads);
  DROVER_CHECK(a.rope_dims >= 0 && a.rope_dims % 2 == 0 && a.rope_dims <= s.head_size,
               ExitCode::kInternal, "{} rotated dimensions of heads of {}", a.rope_dims,
               s.head_size);
  update_angles(a, step);
  const int64_t heads = a.heads + 2ll * s.kv_heads;
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
  for (int32_t r = 0; r < step.rows; ++r) {
    if (step.row_slot[r] < 0) continue;  // padding
    float* row = static_cast<float*>(a.qkv) + r * heads * s.head_size;
    const float* cos_sin = angles_.cos_sin.data() + static_cast<int64_t>(r) * a.rope_dims;
    for (int32_t h = 0; h < a.heads + s.kv_heads; ++h)
      rotate(row + h * s.head_size, cos_sin, a.rope_dims, a.half_pairing);
    const int32_t position = step.row_position[r];
    const int64_t page = step.page_table[static_cast<int64_t>(step.row_slot[r]) * step.max_pages +
                                         position / s.page_tokens];
    for (int32_t h = 0; h < s.kv_heads; ++h) {
      const int64_t token = (page * s.kv_heads + h) * s.page_tokens + position % s.page_tokens;
      append(row + (a.heads + h) * s.head_size, s, a.cache.k, a.cache.k_scale, token);
      append(row + (a.heads + s.kv_heads + h) * s.head_size, s, a.cache.v, a.cache.v_scale, token);
    }
  }
}

void CpuBackend::attention(const Attention& a, const StepRows& step, Stream) {
  const KvShape& s = a.shape;
  check_shape(s, a.heads);
  const int32_t group = a.heads / s.kv_heads;
  const int32_t span = std::min(group, cpu::kQueries);       // query heads of a task
  const int32_t block = std::max(1, cpu::kQueries / group);  // rows of a task
  int32_t longest = 0;
  for (int32_t c = 0; c < step.chunks; ++c)
    longest = std::max(longest, step.chunk_row[c + 1] - step.chunk_row[c]);
  const int32_t blocks = (longest + block - 1) / block;
#pragma omp parallel for collapse(3) schedule(dynamic) num_threads(threads_) if (threads_ > 1)
  for (int32_t c = 0; c < step.chunks; ++c)
    for (int32_t b = 0; b < blocks; ++b)
      for (int32_t h = 0; h < s.kv_heads; ++h) {
        AttentionTask task;
        task.row_begin = step.chunk_row[c] + b * block;
        task.row_end = std::min(step.chunk_row[c + 1], task.row_begin + block);
        if (task.row_begin >= task.row_end) continue;
        if (step.row_slot[task.row_begin] < 0) {  // padding
          const int64_t size = int64_t{group} * s.head_size, row = int64_t{a.heads} * s.head_size;
          for (int32_t r = task.row_begin; r < task.row_end; ++r)
            std::fill_n(static_cast<float*>(a.out.data) + r * row + h * size, size, 0.0f);
          continue;
        }
        task.args = &a;
        task.position = step.row_position;
        task.pages =
            step.page_table + static_cast<int64_t>(step.row_slot[task.row_begin]) * step.max_pages;
        task.kv_head = h;
        for (int32_t g = 0; g < group; g += span) {
          task.group_begin = g;
          task.group_end = std::min(group, g + span);
          kernels_.attention(task, scratch_[static_cast<size_t>(omp_get_thread_num())]);
        }
      }
  for (int32_t r = 0; r < step.rows; ++r) finish(a.out, r, int64_t{a.heads} * s.head_size);
}

void CpuBackend::silu_gate(const void* in, const LinearInput& out, int64_t rows, int64_t features,
                           Stream) {
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
  for (int64_t r = 0; r < rows; ++r) {
    const float* gate = static_cast<const float*>(in) + r * 2 * features;
    kernels_.silu_gate(gate, gate + features, static_cast<float*>(out.data) + r * features,
                       features);
    finish(out, r, features);
  }
}

bool better(const Candidate& a, const Candidate& b) {
  if (b.token < 0 || a.token < 0) return b.token < 0 && a.token >= 0;
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Between forbidden tokens, the runs of allowed ones. Token -1: no logit was a number.
Candidate CpuBackend::best_of(const float* logits, const Argmax& a, bool forbid) const {
  Candidate best{-std::numeric_limits<float>::infinity(), -1};
  int64_t begin = 0;
  while (begin < a.vocab_count) {
    int64_t end = a.vocab_count;
    for (int32_t i = 0; forbid && i < a.eos_count; ++i) {
      const int64_t eos = a.eos_ids[i] - a.vocab_begin;
      if (eos >= begin && eos < end) end = eos;
    }
    const int64_t at = kernels_.argmax(logits + begin, end - begin);
    if (at >= 0) {
      const Candidate found{logits[begin + at], static_cast<int32_t>(a.vocab_begin + begin + at)};
      if (better(found, best)) best = found;
    }
    begin = end + 1;
  }
  return best;
}

void CpuBackend::argmax(const Argmax& a, Stream) {
#pragma omp parallel for num_threads(threads_) if (threads_ > 1)
  for (int64_t r = 0; r < a.rows; ++r)
    a.out[r] =
        best_of(a.logits + r * a.vocab_count, a, a.forbid_eos != nullptr && a.forbid_eos[r] != 0);
}

void CpuBackend::merge_argmax(const Candidate* candidates, int32_t shards, int64_t rows,
                              int32_t* ids, Stream) {
  for (int64_t r = 0; r < rows; ++r) {
    Candidate best = candidates[r];
    for (int32_t s = 1; s < shards; ++s)
      if (better(candidates[s * rows + r], best)) best = candidates[s * rows + r];
    ids[r] = best.token;
  }
}

void CpuBackend::store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position,
                              int64_t rows, int32_t* tokens, int64_t max_tokens, Stream) {
  for (int64_t r = 0; r < rows; ++r)
    if (slot[r] >= 0) tokens[slot[r] * max_tokens + position[r]] = ids[r];
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) {
  DROVER_CHECK(options.threads >= 1 && options.threads <= 4096, ExitCode::kUsage,
               "{} threads a rank: at least one, at most 4096", options.threads);
  return std::make_unique<CpuBackend>(options);
}

}  // namespace drover
