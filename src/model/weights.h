// Where weights come from, and the weights of one shard in host memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/dtype.h"
#include "model/architecture.h"
#include "model/shard.h"

namespace drover {

// A model's weights by name, read piecewise. Names: "embed", "final_norm", "output" (absent when
// tied), and "layers.N." + attn_norm | q | k | v | o | mlp_norm | gate | up | down.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual const Architecture& architecture() const = 0;
  // Rows and columns of the whole tensor, [begin, end). Column bounds must lie on group bounds.
  // Verifies the checksum of every chunk it touches. Throws kBadInput.
  virtual WeightTensor read(const std::string& name, Range rows, Range cols) = 0;
  // From now on read() may return a recipe in place of bytes (WeightTensor::recipe), for a backend
  // that makes them on its device. A source that has bytes goes on returning bytes.
  virtual void allow_recipes() {}
  // The group size along K of the layers' linear weights; 0 when they are not quantized.
  virtual int group() const = 0;
  // SHA-256 of what identifies the model (provenance), or "synthetic:NAME:seed".
  virtual std::string fingerprint() const = 0;
  virtual bool synthetic() const = 0;
  virtual std::string description() const = 0;  // "int4 g32 minimums, embeddings int8"
  // Of the tokenizer that belongs to the model; empty for synthetic weights.
  virtual std::string tokenizer_sha256() const = 0;
  // Where the weights came from, as the store tells it (data/FORMAT.md, /provenance).
  virtual std::map<std::string, std::string> provenance() const = 0;
};

// A source that reads another one in a way of its own, and otherwise speaks for it.
class ForwardingSource : public WeightSource {
 public:
  const Architecture& architecture() const override { return source_->architecture(); }
  int group() const override { return source_->group(); }
  std::string fingerprint() const override { return source_->fingerprint(); }
  bool synthetic() const override { return source_->synthetic(); }
  std::string description() const override { return source_->description(); }
  std::string tokenizer_sha256() const override { return source_->tokenizer_sha256(); }
  std::map<std::string, std::string> provenance() const override { return source_->provenance(); }

 protected:
  explicit ForwardingSource(std::unique_ptr<WeightSource> source) : source_(std::move(source)) {}
  std::unique_ptr<WeightSource> source_;
};

// `spec` is a store file, or "synthetic:NAME[:seed]". `stage_dir`: copy the store there first
// (one rank of a host copies, the others wait; empty: read in place).
std::unique_ptr<WeightSource> open_weights(const std::string& spec, const std::string& stage_dir);

// Weights depend on the seed and the global index only, so every grid gets the same model.
// Symmetric int4 codes, bell-shaped around 8, in groups of 128 (32 for the small models), with f16
// scales that keep activations near 1; norms near 1; embeddings bf16 (int8 for the small models).
std::unique_ptr<WeightSource> synthetic_weights(const std::string& name, uint64_t seed);

// Makes the bytes that the recipe of `w` stands for, and drops the recipe; nothing without one.
void materialize(WeightTensor& w);

// One decoder layer's shard. Parts that are stacked along the rows form one linear operation.
struct LayerWeights {
  WeightTensor attn_norm, mlp_norm;
  std::vector<WeightTensor> qkv;      // q, k, v: rows of this slot's heads
  WeightTensor o;                     // columns of this slot's heads
  std::vector<WeightTensor> gate_up;  // gate, up: rows of this slot's features
  WeightTensor down;                  // columns of this slot's features
};

// Throws kBadInput when stacked parts order their columns differently (act-order).
LayerWeights read_layer(WeightSource& source, const Shard& shard, int64_t layer);

// A part of a tensor, as read() takes it.
struct WeightPiece {
  std::string name;
  Range rows, cols;
};

// What a shard consists of, in the order in which it is loaded: the embedding (first stage), each
// layer as read_layer reads it, the final norm and the output layer (last stage).
std::vector<WeightPiece> load_order(const Architecture& a, const Shard& shard);

// Reads the pieces of load_order() ahead on `threads` threads of its own, from now on, so that disk
// and checksums go on while the pieces before are brought to the device. Starts no further piece
// while `most_bytes` wait to be taken: it holds that, and a tensor a thread, at most. A piece is
// given once; others are read from `source` as they are asked for. What a reader throws, read()
// throws. `source` must allow read() from several threads (a store does).
std::unique_ptr<WeightSource> read_ahead(std::unique_ptr<WeightSource> source, const Shard& shard,
                                         size_t most_bytes, int threads);

}  // namespace drover
