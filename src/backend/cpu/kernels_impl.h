// The body of the kernels, included once by each kernels_<isa>.cc inside a namespace of its own and
// under its `#pragma GCC target`. It includes nothing and calls no inline function of a library:
// such a function, compiled for AVX-512 here, could be the copy that the linker keeps for all.

// DROVER_KERNELS is the bits of a vector. (GCC 12 defines __AVX512F__ under its pragma in C only.)
#if DROVER_KERNELS == 512
constexpr int kWidth = 16;
#elif DROVER_KERNELS == 256
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef float VecLoad __attribute__((vector_size(4 * kWidth), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kWidth)));
typedef uint16_t HalfLoad __attribute__((vector_size(2 * kWidth), aligned(2), may_alias));
typedef uint8_t ByteVec __attribute__((vector_size(kWidth)));
typedef uint8_t ByteLoad __attribute__((vector_size(kWidth), aligned(1), may_alias));

template <int... kLane>
struct Lanes {};
#if DROVER_KERNELS == 512
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif DROVER_KERNELS == 256
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

#define DROVER_INLINE static inline __attribute__((always_inline))

DROVER_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecLoad*>(p); }
DROVER_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecLoad*>(p) = v; }
DROVER_INLINE Vec splat(float x) { return x - Vec{}; }
DROVER_INLINE BitVec bits(Vec v) { return reinterpret_cast<BitVec>(v); }
DROVER_INLINE Vec floats(BitVec v) { return reinterpret_cast<Vec>(v); }
DROVER_INLINE Vec magnitude(Vec v) { return floats(bits(v) & 0x7fffffffu); }

DROVER_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if DROVER_KERNELS == 512
  return reinterpret_cast<Vec>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif DROVER_KERNELS == 256
  return reinterpret_cast<Vec>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

DROVER_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b when either is NaN

DROVER_INLINE float lanes_sum(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}

DROVER_INLINE float lanes_max(Vec v) {
  float lane[kWidth];
  store(lane, v);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

// e^x with a relative error under 2e-7 for x in [-87, 88]; 0 below, e^88 above; NaN stays NaN.
// Cody-Waite reduction and the Taylor polynomial to degree 7 on |r| <= ln2 / 2.
DROVER_INLINE Vec exponential(Vec x) {
  const Vec low = splat(-87.0f), high = splat(88.0f);
  Vec y = x < low ? low : x;
  y = y > high ? high : y;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = fma(y, splat(1.44269504f), magic);
  const Vec n = shifted - magic;
  Vec r = fma(n, splat(-0.693145752f), y);
  r = fma(n, splat(-1.42860677e-6f), r);
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const BitVec power = (bits(shifted) - bits(magic) + 127u) << 23;
  const Vec result = p * floats(power);
  return x < low ? Vec{} : result;
}

void add(float* residual, const float* delta, int64_t n) {
  if (delta == nullptr) return;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(residual + i, load(residual + i) + load(delta + i));
  for (; i < n; ++i) residual[i] += delta[i];
}

void rms_norm(const float* x, const float* weight, float* out, int64_t n, float epsilon) {
  Vec a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const Vec s = load(x + i), t = load(x + i + kWidth);
    a = fma(s, s, a);
    b = fma(t, t, b);
  }
  float sum = lanes_sum(a + b);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + epsilon);
  for (i = 0; i + kWidth <= n; i += kWidth)
    store(out + i, load(x + i) * splat(scale) * load(weight + i));
  for (; i < n; ++i) out[i] = x[i] * scale * weight[i];
}

void silu_gate(const float* gate, const float* up, float* out, int64_t n) {
  const Vec one = splat(1.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec g = load(gate + i);
    store(out + i, g / (one + exponential(-g)) * load(up + i));
  }
  if (i == n) return;
  float g[kWidth] = {}, u[kWidth] = {};
  for (int64_t j = i; j < n; ++j) g[j - i] = gate[j], u[j - i] = up[j];
  const Vec v = load(g);
  store(g, v / (one + exponential(-v)) * load(u));
  for (int64_t j = i; j < n; ++j) out[j] = g[j - i];
}

DROVER_INLINE BitVec bf16_bits(Vec v) {  // in the upper 16 bits, the lower ones not cleared
  const BitVec u = bits(v);
  const BitVec rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return v == v ? rounded : (u | 0x400000u);
}

DROVER_INLINE uint32_t bf16_bits(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  return x == x ? u + 0x7fffu + ((u >> 16) & 1u) : (u | 0x400000u);
}

void to_bf16(const float* x, uint16_t* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth)
    *reinterpret_cast<HalfLoad*>(out + i) =
        __builtin_convertvector(bf16_bits(load(x + i)) >> 16, HalfVec);
  for (; i < n; ++i) out[i] = static_cast<uint16_t>(bf16_bits(x[i]) >> 16);
}

