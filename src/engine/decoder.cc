#include "engine/decoder.h"

#include <algorithm>

#include "base/formats.h"

namespace drover {

namespace {

// Bytes of each buffer, act-order's left out.
struct Sizes {
  size_t rows, hidden, qkv, attended, gate_up, gated, selected, logits, candidates;

  Sizes(const Architecture& arch, const Shard& shard, const RowLayout& layout, int64_t max_rows,
        int64_t logit_rows) {
    const size_t element = dtype_bytes(layout.type);
    rows = static_cast<size_t>(layout.padded(max_rows));
    const auto out_rows = static_cast<size_t>(layout.padded(logit_rows));
    const auto width = static_cast<size_t>(arch.hidden);
    const auto head = static_cast<size_t>(arch.head_size);
    const auto q = static_cast<size_t>(shard.heads.size()) * head;
    const auto kv = static_cast<size_t>(shard.kv_heads.size()) * head;
    const auto inner = static_cast<size_t>(shard.intermediate.size());
    hidden = rows * width * element;
    qkv = rows * (q + 2 * kv) * element;
    attended = rows * q * element;
    gate_up = rows * 2 * inner * element;
    gated = rows * inner * element;
    selected = out_rows * width * element;
    logits = out_rows * static_cast<size_t>(shard.vocab.size()) * sizeof(float);
    candidates =
        static_cast<size_t>(1 + shard.tp) * static_cast<size_t>(logit_rows) * sizeof(Candidate);
  }
};

}  // namespace

RowLayout row_layout(const Backend& backend) {
  return {backend.activation_dtype(),
          [&backend](int64_t rows) { return backend.padded_rows(rows); }};
}

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
  // A GPU's operations are its own to tell: its kernels are in the trace.
  if (backend.stream() == nullptr) at_ = trace::Marker(trace::track("operations", "operation"));
  if (comms.peers != nullptr) {
    peer_rows_ = backend.peer_sums(shard.tp, arch_.hidden).rows;
    peers_.rank = comms.tensor->rank();
    for (int r = 0; r < comms.tensor->size(); ++r) peers_.memory.push_back(comms.peers->of(r));
    peers_.stop = comms.peers->stop();
  }
  load(source);
  backend.loaded();
  const Sizes n(arch_, shard_, row_layout(backend), max_rows, logit_rows);
  const auto buffer = [&](size_t bytes) {
    return DeviceArray<std::byte>(backend, bytes, "activations");
  };
  residual_ = buffer(n.hidden);
  normed_ = buffer(n.hidden);
  delta_ = buffer(n.hidden);
  qkv_ = buffer(n.qkv);
  attended_ = buffer(n.attended);
  gate_up_ = buffer(n.gate_up);
  gated_ = buffer(n.gated);
  scales_ = DeviceArray<float>(backend, n.rows, "scales of activations");
  const bool act_order = std::any_of(blocks_.begin(), blocks_.end(), [](const auto& l) {
    return l.qkv_index.size() + l.o_index.size() + l.gate_up_index.size() + l.down_index.size() > 0;
  });
  if (act_order) {
    gathered_ = buffer(std::max(n.attended, n.gated) * static_cast<size_t>(shard.tp));
    permuted_ = buffer(std::max({n.hidden, n.attended, n.gated}));
  }
  if (shard.last()) {
    selected_ = buffer(n.selected);
    logits_ = DeviceArray<float>(backend, n.logits / sizeof(float), "logits");
    candidates_ = DeviceArray<Candidate>(backend, n.candidates / sizeof(Candidate), "candidates");
  }
}

