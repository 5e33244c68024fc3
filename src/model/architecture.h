// What a decoder-only model is, as data. A second family is a description, not a second forward.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace drover {

enum class NormKind : uint8_t { kRms, kLayer };
enum class RopePairing : uint8_t { kHalf, kAdjacent };  // Llama in HF order: (i, i + d/2)
enum class Activation : uint8_t { kSiluGated, kGelu };

// Rotary scaling as Hugging Face names it. kLlama3: arXiv 2407.21783 and transformers'
// _compute_llama3_parameters.
struct RopeScaling {
  enum class Kind : uint8_t { kNone, kLinear, kLlama3 } kind = Kind::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_positions = 8192;
};

struct Architecture {
  std::string family = "llama";
  int32_t layers = 0;
  int32_t hidden = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_size = 0;
  int32_t intermediate = 0;
  int32_t vocab = 0;
  int32_t max_positions = 0;
  NormKind norm = NormKind::kRms;
  float norm_epsilon = 1e-5f;
  RopePairing rope_pairing = RopePairing::kHalf;
  int32_t rope_dims = 0;  // rotated dimensions of a head; = head_size for Llama
  double rope_base = 10000.0;
  RopeScaling rope_scaling;
  Activation activation = Activation::kSiluGated;
  bool tied_embeddings = false;
  std::vector<int32_t> eos_ids;
  int32_t bos_id = -1;

  // Throws kBadInput naming the first size that is absurd or contradicts another.
  void validate(const std::string& where) const;
  // [rope_dims / 2] angles per position.
  std::vector<float> inverse_frequencies() const;
  int64_t parameters() const;
  std::string summary() const;  // one line for people
};

// "llama2-7b", "llama2-70b", "llama3-8b", "llama3-70b", "smollm2-135m", "tiny" (8 heads, 8 KV
// heads: for tests). Throws kUsage listing the names it knows.
Architecture named_architecture(const std::string& name);

}  // namespace drover