void round_to_bf16(const float* x, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, floats(bf16_bits(load(x + i)) & 0xffff0000u));
  for (; i < n; ++i) out[i] = __builtin_bit_cast(float, bf16_bits(x[i]) & 0xffff0000u);
}

// e4m3 codes of finite v, |v| at most a little above 448. Normal numbers: round the float's bits to
// three of mantissa and move the exponent. Subnormals: adding 2^14 rounds to multiples of 2^-9.
DROVER_INLINE BitVec fp8_bits(Vec v) {
  const Vec m = magnitude(v);
  const BitVec u = bits(m);
  BitVec normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
  normal = normal > 0x7eu ? BitVec{} + 0x7eu : normal;
  const BitVec subnormal = bits(m + splat(16384.0f)) - 0x46800000u;
  const BitVec code = m < splat(0.015625f) ? subnormal : normal;
  return code | (bits(v) >> 31 << 7);
}

// amax / 448; 0 when that is no normal number, NaN when x holds a NaN or an infinity.
DROVER_INLINE float fp8_scale(const float* x, int64_t n) {
  Vec top{}, check{};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec v = load(x + i);
    top = larger(magnitude(v), top);
    check = check + (v - v);  // 0, or NaN for NaN and infinities
  }
  float amax = lanes_max(top), finite = lanes_sum(check);
  for (; i < n; ++i) {
    const float m = __builtin_fabsf(x[i]);
    amax = m > amax ? m : amax;
    finite += x[i] - x[i];
  }
  const float scale = finite == 0.0f ? amax / 448.0f : finite;
  return scale >= 1.17549435e-38f || scale != scale ? scale : 0.0f;
}

float to_fp8(const float* x, uint8_t* out, int64_t n) {
  const float scale = fp8_scale(x, n);
  int64_t i = 0;
  if (!(scale > 0.0f)) {
    for (; i < n; ++i) out[i] = 0;
    return scale;
  }
  for (; i + kWidth <= n; i += kWidth)
    *reinterpret_cast<ByteLoad*>(out + i) =
        __builtin_convertvector(fp8_bits(load(x + i) / splat(scale)), ByteVec);
  if (i < n) {
    float rest[kWidth] = {};
    for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
    const BitVec code = fp8_bits(load(rest) / splat(scale));
    for (int64_t j = i; j < n; ++j) out[j] = static_cast<uint8_t>(code[j - i]);
  }
  return scale;
}

// The numbers that codes of v / scale stand for.
DROVER_INLINE Vec through_code(Vec v, Vec scale) {
  const BitVec code = fp8_bits(v / scale), low = code & 0x7fu;
  const Vec normal = floats((low << 20) + (120u << 23));
  const Vec subnormal =
      __builtin_convertvector(reinterpret_cast<IntVec>(low), Vec) * splat(0x1p-9f);
  const Vec m = low < 8u ? subnormal : normal;
  return floats(bits(m) | (code >> 7 << 31)) * scale;
}

float through_fp8(float* x, int64_t n) {
  const float scale = fp8_scale(x, n);
  int64_t i = 0;
  if (!(scale > 0.0f)) {
    for (; i < n; ++i) x[i] = scale;
    return scale;
  }
  for (; i + kWidth <= n; i += kWidth) store(x + i, through_code(load(x + i), splat(scale)));
  if (i == n) return scale;
  float rest[kWidth] = {};
  for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
  store(rest, through_code(load(rest), splat(scale)));
  for (int64_t j = i; j < n; ++j) x[j] = rest[j - i];
  return scale;
}

int64_t argmax(const float* x, int64_t n) {
  const float infinity = __builtin_inff();
  Vec a = splat(-infinity), b = a;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    a = larger(load(x + i), a);
    b = larger(load(x + i + kWidth), b);
  }
  float top = lanes_max(larger(a, b));
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (i = 0; i < n; ++i)
    if (x[i] == top) return i;
  return -1;  // all NaN, or n = 0
}

// kWidth values of the cache as floats; FP8 ones times 2^-8 (see kFp8Unit).
DROVER_INLINE Vec decode(const float* p) { return load(p); }

DROVER_INLINE Vec decode(const uint16_t* p) {
  return floats(__builtin_convertvector(HalfVec(*reinterpret_cast<const HalfLoad*>(p)), BitVec)
                << 16);
}

// e4m3 put into IEEE half's fields (sign, then the magnitude one bit lower) is the same number
// times 2^(7 - 15), subnormals included. NaN codes never occur but under a NaN scale (to_fp8).
constexpr float kFp8Unit = 256.0f;

DROVER_INLINE Vec decode(const uint8_t* p) {
#if DROVER_KERNELS == 512
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(wide, 8), 1),
                                        _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, half));  // GCC 12 warns of the other
