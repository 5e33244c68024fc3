#include "backend/cpu/dnnl_linear.h"

#include <omp.h>
#include <oneapi/dnnl/dnnl.hpp>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/formats.h"
#include "base/log.h"

namespace drover::cpu {
namespace {

using Tag = dnnl::memory::format_tag;
using Desc = dnnl::memory::desc;
using Product = dnnl::inner_product_forward;

const char* isa_name(dnnl::cpu_isa isa) {
  // Values of both major versions' enums; 3.x has more of them.
  switch (static_cast<int>(isa)) {
    case dnnl_cpu_isa_sse41:
      return "sse41";
    case dnnl_cpu_isa_avx:
      return "avx";
    case dnnl_cpu_isa_avx2:
      return "avx2";
    case dnnl_cpu_isa_avx2_vnni:
      return "avx2_vnni";
    case dnnl_cpu_isa_avx512_core:
      return "avx512_core";
    case dnnl_cpu_isa_avx512_core_vnni:
      return "avx512_core_vnni";
    case dnnl_cpu_isa_avx512_core_bf16:
      return "avx512_core_bf16";
    case dnnl_cpu_isa_avx512_core_amx:
      return "avx512_core_amx";
    default:
      return "other";
  }
}

Product::primitive_desc make_product(const dnnl::engine& engine, const dnnl::primitive_attr& attr,
                                     const Desc& src, const Desc& weights, const Desc& dst) {
#if DNNL_VERSION_MAJOR >= 3
  return Product::primitive_desc(engine, dnnl::prop_kind::forward_inference, src, weights, dst,
                                 attr);
#else
  return Product::primitive_desc(
      Product::desc(dnnl::prop_kind::forward_inference, src, weights, dst), attr, engine);
#endif
}

// One shape's primitive for one number of rows, and its operands, whose handles are set at every
// run.
struct Bucket {
  Product primitive;
  dnnl::memory src, dst, scratch;
};

struct Shape {
  Desc packed;                        // the weights' layout, the same for all buckets
  std::map<int64_t, Bucket> buckets;  // by rows
  std::string implementation;
};

class PackedLinear : public Linear {
 public:
  Shape* shape = nullptr;
  dnnl::memory weights;
};

// Rows up to 8 exactly, up to 64 by eights, up to a block by 32s.
int64_t bucket_of(int64_t rows) {
  if (rows <= 8) return rows;
  if (rows <= 64) return (rows + 7) / 8 * 8;
  return (rows + 31) / 32 * 32;
}

struct FreeBytes {
  void operator()(void* p) const noexcept { std::free(p); }
};
using Bytes = std::unique_ptr<std::byte[], FreeBytes>;

Bytes allocate(size_t bytes, const char* purpose) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  Bytes p(static_cast<std::byte*>(std::aligned_alloc(64, std::max<size_t>(rounded, 64))));
  DROVER_CHECK(p, ExitCode::kEnvironment,
               "no memory for {} ({} bytes): use more ranks, or a smaller model", purpose, bytes);
  return p;
}

}  // namespace

Isa dnnl_isa() {
  const int isa = static_cast<int>(dnnl::get_effective_cpu_isa());
  const auto has = [isa](int bits) { return (isa & bits) == bits; };
  if (has(dnnl_cpu_isa_avx512_core_bf16)) return Isa::kAvx512Bf16;
  if (has(dnnl_cpu_isa_avx512_core)) return Isa::kAvx512;
  if (has(dnnl_cpu_isa_avx2)) return Isa::kAvx2;
  return Isa::kBase;
}

std::string dnnl_description() {
  const dnnl_version_t* v = dnnl_version();
  return fmt::format("oneDNN {}.{}.{} {}", v->major, v->minor, v->patch,
                     isa_name(dnnl::get_effective_cpu_isa()));
}

struct LinearEngine::Impl {
  Impl(Dtype t, int n, const Kernels& k, Isa isa)
      : type(t),
        threads(n),
        kernels(k),
        hold_bf16(t == Dtype::kBf16 && isa >= Isa::kAvx512Bf16),
        least_rows(isa >= Isa::kAvx512 ? 1 : 16),
        block_rows(isa >= Isa::kAvx512 ? 256 : 64) {}

