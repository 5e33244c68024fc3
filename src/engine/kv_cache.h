// The KV pool of one rank: its layers and heads of every page. A page id means the same on every
// rank of a replica.
#pragma once

#include <span>
#include <vector>

#include "backend/backend.h"

namespace drover {

class KvCache {
 public:
  // Allocates once; memory is not touched until pages are written.
  KvCache(Backend& backend, const KvShape& shape, int64_t layers);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  const KvLayer& layer(size_t i) const { return layers_[i]; }
  std::span<const KvLayer> layers() const { return layers_; }

  // Bytes of one page over `layers` layers, scales included.
  static size_t page_bytes(const KvShape& shape, int64_t layers);

 private:
  void* take(size_t bytes);
  Backend& backend_;
  KvShape shape_;
  std::vector<KvLayer> layers_;
  std::vector<void*> owned_;
};

size_t kv_element_bytes(KvFormat format);
const char* to_string(KvFormat format);
// "fp8", "bf16", "f32"; throws kUsage.
KvFormat kv_format(const std::string& name);

}  // namespace drover
