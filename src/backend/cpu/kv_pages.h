// Pages of the KV cache as bytes: between the layers' pools and one packed buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "backend/backend.h"

namespace drover::cpu {

// Bytes of one layer's part of a page.
struct KvPage {
  explicit KvPage(const KvShape& shape);
  size_t values = 0;  // of k, and as many of v
  size_t scales = 0;  // of k_scale, and as many of v_scale; 0 but for FP8
  size_t bytes() const { return 2 * (values + scales); }
};

// packed [count, layers, k | v | k_scale | v_scale]
void gather_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                  int32_t count, std::byte* packed);
void scatter_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                   int32_t count, const std::byte* packed);

}  // namespace drover::cpu
