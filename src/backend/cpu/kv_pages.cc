#include "backend/cpu/kv_pages.h"

#include <cstring>

namespace drover::cpu {
namespace {

size_t value_bytes(KvFormat format) {
  switch (format) {
    case KvFormat::kF32:
      return 4;
    case KvFormat::kBf16:
      return 2;
    default:
      return 1;
  }
}

// Calls move(pool bytes, offset in packed, size) for the four parts of every page and layer.
template <typename Move>
void each_part(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
               int32_t count, Move move) {
  const KvPage page(shape);
  size_t offset = 0;
  const auto part = [&](void* pool, size_t size, int32_t id) {
    if (size == 0) return;
    move(static_cast<std::byte*>(pool) + static_cast<size_t>(id) * size, offset, size);
    offset += size;
  };
  for (int32_t i = 0; i < count; ++i)
    for (const KvLayer& layer : layers) {
      part(layer.k, page.values, pages[i]);
      part(layer.v, page.values, pages[i]);
      part(layer.k_scale, page.scales, pages[i]);
      part(layer.v_scale, page.scales, pages[i]);
    }
}

}  // namespace

KvPage::KvPage(const KvShape& shape) {
  const size_t vectors = static_cast<size_t>(shape.kv_heads) * shape.page_tokens;
  values = vectors * shape.head_size * value_bytes(shape.format);
  scales = shape.format == KvFormat::kFp8 ? vectors * sizeof(float) : 0;
}

void gather_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                  int32_t count, std::byte* packed) {
  each_part(shape, layers, pages, count, [&](std::byte* pool, size_t offset, size_t size) {
    std::memcpy(packed + offset, pool, size);
  });
}

void scatter_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                   int32_t count, const std::byte* packed) {
  each_part(shape, layers, pages, count, [&](std::byte* pool, size_t offset, size_t size) {
    std::memcpy(pool, packed + offset, size);
  });
}

}  // namespace drover::cpu