  Dtype type;
  int threads;
  const Kernels& kernels;
  bool hold_bf16;  // weights and inputs in bf16, not only rounded to it
  // Below AVX-512, oneDNN sums few rows in another order than many: seen up to 8 rows in 2.6 (gemm)
  // and above 64 in 3.2 (brgemm:avx2). There, all rows are computed in blocks between the two.
  int64_t least_rows;
  int64_t block_rows;
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  dnnl::primitive_attr attr;
  std::map<std::pair<int64_t, int64_t>, Shape> shapes;  // by rows, columns
  Bytes inputs;                                         // one block of rounded inputs
  size_t inputs_size = 0;
  Bytes scratch;
  size_t scratch_size = 0;

  dnnl::memory::data_type held() const {
    return hold_bf16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
  }
  Shape& shape_for(int64_t rows, int64_t cols);
  void add_bucket(Shape& shape, int64_t m, int64_t rows, int64_t cols);
  void pack(std::span<const WeightTensor> parts, PackedLinear& w);
};

LinearEngine::LinearEngine(Dtype type, int threads, const Kernels& kernels) {
  DROVER_CHECK(
      type == Dtype::kF32 || type == Dtype::kBf16 || type == Dtype::kFp8E4m3, ExitCode::kUsage,
      "linears on the CPU work in f32, bf16 or f32 with inputs in FP8, not in {}", to_string(type));
  impl_ = std::make_unique<Impl>(type, threads, kernels, dnnl_isa());
  impl_->attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  impl_->attr.set_fpmath_mode(dnnl::fpmath_mode::strict);
}

LinearEngine::~LinearEngine() = default;

int64_t LinearEngine::padded_rows(int64_t rows) const {
  const int64_t whole = rows / impl_->block_rows * impl_->block_rows;
  const int64_t rest = rows - whole;
  return whole + (rest == 0 ? 0 : std::max(bucket_of(rest), impl_->least_rows));
}

void LinearEngine::Impl::add_bucket(Shape& shape, int64_t m, int64_t rows, int64_t cols) {
  const Desc src({m, cols}, held(), Tag::ab);
  const Desc dst({m, rows}, dnnl::memory::data_type::f32, Tag::ab);
  const auto product = make_product(engine, attr, src, shape.packed, dst);
  const std::string name = product.impl_info_str();
  if (name.find("ref") != std::string::npos)
    log::warn("linear {} x {} with {} rows falls to oneDNN's slow reference code ({})", rows, cols,
              m, name);
  shape.packed = product.weights_desc();
  if (shape.implementation.empty()) shape.implementation = name;
  const size_t needed = product.scratchpad_desc().get_size();
  if (needed > scratch_size) {
    scratch = allocate(needed, "oneDNN's scratchpad");
    scratch_size = needed;
  }
  shape.buckets.emplace(m,
                        Bucket{Product(product), dnnl::memory(src, engine, DNNL_MEMORY_NONE),
                               dnnl::memory(dst, engine, DNNL_MEMORY_NONE),
                               dnnl::memory(product.scratchpad_desc(), engine, DNNL_MEMORY_NONE)});
}

Shape& LinearEngine::Impl::shape_for(int64_t rows, int64_t cols) {
  const auto [found, is_new] = shapes.try_emplace({rows, cols});
  Shape& shape = found->second;
  if (!is_new) return shape;
  shape.packed = Desc({rows, cols}, held(), Tag::any);
  // The largest first: it settles the layout.
  for (int64_t m = block_rows; m >= least_rows; --m)
    if (bucket_of(m) == m) add_bucket(shape, m, rows, cols);
  const size_t bytes = static_cast<size_t>(block_rows * cols) * sizeof(float);
  if (type == Dtype::kBf16 && bytes > inputs_size) {
    inputs = allocate(bytes, "inputs of linears");
    std::memset(inputs.get(), 0, bytes);  // rows of padding are multiplied too
    inputs_size = bytes;
  }
  return shape;
}

