#include "engine/decoder.h"

#include <algorithm>

#include "base/formats.h"

namespace drover {

Decoder::Decoder(WeightSource& source, const Shard& shard, Backend& backend,
                 const ShardComms& comms, KvCache& cache, int64_t max_rows, int64_t logit_rows,
                 Progress& progress)
    : arch_(source.architecture()),
      shard_(shard),
      backend_(backend),
      comms_(comms),
      cache_(cache),
      progress_(progress),
      max_rows_(max_rows),
      logit_rows_(logit_rows) {
  load(source);

  const size_t element = dtype_bytes(backend.activation_dtype());
  const auto rows = static_cast<size_t>(backend.padded_rows(max_rows));
  const auto out_rows = static_cast<size_t>(backend.padded_rows(logit_rows));
  const auto hidden = static_cast<size_t>(arch_.hidden);
  const auto head = static_cast<size_t>(arch_.head_size);
  const auto q = static_cast<size_t>(shard.heads.size()) * head;
  const auto kv = static_cast<size_t>(shard.kv_heads.size()) * head;
  const auto inner = static_cast<size_t>(shard.intermediate.size());
  const auto buffer = [&](size_t n, size_t features) {
    return DeviceArray<std::byte>(backend, n * features * element, "activations");
  };
  residual_ = buffer(rows, hidden);
  normed_ = buffer(rows, hidden);
  delta_ = buffer(rows, hidden);
  qkv_ = buffer(rows, q + 2 * kv);
  attended_ = buffer(rows, q);
  gate_up_ = buffer(rows, 2 * inner);
  gated_ = buffer(rows, inner);
  const bool act_order = std::any_of(layers_.begin(), layers_.end(), [](const auto& l) {
    return l.qkv_index.size() + l.o_index.size() + l.gate_up_index.size() + l.down_index.size() > 0;
  });
  if (act_order) {
    const auto tp = static_cast<size_t>(shard.tp);
    gathered_ = buffer(rows, std::max(q, inner) * tp);
    permuted_ = buffer(rows, std::max({hidden, q, inner}));
  }
  if (shard.last()) {
    selected_ = buffer(out_rows, hidden);
    logits_ =
        DeviceArray<float>(backend, out_rows * static_cast<size_t>(shard.vocab.size()), "logits");
    candidates_ = DeviceArray<Candidate>(
        backend, static_cast<size_t>(1 + shard.tp) * static_cast<size_t>(logit_rows), "candidates");
  }
}

void Decoder::load(WeightSource& source) {
  const auto inverse = arch_.inverse_frequencies();
  inverse_frequencies_ = DeviceArray<float>(backend_, inverse.size(), "rotary frequencies");
  inverse_frequencies_.upload(inverse);
  eos_ids_ = DeviceArray<int32_t>(backend_, arch_.eos_ids.size(), "end ids");
  eos_ids_.upload(arch_.eos_ids);

  const Range columns{0, arch_.hidden};
  if (shard_.first()) {
    embedding_ = backend_.load_embedding(source.read("embed", shard_.vocab, columns));
    weight_bytes_ += embedding_->bytes;
    progress_.tick();
  }
  for (int64_t i = shard_.layers.begin; i < shard_.layers.end; ++i) {
    layers_.push_back(load_layer(source, i));
    progress_.tick();
  }
  if (shard_.last()) {
    final_norm_ = load_vector(source.read("final_norm", {0, 1}, columns));
    const WeightTensor table =
        source.read(arch_.tied_embeddings ? "embed" : "output", shard_.vocab, columns);
    output_ = load({&table, 1});
    progress_.tick();
  }
}

DecoderLayer Decoder::load_layer(WeightSource& source, int64_t layer) {
  const LayerWeights w = read_layer(source, shard_, layer);
  DecoderLayer l;
  l.attn_norm = load_vector(w.attn_norm);
  l.mlp_norm = load_vector(w.mlp_norm);
  l.qkv = load(w.qkv);
  l.o = load({&w.o, 1});
  l.gate_up = load(w.gate_up);
  l.down = load({&w.down, 1});
  l.qkv_index = load_index(w.qkv.front().permutation);
  l.o_index = load_index(w.o.permutation);
  l.gate_up_index = load_index(w.gate_up.front().permutation);
  l.down_index = load_index(w.down.permutation);
  return l;
}

std::unique_ptr<Linear> Decoder::load(std::span<const WeightTensor> parts) {
  auto linear = backend_.load_linear(parts);
  weight_bytes_ += linear->bytes;
  return linear;
}

DeviceArray<float> Decoder::load_vector(const WeightTensor& w) {
  std::vector<float> host(static_cast<size_t>(w.cols));
  dequantize_row(w, 0, host);
  DeviceArray<float> device(backend_, host.size(), "norm weights");
  device.upload(host);
  return device;
}

DeviceArray<int32_t> Decoder::load_index(const std::vector<int32_t>& permutation) {
  if (permutation.empty()) return {};
  DeviceArray<int32_t> device(backend_, permutation.size(), "act-order permutation");
  device.upload(permutation);
  return device;
}

void Decoder::forward(const StepRows& step, const int32_t* tokens, int64_t max_tokens) {
  Stream s = backend_.stream();
  const int64_t n = step.rows;
  const auto count = static_cast<size_t>(n * arch_.hidden);
  const Dtype type = backend_.activation_dtype();

  if (shard_.first()) {
    // Each slot adds its part of the vocabulary; the sum is the embedding.
    backend_.embed(*embedding_, shard_.vocab.begin, tokens, max_tokens, step, residual_.data(), s);
    comms_.tensor->all_reduce_sum(residual_.data(), count, type, s);
  } else {
    comms_.pipeline->recv(residual_.data(), count * dtype_bytes(type), shard_.stage - 1, s);
  }

  const void* delta = nullptr;  // what the last block adds to the residual stream  [n, hidden]
  for (size_t i = 0; i < layers_.size(); ++i) {
    const auto& w = layers_[i];
    norm({.delta = delta, .weight = w.attn_norm.data(), .out = normed_.data(), .rows = n});
    attention_block(w, cache_.layer(i), step);  // normed_ -> delta_
    comms_.tensor->all_reduce_sum(delta_.data(), count, type, s);
    norm({.delta = delta_.data(), .weight = w.mlp_norm.data(), .out = normed_.data(), .rows = n});
    mlp_block(w, n);  // normed_ -> delta_
    comms_.tensor->all_reduce_sum(delta_.data(), count, type, s);
    delta = delta_.data();
    progress_.tick();  // a step alone may take long, a layer may not
  }

  // The residual stream leaves the stage whole.
  norm({.delta = delta, .rows = n});
  if (!shard_.last()) {
    comms_.pipeline->send(residual_.data(), count * dtype_bytes(type), shard_.stage + 1, s);
  }
}

// What every norm of the model has in common; without `select`, every row is normed.
void Decoder::norm(Backend::Norm a) {
  a.residual = residual_.data();
  a.features = arch_.hidden;
  a.epsilon = arch_.norm_epsilon;
  if (a.select == nullptr) a.out_rows = a.rows;
  backend_.norm(a, backend_.stream());
}

void Decoder::attention_block(const DecoderLayer& w, const KvLayer& kv, const StepRows& step) {
  Stream s = backend_.stream();
  const int64_t n = step.rows;
  const auto heads = static_cast<int32_t>(shard_.heads.size());
  const void* in = column_input(normed_.data(), w.qkv_index, n);
  backend_.linear(*w.qkv, in, qkv_.data(), n, false, s);  // [n, q + k + v]
  backend_.rope_append({.qkv = qkv_.data(),
                        .heads = heads,
                        .inverse_frequencies = inverse_frequencies_.data(),
                        .rope_dims = arch_.rope_dims,
                        .half_pairing = arch_.rope_pairing == RopePairing::kHalf,
                        .shape = cache_.shape(),
                        .cache = kv},
                       step, s);
  backend_.attention({.qkv = qkv_.data(),
                      .out = attended_.data(),
                      .heads = heads,
                      .shape = cache_.shape(),
                      .cache = kv},
                     step, s);  // [n, heads * head]
  in = row_input(attended_.data(), w.o_index, n, int64_t{heads} * arch_.head_size);
  backend_.linear(*w.o, in, delta_.data(), n, false, s);  // [n, hidden], a partial sum
}

void Decoder::mlp_block(const DecoderLayer& w, int64_t n) {
  Stream s = backend_.stream();
  const int64_t inner = shard_.intermediate.size();
  const void* in = column_input(normed_.data(), w.gate_up_index, n);
  backend_.linear(*w.gate_up, in, gate_up_.data(), n, false, s);    // [n, 2 * inner]
  backend_.silu_gate(gate_up_.data(), gated_.data(), n, inner, s);  // [n, inner]
  in = row_input(gated_.data(), w.down_index, n, inner);
  backend_.linear(*w.down, in, delta_.data(), n, false, s);  // [n, hidden], a partial sum
}

// Act-order, weights split by rows: every slot has the whole input and gathers all of its columns.
const void* Decoder::column_input(const void* in, const DeviceArray<int32_t>& index, int64_t rows) {
  if (index.size() == 0) return in;
  const auto cols = static_cast<int64_t>(index.size());
  backend_.gather_columns(in, 1, cols, index.data(), permuted_.data(), rows, cols,
                          backend_.stream());
  return permuted_.data();
}

// Act-order, weights split by (sorted) columns: a slot's columns multiply features of all slots.
const void* Decoder::row_input(const void* in, const DeviceArray<int32_t>& index, int64_t rows,
                               int64_t local_cols) {
  if (index.size() == 0) return in;
  Stream s = backend_.stream();
  const size_t bytes =
      static_cast<size_t>(rows * local_cols) * dtype_bytes(backend_.activation_dtype());
  comms_.tensor->all_gather(in, gathered_.data(), bytes, s);  // [tp, rows, local_cols]
  backend_.gather_columns(gathered_.data(), shard_.tp, local_cols, index.data(), permuted_.data(),
                          rows, static_cast<int64_t>(index.size()), s);
  return permuted_.data();
}

const float* Decoder::logits(const StepRows& step, const int32_t* select, int64_t rows) {
  DROVER_CHECK(rows <= logit_rows_, ExitCode::kInternal, "{} rows of logits, room for {}", rows,
               logit_rows_);
  Stream s = backend_.stream();
  norm({.weight = final_norm_.data(),
        .out = selected_.data(),
        .rows = step.rows,
        .select = select,
        .out_rows = rows});
  backend_.linear(*output_, selected_.data(), logits_.data(), rows, true,
                  s);  // [rows, vocab shard]
  return logits_.data();
}

void Decoder::sample(int64_t rows, const uint8_t* forbid_eos, int32_t* ids) {
  Stream s = backend_.stream();
  Candidate* own = candidates_.data();
  Candidate* all = own + logit_rows_;
  backend_.argmax({.logits = logits_.data(),
                   .rows = rows,
                   .vocab_begin = shard_.vocab.begin,
                   .vocab_count = shard_.vocab.size(),
                   .forbid_eos = forbid_eos,
                   .eos_ids = eos_ids_.data(),
                   .eos_count = static_cast<int32_t>(eos_ids_.size()),
                   .out = own},
                  s);
  comms_.tensor->all_gather(own, all, static_cast<size_t>(rows) * sizeof(Candidate), s);
  backend_.merge_argmax(all, shard_.tp, rows, ids, s);
}

}  // namespace drover