size_t Decoder::buffer_bytes(const Architecture& arch, const Shard& shard, const RowLayout& layout,
                             int64_t max_rows, int64_t logit_rows) {
  const Sizes n(arch, shard, layout, max_rows, logit_rows);
  const size_t last = shard.last() ? n.selected + n.logits + n.candidates : 0;
  return 3 * n.hidden + n.qkv + n.attended + n.gate_up + n.gated + n.rows * sizeof(float) + last;
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
    blocks_.push_back(load_layer(source, i));
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
  l.gate_up = backend_.load_gate_up(w.gate_up);
  weight_bytes_ += l.gate_up->bytes;
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

void Decoder::share(Comm& replicas) {
  const auto all = [&](const std::vector<DeviceSpan>& memory) {
    for (const DeviceSpan& m : memory) {
      replicas.broadcast(m.data, m.bytes, 0, backend_.stream());
      progress_.tick();
    }
  };
  if (embedding_) all(embedding_->memory);
  for (const auto& b : blocks_) {
    for (const auto* w : {&b.qkv, &b.o, &b.gate_up, &b.down}) all((*w)->memory);
  }
  if (output_) all(output_->memory);
}

void Decoder::receive(int64_t rows) {
  if (shard_.first()) return;
  const auto bytes =
      static_cast<size_t>(rows * arch_.hidden) * dtype_bytes(backend_.activation_dtype());
  at_("communication");
  comms_.pipeline->recv(residual_.data(), bytes, shard_.stage - 1, backend_.stream());
  at_(nullptr);
}

void Decoder::send(int64_t rows) {
  if (shard_.last()) return;
  const auto bytes =
      static_cast<size_t>(rows * arch_.hidden) * dtype_bytes(backend_.activation_dtype());
  at_("communication");
  comms_.pipeline->send(residual_.data(), bytes, shard_.stage + 1, backend_.stream());
  at_(nullptr);
}

void Decoder::layers(const StepRows& step, const int32_t* tokens, int64_t max_tokens) {
  Stream s = backend_.stream();
  const int64_t n = step.rows;

  if (shard_.first()) {
    at_("embed");
    // Each slot adds its part of the vocabulary; the sum is the embedding.
    backend_.embed(*embedding_, shard_.vocab.begin, tokens, max_tokens, step, residual_.data(), s);
    at_("communication");
    comms_.tensor->all_reduce_sum(residual_.data(), static_cast<size_t>(n * arch_.hidden),
                                  backend_.activation_dtype(), s);
  }

  for (size_t i = 0; i < blocks_.size(); ++i) {
    const auto& w = blocks_[i];
    const Backend::Norm before{
        .weight = w.attn_norm.data(), .out = written(normed_, *w.qkv, w.qkv_index), .rows = n};
    i == 0 ? norm(before) : sum_and_norm(before);
    attention_block(w, cache_.layer(i), step);  // normed_ -> delta_
    sum_and_norm({.weight = w.mlp_norm.data(),
                  .out = written(normed_, *w.gate_up, w.gate_up_index),
                  .rows = n});
    mlp_block(w, n);   // normed_ -> delta_
    progress_.tick();  // a step alone may take long, a layer may not
  }

  // The residual stream leaves the stage whole.
  if (!blocks_.empty()) sum_and_norm({.rows = n});
  at_(nullptr);
}

// Adds what the last block left in delta_, the sum over all slots, to the residual stream; a norm
// of it follows unless the weight is null.
void Decoder::sum_and_norm(Backend::Norm a) {
  a.delta = delta_.data();
  if (a.rows <= peer_rows_) {
    a.peers = &peers_;
  } else {
    at_("communication");
    comms_.tensor->all_reduce_sum(delta_.data(), static_cast<size_t>(a.rows * arch_.hidden),
                                  backend_.activation_dtype(), backend_.stream());
  }
  norm(a);
}

// What every norm of the model has in common; without `select`, every row is normed.
void Decoder::norm(Backend::Norm a) {
  a.residual = residual_.data();
  a.features = arch_.hidden;
  a.epsilon = arch_.norm_epsilon;
  if (a.select == nullptr) a.out_rows = a.rows;
  at_("norm");
  backend_.norm(a, backend_.stream());
}

void Decoder::attention_block(const DecoderLayer& w, const KvLayer& kv, const StepRows& step) {
  Stream s = backend_.stream();
  const int64_t n = step.rows;
  const auto heads = static_cast<int32_t>(shard_.heads.size());
  LinearInput in = column_input(written(normed_, *w.qkv, w.qkv_index), *w.qkv, w.qkv_index, n);
  at_("qkv");
  backend_.linear(*w.qkv, in, qkv_.data(), n, false, s);  // [n, q + k + v]
  at_("rope + append");
  backend_.rope_append({.qkv = qkv_.data(),
                        .heads = heads,
                        .inverse_frequencies = inverse_frequencies_.data(),
                        .rope_dims = arch_.rope_dims,
                        .half_pairing = arch_.rope_pairing == RopePairing::kHalf,
                        .shape = cache_.shape(),
                        .cache = kv},
                       step, s);
  in = written(attended_, *w.o, w.o_index);
  at_("attention");
  backend_.attention(
      {.qkv = qkv_.data(), .out = in, .heads = heads, .shape = cache_.shape(), .cache = kv}, step,
      s);  // [n, heads * head]
  in = row_input(in, *w.o, w.o_index, n, int64_t{heads} * arch_.head_size);
  at_("o");
  backend_.linear(*w.o, in, delta_.data(), n, false, s);  // [n, hidden], a partial sum
}

void Decoder::mlp_block(const DecoderLayer& w, int64_t n) {
  Stream s = backend_.stream();
  const int64_t inner = shard_.intermediate.size();
  LinearInput in =
      column_input(written(normed_, *w.gate_up, w.gate_up_index), *w.gate_up, w.gate_up_index, n);
  const LinearInput gated = written(gated_, *w.down, w.down_index);
  at_("gate_up");
  backend_.gate_up(*w.gate_up, in, gate_up_.data(), gated, n, s);  // [n, inner]
  in = row_input(gated, *w.down, w.down_index, n, inner);
  at_("down");
  backend_.linear(*w.down, in, delta_.data(), n, false, s);  // [n, hidden], a partial sum
}

// An act-order linear's input is gathered, and quantized, from plain activations.
LinearInput Decoder::written(const DeviceArray<std::byte>& buffer, const Linear& w,
                             const DeviceArray<int32_t>& index) const {
  const bool quantized = w.quantized_input && index.size() == 0;
  return {buffer.data(), quantized ? scales_.data() : nullptr};
}

// Act-order, weights split by rows: every slot has the whole input and gathers all of its columns.
LinearInput Decoder::column_input(LinearInput in, const Linear& w,
                                  const DeviceArray<int32_t>& index, int64_t rows) {
  if (index.size() == 0) return in;
  const auto cols = static_cast<int64_t>(index.size());
  const LinearInput out{permuted_.data(), w.quantized_input ? scales_.data() : nullptr};
  at_("gather columns");
  backend_.gather_columns(in.data, 1, cols, index.data(), out, rows, cols, backend_.stream());
  return out;
}

// Act-order, weights split by (sorted) columns: a slot's columns multiply features of all slots.
LinearInput Decoder::row_input(LinearInput in, const Linear& w, const DeviceArray<int32_t>& index,
                               int64_t rows, int64_t local_cols) {
  if (index.size() == 0) return in;
  Stream s = backend_.stream();
  const size_t bytes =
      static_cast<size_t>(rows * local_cols) * dtype_bytes(backend_.activation_dtype());
  const LinearInput out{permuted_.data(), w.quantized_input ? scales_.data() : nullptr};
  at_("communication");
  comms_.tensor->all_gather(in.data, gathered_.data(), bytes, s);  // [tp, rows, local_cols]
  at_("gather columns");
  backend_.gather_columns(gathered_.data(), shard_.tp, local_cols, index.data(), out, rows,
                          static_cast<int64_t>(index.size()), s);
  return out;
}

const float* Decoder::logits(const int32_t* select, int64_t rows) {
  DROVER_CHECK(rows <= logit_rows_, ExitCode::kInternal, "{} rows of logits, room for {}", rows,
               logit_rows_);
  const LinearInput in = written(selected_, *output_, {});
  norm({.weight = final_norm_.data(), .out = in, .select = select, .out_rows = rows});
  at_("output");
  backend_.linear(*output_, in, logits_.data(), rows, true,
                  backend_.stream());  // [rows, vocab shard]
  at_(nullptr);
  return logits_.data();
}

void Decoder::sample(int64_t rows, const uint8_t* forbid_eos, int32_t* ids) {
  Stream s = backend_.stream();
  Candidate* own = candidates_.data();
  Candidate* all = own + logit_rows_;
  at_("argmax");
  backend_.argmax({.logits = logits_.data(),
                   .rows = rows,
                   .vocab_begin = shard_.vocab.begin,
                   .vocab_count = shard_.vocab.size(),
                   .forbid_eos = forbid_eos,
                   .eos_ids = eos_ids_.data(),
                   .eos_count = static_cast<int32_t>(eos_ids_.size()),
                   .out = own},
                  s);
  at_("communication");
  comms_.tensor->all_gather(own, all, static_cast<size_t>(rows) * sizeof(Candidate), s);
  at_("argmax");
  backend_.merge_argmax(all, shard_.tp, rows, ids, s);
  at_(nullptr);
}

}  // namespace drover
