// The operations a model needs, on one device. Implementations: cpu/ (the oracle) and cuda/.
//
// Every operation takes raw device pointers, shapes and a stream, allocates nothing, and is ordered
// with the other operations on the same stream. Activations are rows: [rows, features], row-major,
// of activation_dtype() (f32 on the CPU, bf16 on GPUs). Buffers that a linear reads or writes must
// have room for padded_rows(rows) rows. Sums are f32 everywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/tuning.h"
#include "base/dtype.h"
#include "base/interrupt.h"

namespace drover {

using Stream = void*;

struct DeviceSpan {
  void* data = nullptr;
  size_t bytes = 0;
};

// A weight matrix in the backend's own layout.
class Linear {
 public:
  virtual ~Linear() = default;
  int64_t rows = 0;                // N, output features
  int64_t cols = 0;                // K, input features
  size_t bytes = 0;                // device memory held
  std::vector<DeviceSpan> memory;  // where; the same layout on every replica. Empty on the CPU
  bool quantized_input = false;    // wants its input in e4m3 with a scale a row (LinearInput)
};

// An embedding table (or the shard of one), in the backend's own layout.
class Embedding {
 public:
  virtual ~Embedding() = default;
  int64_t rows = 0;  // tokens held
  int64_t cols = 0;  // hidden
  size_t bytes = 0;
  std::vector<DeviceSpan> memory;
};

enum class KvFormat : uint8_t { kFp8, kBf16, kF32 };

// The KV cache of one layer on this rank, over pages:
//   k, v             [pages, kv_heads, page_tokens, head_size]  of the KV format
//   k_scale, v_scale [pages, kv_heads, page_tokens]             f32; kFp8 only, else null
struct KvLayer {
  void* k = nullptr;
  void* v = nullptr;
  float* k_scale = nullptr;
  float* v_scale = nullptr;
};

struct KvShape {
  KvFormat format = KvFormat::kFp8;
  int32_t pages = 0;
  int32_t page_tokens = 16;
  int32_t kv_heads = 0;  // on this rank
  int32_t head_size = 0;
};

// The rows of one step. Device pointers, except the counts. A chunk is a run of consecutive
// positions of one sequence; its rows are consecutive. A decoding sequence is a chunk of one row.
struct StepRows {
  int32_t rows = 0;
  int32_t chunks = 0;
  int32_t decode_rows = 0;                // chunks of one row at the end of the step
  const int32_t* row_slot = nullptr;      // [rows] the slot of the row's sequence; -1: padding,
                                          // which appends nothing and whose results are anything
  const int32_t* row_position = nullptr;  // [rows] its position in the sequence
  const int32_t* chunk_row = nullptr;     // [chunks + 1] first row of each chunk, and the end
  const int32_t* page_table = nullptr;    // [slots, max_pages] page ids of each slot
  int32_t max_pages = 0;
};

// What a linear reads, [rows, features]: activations (scale null), or codes in e4m3 with one f32
// scale a row, x = code * scale, scale = amax / 448 of the row (W4A8). Writers of inputs quantize
// when they are given a scale. On the CPU codes are kept as the f32 they stand for, scale included,
// and the scales are written for the tests.
struct LinearInput {
  void* data = nullptr;
  float* scale = nullptr;  // [rows]
};

struct Candidate {  // the best token of a row within one vocabulary shard
  float logit;
  int32_t token;
};

// Memory that all ranks of a group reach (comm/comm.h, PeerMemory), for sums over their GPUs.
struct PeerBuffers {
  int32_t rank = 0;
  std::vector<void*> memory;       // of each rank; all bits set before the first sum
  const uint32_t* stop = nullptr;  // no longer 0: waits are to end, and sums are anything
};

// Rows of a GPU's buffers are padded to a multiple of this; its activations are bf16.
constexpr int64_t kGpuRowMultiple = 8;

struct DeviceEvent {
  void* handle = nullptr;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;  // "cpu"
  virtual std::string description()
      const = 0;  // device, library versions, ISA: for environment.json
  virtual Dtype activation_dtype() const = 0;
  virtual int64_t padded_rows(int64_t rows) const = 0;
  virtual Stream stream() = 0;  // the compute stream; null on the CPU
  // Before the first call from a thread other than the one that made the backend.
  virtual void enter_thread() = 0;

