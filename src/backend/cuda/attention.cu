// Which attention kernel (attention_kernel.cuh).
#include <cmath>

#include "backend/cuda/attention_kernel.cuh"

namespace drover::cuda {

using attention_detail::AttentionArgs;
void attention_d16(const AttentionArgs&, const Workspace&, cudaStream_t);
void attention_d32(const AttentionArgs&, const Workspace&, cudaStream_t);
void attention_d64(const AttentionArgs&, const Workspace&, cudaStream_t);
void attention_d128(const AttentionArgs&, const Workspace&, cudaStream_t);
void attention_d256(const AttentionArgs&, const Workspace&, cudaStream_t);

namespace {

void choose(const AttentionArgs& a, const Workspace& work, cudaStream_t s) {
  switch (a.cache.head_size) {
    case 16:
      return attention_d16(a, work, s);
    case 32:
      return attention_d32(a, work, s);
    case 64:
      return attention_d64(a, work, s);
    case 128:
      return attention_d128(a, work, s);
    default:
      return attention_d256(a, work, s);
  }
}

}  // namespace

void attention(void* qkv, void* out, float* out_scale, int32_t heads, const Cache& cache,
               const Rows& rows, const Workspace& work, cudaStream_t s) {
  if (rows.rows == 0) return;
  AttentionArgs a{};
  a.qkv = static_cast<const __nv_bfloat16*>(qkv);
  a.heads = heads, a.group = heads / cache.kv_heads;
  // Rows that are to be quantized have no other room: they replace their queries.
  const bool apart = out_scale == nullptr;
  const int64_t features = int64_t{heads} * cache.head_size;
  const int64_t width = features + int64_t{2} * cache.kv_heads * cache.head_size;
  a.out = static_cast<__nv_bfloat16*>(apart ? out : qkv), a.out_stride = apart ? features : width;
  a.scale = attention_detail::kLog2e / std::sqrt(static_cast<float>(cache.head_size));
  a.cache = cache, a.rows = rows, a.page_shift = a.group_shift = -1;
  for (int i = 0; i < 16; ++i)
    a.page_shift = cache.page_tokens == 1 << i ? i : a.page_shift,
    a.group_shift = a.group == 1 << i ? i : a.group_shift;
  choose(a, work, s);
  if (!apart) quantize_rows(qkv, width, out, out_scale, rows.rows, features, s);
}

}  // namespace drover::cuda