#elif DROVER_KERNELS == 256
  const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m128i half = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(wide, 8), 1),
                                     _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(half));
#else
  const ByteVec bytes = *reinterpret_cast<const ByteLoad*>(p);
  const BitVec code = __builtin_convertvector(bytes, BitVec);
  const BitVec low = code & 0x7fu;
  const Vec normal = floats((low << 20) + (112u << 23));
  const Vec subnormal =
      __builtin_convertvector(reinterpret_cast<IntVec>(low), Vec) * splat(0x1p-17f);
  const Vec m = low < 8u ? subnormal : normal;
  return floats(bits(m) | (code >> 7 << 31));
#endif
}

// From vectors a and b whose lanes are partial sums, kStep apart, of one token each: a vector that
// alternates kStep lanes of a's sums with kStep lanes of b's.
template <int kStep, int... kLane>
DROVER_INLINE Vec pair_sum(Vec a, Vec b, Lanes<kLane...>) {
  const Vec x = __builtin_shufflevector(
      a, b, ((kLane & kStep) ? kWidth + (kLane & ~kStep) : (kLane & ~kStep))...);
  const Vec y =
      __builtin_shufflevector(a, b, ((kLane & kStep) ? kWidth + kLane : kLane + kStep)...);
  return x + y;
}

template <int kStep>
DROVER_INLINE void halve(Vec* part) {
#pragma GCC unroll 8
  for (int i = 0; i < kWidth / kStep / 2; ++i)
    part[i] = pair_sum<kStep>(part[2 * i], part[2 * i + 1], AllLanes{});
}

// Lane t of the result is the sum of the lanes of part[t].
DROVER_INLINE Vec sum_each(Vec* part) {
  halve<1>(part);
  halve<2>(part);
  if constexpr (kWidth > 4) halve<4>(part);
  if constexpr (kWidth > 8) halve<8>(part);
  return part[0];
}

template <typename T>
DROVER_INLINE void decode_tile(const T* from, int count, int head_size, float* to) {
  int64_t i = 0;
  for (; i < static_cast<int64_t>(count) * head_size; i += kWidth) store(to + i, decode(from + i));
  for (; i < static_cast<int64_t>(kTile) * head_size; i += kWidth) store(to + i, Vec{});
}

void load_scales(const float* from, int64_t token, int count, float* to) {
  for (int t = 0; t < kTile; ++t)
    to[t] = t >= count ? 0.0f : from == nullptr ? 1.0f : from[token + t] * kFp8Unit;
}

// Tokens past `count` become zeros: the memory behind them may never have been written.
void load_tile(const KvLayer& cache, const KvShape& shape, int64_t token, int count,
               AttentionScratch& s) {
  const int64_t at = token * shape.head_size;
  const int d = shape.head_size;
  switch (shape.format) {
    case KvFormat::kF32:
      decode_tile(static_cast<const float*>(cache.k) + at, count, d, s.k);
      decode_tile(static_cast<const float*>(cache.v) + at, count, d, s.v);
      break;
    case KvFormat::kBf16:
      decode_tile(static_cast<const uint16_t*>(cache.k) + at, count, d, s.k);
      decode_tile(static_cast<const uint16_t*>(cache.v) + at, count, d, s.v);
      break;
    case KvFormat::kFp8:
      decode_tile(static_cast<const uint8_t*>(cache.k) + at, count, d, s.k);
      decode_tile(static_cast<const uint8_t*>(cache.v) + at, count, d, s.v);
      break;
  }
  const bool scaled = shape.format == KvFormat::kFp8;
  load_scales(scaled ? cache.k_scale : nullptr, token, count, s.k_scale);
  load_scales(scaled ? cache.v_scale : nullptr, token, count, s.v_scale);
}

