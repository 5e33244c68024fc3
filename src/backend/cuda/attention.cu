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

void attention(const void* qkv, void* out, float* out_scale, int32_t heads, const Cache& cache,
               const Rows& rows, const Workspace& work, cudaStream_t s) {
  if (rows.rows == 0) return;
  (void)out_scale;
  AttentionArgs a{};
  a.qkv = static_cast<const __nv_bfloat16*>(qkv), a.out = static_cast<__nv_bfloat16*>(out);
  a.heads = heads, a.group = heads / cache.kv_heads;
  a.scale = attention_detail::kLog2e / std::sqrt(static_cast<float>(cache.head_size));
  a.cache = cache, a.rows = rows;
  switch (cache.head_size) {
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

}  // namespace drover::cuda
