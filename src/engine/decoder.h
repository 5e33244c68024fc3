// The forward pass of one rank's shard: a list of operations.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "base/trace.h"
#include "comm/comm.h"
#include "engine/device_array.h"
#include "engine/kv_cache.h"
#include "model/weights.h"

namespace drover {

// The communicators of one rank; all may have size 1. Every rank calls them in the same order.
struct ShardComms {
  Comm* tensor = nullptr;       // the slots of this stage
  Comm* pipeline = nullptr;     // the stages of this slot, rank = stage: activations
  Comm* feedback = nullptr;     // likewise: sampled ids from the last stage to the first
  PeerMemory* peers = nullptr;  // of the tensor slots, of Backend::peer_sums' size; null: none
};

// How a backend lays out rows of activations (Backend::activation_dtype, Backend::padded_rows).
struct RowLayout {
  Dtype type;
  std::function<int64_t(int64_t)> padded;
};
RowLayout row_layout(const Backend& backend);

// The linears of one layer, and the act-order gathers in front of them.
struct DecoderLayer {
  DeviceArray<float> attn_norm, mlp_norm;  // [hidden]
  std::unique_ptr<Linear> qkv, o, gate_up, down;
  DeviceArray<int32_t> qkv_index, o_index, gate_up_index, down_index;  // size 0: identity
};

class Decoder {
 public:
  // Bytes of activations and logits that a decoder of these sizes allocates.
  static size_t buffer_bytes(const Architecture& arch, const Shard& shard, const RowLayout& layout,
                             int64_t max_rows, int64_t logit_rows);

  // Reads this shard's weights and allocates every buffer: nothing is allocated in a step.
  // max_rows: of a step; logit_rows: of one block of logits. `progress` gets a tick after each
  // layer, loaded or run, and must outlive the decoder.
  Decoder(WeightSource& source, const Shard& shard, Backend& backend, const ShardComms& comms,
          KvCache& cache, int64_t max_rows, int64_t logit_rows, Progress& progress);

  // Weights from rank 0 of `replicas`, the ranks that own the same shard, over the device.
  void share(Comm& replicas);

  // A step is receive, layers, send. The residual stream comes from the previous stage (the first
  // stage embeds tokens instead) and goes to the next one; on the last stage logits() follow.
  void receive(int64_t rows);
  // This stage's layers over the rows; may be replayed (Backend::replay).
  // tokens [slots, max_tokens]
  void layers(const StepRows& step, const int32_t* tokens, int64_t max_tokens);
  void send(int64_t rows);

  // Last stage only. Logits of this rank's vocabulary shard for select[0..rows), rows <=
  // logit_rows: f32 [rows, shard.vocab.size()], valid until the next call.
  const float* logits(const int32_t* select, int64_t rows);
  const float* logits_data() const { return logits_.data(); }
  // Last stage only. ids[r] = the best token over all shards, of the logits just computed.
  void sample(int64_t rows, const uint8_t* forbid_eos, int32_t* ids);

  const Shard& shard() const { return shard_; }
  const Architecture& architecture() const { return arch_; }
  size_t weight_bytes() const { return weight_bytes_; }
  // Of these, what every step reads whole (of the embedding table it reads a row per token).
  size_t step_weight_bytes() const {
    return weight_bytes_ - (embedding_ == nullptr ? 0 : embedding_->bytes);
  }
  int64_t logit_rows() const { return logit_rows_; }

 private:
  void load(WeightSource& source);
  DecoderLayer load_layer(WeightSource& source, int64_t layer);
  DeviceArray<float> load_vector(const WeightTensor& w);
  DeviceArray<int32_t> load_index(const std::vector<int32_t>& permutation);
  std::unique_ptr<Linear> load(std::span<const WeightTensor> parts);
  void norm(Backend::Norm a);
  void sum_and_norm(Backend::Norm a);
  void attention_block(const DecoderLayer& w, const KvLayer& kv, const StepRows& step);
  void mlp_block(const DecoderLayer& w, int64_t rows);
  // The inputs of a layer's linears: written by the operation before, or, with act-order, gathered
  // from the activations that it wrote.
  LinearInput written(const DeviceArray<std::byte>& buffer, const Linear& w,
                      const DeviceArray<int32_t>& index) const;
  LinearInput column_input(LinearInput in, const Linear& w, const DeviceArray<int32_t>& index,
                           int64_t rows);
  LinearInput row_input(LinearInput in, const Linear& w, const DeviceArray<int32_t>& index,
                        int64_t rows, int64_t local_cols);

  Architecture arch_;
  Shard shard_;
  Backend& backend_;
  ShardComms comms_;
  KvCache& cache_;
  Progress& progress_;
  int64_t max_rows_, logit_rows_;
  PeerBuffers peers_;
  int64_t peer_rows_ = 0;  // so many at most are summed by the backend
  size_t weight_bytes_ = 0;

  std::unique_ptr<Embedding> embedding_;
  std::unique_ptr<Linear> output_;
  DeviceArray<float> final_norm_;           // [hidden]
  DeviceArray<float> inverse_frequencies_;  // [rope_dims / 2]
  std::vector<DecoderLayer> blocks_;
  DeviceArray<int32_t> eos_ids_;

  // Activations [max_rows padded, ...] of the backend's activation type.
  DeviceArray<std::byte> residual_, normed_, qkv_, attended_, delta_, gate_up_, gated_;
  DeviceArray<std::byte> gathered_, permuted_;  // act-order only
  DeviceArray<float> scales_;                   // [max_rows padded] of a quantized input
  DeviceArray<std::byte> selected_;             // [logit_rows padded, hidden]
  DeviceArray<float> logits_;                   // [logit_rows padded, vocab shard]
  DeviceArray<Candidate> candidates_;           // [1 + tp, logit_rows]: own, then everybody's

  trace::Marker at_;  // which operation a CPU rank is in; names as in serve/step_budget.cc
};

}  // namespace drover
