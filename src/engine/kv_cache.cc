#include "engine/kv_cache.h"

namespace drover {

size_t kv_element_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::kFp8:
      return 1;
    case KvFormat::kBf16:
      return 2;
    default:
      return 4;
  }
}

const char* to_string(KvFormat format) {
  switch (format) {
    case KvFormat::kFp8:
      return "fp8";
    case KvFormat::kBf16:
      return "bf16";
    default:
      return "f32";
  }
}

KvFormat kv_format(const std::string& name) {
  for (auto f : {KvFormat::kFp8, KvFormat::kBf16, KvFormat::kF32}) {
    if (name == to_string(f)) return f;
  }
  DROVER_FAIL(ExitCode::kUsage, "--kv {}: expected fp8, bf16 or f32", name);
}

size_t KvCache::page_bytes(const KvShape& shape, int64_t layers) {
  const auto heads = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.page_tokens);
  const size_t scales = shape.format == KvFormat::kFp8 ? sizeof(float) : 0;
  const size_t one =
      heads * (static_cast<size_t>(shape.head_size) * kv_element_bytes(shape.format) + scales);
  return 2 * one * static_cast<size_t>(layers);
}

KvCache::KvCache(Backend& backend, const KvShape& shape, int64_t layers)
    : backend_(backend), shape_(shape) {
  const size_t heads = static_cast<size_t>(shape.pages) * static_cast<size_t>(shape.kv_heads) *
                       static_cast<size_t>(shape.page_tokens);
  const size_t values =
      heads * static_cast<size_t>(shape.head_size) * kv_element_bytes(shape.format);
  try {
    for (int64_t i = 0; i < layers; ++i) {
      KvLayer layer;
      layer.k = take(values);
      layer.v = take(values);
      if (shape.format == KvFormat::kFp8) {
        layer.k_scale = static_cast<float*>(take(heads * sizeof(float)));
        layer.v_scale = static_cast<float*>(take(heads * sizeof(float)));
      }
      layers_.push_back(layer);
    }
  } catch (...) {
    for (void* p : owned_) backend_.free(p);
    throw;
  }
}

KvCache::~KvCache() {
  for (void* p : owned_) backend_.free(p);
}

void* KvCache::take(size_t bytes) {
  owned_.push_back(backend_.alloc(bytes, "KV cache (lower --kv-memory or --max-sequences)"));
  return owned_.back();
}

}  // namespace drover