  // Memory. alloc: 64-byte aligned or more; throws kEnvironment saying what was for and how much.
  virtual void* alloc(size_t bytes, std::string_view purpose) = 0;
  virtual void free(void* p) noexcept = 0;
  virtual void copy_in(void* device, const void* host, size_t bytes, Stream s) = 0;
  virtual void copy_out(void* host, const void* device, size_t bytes, Stream s) = 0;
  virtual void copy(void* to, const void* from, size_t bytes, Stream s) = 0;  // on the device
  // After everything queued so far. An event is used up by the wait(), or the done() that is true;
  // then what was copied out before it is there.
  virtual DeviceEvent record(Stream s) = 0;
  virtual bool done(DeviceEvent e) = 0;
  virtual void wait(DeviceEvent e, Deadline deadline, const Interrupt& interrupt) = 0;

  // Runs operations, on stream(). A backend may record them the first time a key comes and replay
  // the record from then on: so a key must stand for everything but the contents of device memory.
  // `operations` must not allocate, copy from or to the host, or wait.
  virtual void replay(uint64_t key, const std::function<void()>& operations) = 0;
  virtual void forget_replays() = 0;  // the records, and what they hold of communicators
  // A replayed step of so many rows is padded to this many, so that the records are few; 0: this
  // backend records nothing.
  virtual int32_t replay_rows(int32_t rows) const = 0;

  struct Memory {
    size_t total = 0, free = 0;  // bytes of the device (CPU: of the host)
  };
  virtual Memory memory() const = 0;

  // Whether load_linear and load_embedding take recipes (WeightTensor::recipe).
  virtual bool makes_weights() const = 0;
  // Weights. `parts` are stacked along the rows and have the same columns; their permutations are
  // the caller's business (gather_columns).
  virtual std::unique_ptr<Linear> load_linear(std::span<const WeightTensor> parts) = 0;
  // For gate_up() and nothing else: a gate's weights and an up projection's of the same shape. A
  // backend may mix their rows.
  virtual std::unique_ptr<Linear> load_gate_up(std::span<const WeightTensor> parts) = 0;
  virtual std::unique_ptr<Embedding> load_embedding(const WeightTensor& table) = 0;
  virtual void loaded() = 0;  // frees what only loading needs
  // A layer of this shape as the vendor's library runs it in FP8, a yardstick for load_linear's:
  // random weights in e4m3 with a scale a row, inputs in e4m3. Its linear() reads and writes up to
  // the next multiple of 16 rows, and writes no f32. Null where the library has none.
  virtual std::unique_ptr<Linear> library_linear(int64_t rows, int64_t cols) = 0;
  // The ways in which linear() can run `w` at so many rows and that may be fastest; first the one
  // that the built-in rule takes. Empty where there is nothing to choose.
  virtual std::vector<LinearWay> linear_ways(const Linear& w, int64_t rows) = 0;
  // From now on linear() runs `w` so, whatever the rows; null: by the tuning it was loaded with, or
  // the rule. What was recorded stays as it is. kInternal for a way that is none of `w`'s.
  virtual void run_linear_as(Linear& w, const LinearWay* way) = 0;

  // out[r, :] = table[tokens[row_slot[r], row_position[r]] - vocab_begin], or zeros when the token
  // is not in this shard (the shards' sum is the embedding).  tokens [slots, max_tokens].
  virtual void embed(const Embedding& table, int64_t vocab_begin, const int32_t* tokens,
                     int64_t max_tokens, const StepRows& step, void* out, Stream s) = 0;

  // residual[r, :] += delta[r, :] (delta may be null); then, unless weight is null,
  // out[i, :] = rms_norm(residual[select ? select[i] : i, :]) * weight, for i in [0, out_rows).
  // RMS: x / sqrt(mean(x^2) + epsilon). weight [features] f32.
  struct Norm {
    void* residual = nullptr;       // [rows, features]
    const void* delta = nullptr;    // [rows, features] or null
    const float* weight = nullptr;  // [features] or null: only the addition
    LinearInput out{};              // [out_rows, features]
    int64_t rows = 0;
    int64_t features = 0;
    float epsilon = 0;
    const int32_t* select = nullptr;  // [out_rows] or null
    int64_t out_rows = 0;             // = rows when select is null
    // Not null: delta is a part, and the sum of all ranks' parts, rounded to the type of
    // activations, is added. All ranks call with the same rows, in the same order, and get the same
    // bits; with two ranks those of a sum of Comm and a norm. Without select.
    const PeerBuffers* peers = nullptr;
  };
  virtual void norm(const Norm& a, Stream s) = 0;

  // What norm() sums itself: up to so many rows at a time, in `bytes` of each rank's memory. Zeros:
  // nothing.
  struct PeerSums {
    int64_t rows = 0;
    size_t bytes = 0;
  };
  virtual PeerSums peer_sums(int ranks, int64_t features) const = 0;