// One query against the first `count` tokens of a tile: online softmax (Milakov and Gimelshein,
// arXiv 1805.02867). What it does depends on the query's own position only.
template <int kHeadSize>
DROVER_INLINE void attend(AttentionScratch& s, int query, int count) {
  constexpr int kParts = kHeadSize / kWidth;
  const float* q = s.query + query * kHeadSize;
  alignas(64) float probability[kTile];
  float top = s.top[query];
  for (int base = 0; base < kTile; base += kWidth) {
    Vec part[kWidth];
#pragma GCC unroll 16
    for (int t = 0; t < kWidth; ++t) {
      const float* k = s.k + (base + t) * kHeadSize;
      Vec sum{};
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) sum = fma(load(q + i * kWidth), load(k + i * kWidth), sum);
      part[t] = sum;
    }
    store(probability + base, sum_each(part) * load(s.k_scale + base));
  }
  for (int t = count; t < kTile; ++t) probability[t] = -__builtin_inff();
  Vec best = load(probability);
  for (int base = kWidth; base < kTile; base += kWidth)
    best = larger(load(probability + base), best);
  const float tile_top = lanes_max(best);
  const float old_top = top;
  top = tile_top > top ? tile_top : top;
  Vec weights{};
  for (int base = 0; base < kTile; base += kWidth) {
    const Vec p = exponential(load(probability + base) - splat(top));
    weights += p;
    store(probability + base, p * load(s.v_scale + base));
  }
  const float shrink = exponential(splat(old_top - top))[0];
  s.weight[query] = s.weight[query] * shrink + lanes_sum(weights);
  s.top[query] = top;

  // Even and odd tokens apart: two chains of additions hide the latency.
  float* sum = s.sum + query * kHeadSize;
  constexpr int kBlock = kParts < 4 ? kParts : 4;
  for (int part = 0; part < kParts; part += kBlock) {
    const int at = part * kWidth;
    Vec even[kBlock], odd[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      even[i] = load(sum + at + i * kWidth) * splat(shrink);
      odd[i] = Vec{};
    }
    int t = 0;
    for (; t + 2 <= count; t += 2) {
      const float* v = s.v + t * kHeadSize + at;
      const Vec p0 = splat(probability[t]), p1 = splat(probability[t + 1]);
      for (int i = 0; i < kBlock; ++i) {
        even[i] = fma(p0, load(v + i * kWidth), even[i]);
        odd[i] = fma(p1, load(v + kHeadSize + i * kWidth), odd[i]);
      }
    }
    if (t < count)
      for (int i = 0; i < kBlock; ++i)
        even[i] = fma(splat(probability[t]), load(s.v + t * kHeadSize + at + i * kWidth), even[i]);
    for (int i = 0; i < kBlock; ++i) store(sum + at + i * kWidth, even[i] + odd[i]);
  }
}

template <int kHeadSize>
void attention_of(const AttentionTask& task, AttentionScratch& s) {
  const Backend::Attention& a = *task.args;
  const KvShape& shape = a.shape;
  const int group = a.heads / shape.kv_heads;
  const int span = task.group_end - task.group_begin;
  const int64_t row_size = (a.heads + 2ll * shape.kv_heads) * kHeadSize;
  const int64_t first_head = static_cast<int64_t>(task.kv_head) * group + task.group_begin;
  const Vec scale = splat(1.0f / __builtin_sqrtf(static_cast<float>(kHeadSize)));
  for (int row = task.row_begin, n = 0; row < task.row_end; ++row)
    for (int g = 0; g < span; ++g, ++n) {
      const float* q =
          static_cast<const float*>(a.qkv) + row * row_size + (first_head + g) * kHeadSize;
      for (int i = 0; i < kHeadSize; i += kWidth) {
        store(s.query + n * kHeadSize + i, load(q + i) * scale);
        store(s.sum + n * kHeadSize + i, Vec{});
      }
      s.top[n] = -__builtin_inff();
      s.weight[n] = 0;
    }

  const int first = task.position[task.row_begin], last = task.position[task.row_end - 1];
  for (int start = 0; start <= last;) {
    const int offset = start % shape.page_tokens;
    const int left = shape.page_tokens - offset;
    const int size = left < kTile ? left : kTile;
    const int64_t page = task.pages[start / shape.page_tokens];
    const int64_t token = (page * shape.kv_heads + task.kv_head) * shape.page_tokens + offset;
    const int present = last - start + 1 < size ? last - start + 1 : size;
    load_tile(a.cache, shape, token, present, s);
    // Rows before the tile see none of it; positions of a chunk are consecutive.
    const int skip = start > first ? start - first : 0;
    for (int row = task.row_begin + skip; row < task.row_end; ++row) {
      const int seen = task.position[row] - start + 1;
      for (int g = 0; g < span; ++g)
        attend<kHeadSize>(s, (row - task.row_begin) * span + g, seen < size ? seen : size);
    }
    start += size;
  }

  for (int row = task.row_begin, n = 0; row < task.row_end; ++row)
    for (int g = 0; g < span; ++g, ++n) {
      float* out = static_cast<float*>(a.out.data) +
                   (static_cast<int64_t>(row) * a.heads + first_head + g) * kHeadSize;
      const Vec weight = splat(s.weight[n]);
      for (int i = 0; i < kHeadSize; i += kWidth)
        store(out + i, load(s.sum + n * kHeadSize + i) / weight);
    }
}

void attention(const AttentionTask& task, AttentionScratch& scratch) {
  switch (task.args->shape.head_size) {
    case 16:
      return attention_of<16>(task, scratch);
    case 32:
      return attention_of<32>(task, scratch);
    case 64:
      return attention_of<64>(task, scratch);
    case 128:
      return attention_of<128>(task, scratch);
    case 256:
      return attention_of<256>(task, scratch);
    default:
      __builtin_unreachable();  // the backend checked
  }
}

#undef DROVER_INLINE