void LinearEngine::Impl::pack(std::span<const WeightTensor> parts, PackedLinear& w) {
  const size_t element = hold_bf16 ? 2 : 4;
  const size_t row_bytes = static_cast<size_t>(w.cols) * element;
  // The plain copy lives only here: one tensor's worth above the packed weights.
  const Bytes plain = allocate(static_cast<size_t>(w.rows) * row_bytes, "unpacking weights");
  std::vector<float> row(static_cast<size_t>(w.cols));
  std::byte* to = plain.get();
  for (const WeightTensor& part : parts)
    for (int64_t r = 0; r < part.rows; ++r, to += row_bytes) {
      float* values = hold_bf16 ? row.data() : reinterpret_cast<float*>(to);
      dequantize_row(part, r, {values, static_cast<size_t>(w.cols)});
      if (hold_bf16)
        kernels.to_bf16(values, reinterpret_cast<uint16_t*>(to), w.cols);
      else if (type == Dtype::kBf16)
        kernels.round_to_bf16(values, values, w.cols);
    }
  dnnl::memory from(Desc({w.rows, w.cols}, held(), Tag::ab), engine, plain.get());
  w.weights = dnnl::memory(w.shape->packed, engine);
  dnnl::reorder(from, w.weights).execute(stream, from, w.weights);
  stream.wait();
}

std::unique_ptr<Linear> LinearEngine::load(std::span<const WeightTensor> parts) {
  DROVER_CHECK(!parts.empty(), ExitCode::kInternal, "a linear needs at least one weight tensor");
  omp_set_num_threads(impl_->threads);
  auto w = std::make_unique<PackedLinear>();
  w->cols = parts[0].cols;
  w->quantized_input = impl_->type == Dtype::kFp8E4m3 && parts[0].format == WeightFormat::kInt4;
  for (const WeightTensor& part : parts) {
    DROVER_CHECK_EQ(part.cols, w->cols);
    w->rows += part.rows;
  }
  DROVER_CHECK(w->rows > 0 && w->cols > 0, ExitCode::kInternal, "a linear of {} x {} is empty",
               w->rows, w->cols);
  try {
    w->shape = &impl_->shape_for(w->rows, w->cols);
    impl_->pack(parts, *w);
  } catch (const dnnl::error& e) {
    DROVER_FAIL(ExitCode::kEnvironment, "oneDNN cannot load a linear of {} x {}: {} ({})", w->rows,
                w->cols, e.what(), dnnl_description());
  }
  w->bytes = w->shape->packed.get_size();
  return w;
}

void LinearEngine::run(const Linear& linear, const float* in, float* out, int64_t rows) {
  Impl& m = *impl_;
  const PackedLinear& w = static_cast<const PackedLinear&>(linear);
  omp_set_num_threads(m.threads);
  for (int64_t row = 0; row < rows; row += m.block_rows) {
    const int64_t real = std::min(rows - row, m.block_rows);
    Bucket& bucket = w.shape->buckets.at(std::max(bucket_of(real), m.least_rows));
    const void* source = in + row * w.cols;
    if (m.type == Dtype::kBf16) {
      const float* from = in + row * w.cols;
      if (m.hold_bf16)
        m.kernels.to_bf16(from, reinterpret_cast<uint16_t*>(m.inputs.get()), real * w.cols);
      else
        m.kernels.round_to_bf16(from, reinterpret_cast<float*>(m.inputs.get()), real * w.cols);
      source = m.inputs.get();
    }
    bucket.src.set_data_handle(const_cast<void*>(source));
    bucket.dst.set_data_handle(out + row * w.rows);
    bucket.scratch.set_data_handle(m.scratch.get());
    // The C call, since the C++ one builds a map at every execution.
    const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, bucket.src.get()},
                                    {DNNL_ARG_WEIGHTS, w.weights.get()},
                                    {DNNL_ARG_DST, bucket.dst.get()},
                                    {DNNL_ARG_SCRATCHPAD, bucket.scratch.get()}};
    const dnnl_status_t status =
        dnnl_primitive_execute(bucket.primitive.get(), m.stream.get(), 4, args);
    DROVER_CHECK(status == dnnl_success, ExitCode::kInternal,
                 "oneDNN failed with status {} in a linear of {} x {}", static_cast<int>(status),
                 w.rows, w.cols);
  }
}

std::string LinearEngine::description() const {
  std::string text = impl_->type == Dtype::kBf16 ? "bf16" : "f32";
  if (impl_->type == Dtype::kBf16 && !impl_->hold_bf16) text += " held as f32";
  if (impl_->type == Dtype::kFp8E4m3) text += ", inputs of INT4 layers fp8";
  if (!impl_->shapes.empty()) text += " (" + impl_->shapes.begin()->second.implementation + ")";
  return text;
}

}  // namespace drover::cpu