  // out [rows, w.rows] = in [rows, w.cols] * w^T.  out is f32 when `f32_out` (logits).
  virtual void linear(const Linear& w, const LinearInput& in, void* out, int64_t rows, bool f32_out,
                      Stream s) = 0;

  // out[r, j] = in[index[j] / segment_cols][r][index[j] % segment_cols]: the input of an act-order
  // linear.  in [segments, rows, segment_cols] (an all-gather's layout), index [cols], out [rows,
  // cols].
  virtual void gather_columns(const void* in, int64_t segments, int64_t segment_cols,
                              const int32_t* index, const LinearInput& out, int64_t rows,
                              int64_t cols, Stream s) = 0;

  // Rotates q and k in place and appends k, v to the cache at each row's position.
  // qkv [rows, (heads + 2 * kv_heads) * head_size]: q heads, then k heads, then v heads.
  // Rotary form, Su et al. arXiv 2104.09864; pairs (i, i + rope_dims/2) when half_pairing, else
  // (2i, 2i + 1). FP8: scale = amax / 448 per token and head; the rotated k is what is stored.
  struct RopeAppend {
    void* qkv = nullptr;
    int32_t heads = 0;
    const float* inverse_frequencies = nullptr;  // [rope_dims / 2]
    int32_t rope_dims = 0;
    bool half_pairing = true;
    KvShape shape;
    KvLayer cache;
  };
  virtual void rope_append(const RopeAppend& a, const StepRows& step, Stream s) = 0;

  // Causal attention of each row over the cache positions [0, row_position], scale
  // 1/sqrt(head_size). Reads keys and values from the cache only, so that cutting a prompt into
  // chunks changes nothing. out [rows, heads * head_size]; query head h reads KV head h / (heads /
  // kv_heads).
  struct Attention {
    void* qkv = nullptr;  // as RopeAppend leaves it; the queries may be overwritten
    LinearInput out{};
    int32_t heads = 0;
    KvShape shape;
    KvLayer cache;
  };
  virtual void attention(const Attention& a, const StepRows& step, Stream s) = 0;

  // out[r, j] = silu(in[r, j]) * in[r, features + j]:  in [rows, 2 * features], out [rows,
  // features].
  virtual void silu_gate(const void* in, const LinearInput& out, int64_t rows, int64_t features,
                         Stream s) = 0;

  // silu_gate of linear in one: out[r, j] = silu(gate_j(in[r])) * up_j(in[r]), both rounded to the
  // activations' type before. scratch [padded rows, w.rows] of that type is used as it suits.
  virtual void gate_up(const Linear& w, const LinearInput& in, void* scratch,
                       const LinearInput& out, int64_t rows, Stream s) = 0;

  // The best token of each row; the lowest id wins a tie; NaN never wins. Rows whose
  // forbid_eos[r] != 0 exclude eos_ids (the first new token).  logits [rows, vocab_count] f32.
  struct Argmax {
    const float* logits = nullptr;
    int64_t rows = 0;
    int64_t vocab_begin = 0;
    int64_t vocab_count = 0;
    const uint8_t* forbid_eos = nullptr;  // [rows]
    const int32_t* eos_ids = nullptr;     // [eos_count]
    int32_t eos_count = 0;
    Candidate* out = nullptr;  // [rows]
  };
  virtual void argmax(const Argmax& a, Stream s) = 0;
  // ids[r] = the best of candidates[0..shards)[r].  candidates [shards, rows].
  virtual void merge_argmax(const Candidate* candidates, int32_t shards, int64_t rows, int32_t* ids,
                            Stream s) = 0;
  // tokens[slot[r], position[r]] = ids[r]: sampled tokens enter their sequences.
  // Rows whose slot is negative are padding.
  virtual void store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position,
                            int64_t rows, int32_t* tokens, int64_t max_tokens, Stream s) = 0;

  // Pages between the pools of all layers and one packed buffer, for moving and copying KV.
  // packed [count, layers, page bytes of k, v, k_scale, v_scale]. bytes_per_page is of one layer.
  virtual size_t page_bytes(const KvShape& shape) const = 0;
  virtual void gather_pages(const KvShape& shape, std::span<const KvLayer> layers,
                            const int32_t* pages, int32_t count, void* packed, Stream s) = 0;
  virtual void scatter_pages(const KvShape& shape, std::span<const KvLayer> layers,
                             const int32_t* pages, int32_t count, const void* packed, Stream s) = 0;
};

}  // namespace drover
