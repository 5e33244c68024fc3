#include "backend/cuda/linear.h"

#include <algorithm>
#include <optional>
#include <random>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/hopper_linear.h"
#include "base/formats.h"

#define DROVER_CUBLAS(call)                                                 \
  do {                                                                      \
    const cublasStatus_t drover_s_ = (call);                                \
    if (drover_s_ != CUBLAS_STATUS_SUCCESS)                                 \
      DROVER_FAIL(ExitCode::kEnvironment, "cuBLASLt: {} failed: {}", #call, \
                  cublasLtGetStatusString(drover_s_));                      \
  } while (false)

namespace drover::cuda {
namespace {

constexpr size_t kLtWorkspace = size_t{32} << 20;
constexpr int64_t kWidenedRows = 256;

class HopperLinear : public Linear {
 public:
  HopperWeights w;
  DeviceBytes records;
  std::map<int64_t, HopperVariant> tuned;  // up to so many rows
  std::optional<HopperVariant> forced;     // whatever the rows

  HopperConfig config(int64_t m, const Workspace& work) const {
    if (forced) return plan_hopper(w, m, work, *forced);
    const auto at = tuned.lower_bound(m);
    return at != tuned.end() ? plan_hopper(w, m, work, at->second) : choose_hopper(w, m, work);
  }
};

HopperVariant variant_of(const LinearWay& way) {
  return {way.tokens, way.cluster, way.per_sm, way.stages, way.split};
}
LinearWay way_of(const HopperVariant& v) {
  return {v.tokens, v.cluster, v.per_sm, v.max_stages, v.split};
}

class QuantizedLinear : public Linear {
 public:
  QuantizedWeights w;
  DeviceBytes codes, scales, offsets;
};

class FloatLinear : public Linear {
 public:
  DeviceBytes weights;  // bf16 [rows, cols]
};

class LibraryLinear : public Linear {
 public:
  DeviceBytes weights, scales;  // e4m3 [rows, cols], f32 [rows]
};

bool quantized(const WeightTensor& w) {
  return w.format == WeightFormat::kInt4 || w.format == WeightFormat::kInt8;
}

// Enough chunks for three blocks a multiprocessor at small batches, each of 1,024 columns or more.
// Of the shape alone: the order of sums depends on it.
int chunk_blocks(int64_t tiles, int64_t blocks, int multiprocessors) {
  const int64_t row_blocks = tiles / kTilesOfBlock;
  int64_t chunks = (int64_t{3} * multiprocessors + row_blocks / 2) / row_blocks;
  chunks = std::clamp<int64_t>(chunks, 1, std::max<int64_t>(blocks / 8, 1));
  const int64_t chunk = (blocks + chunks - 1) / chunks;
  return static_cast<int>((chunk + 1) / 2 * 2);
}

}  // namespace

void* device_alloc(size_t bytes, std::string_view purpose) {
  void* p = nullptr;
  const cudaError_t e = cudaMalloc(&p, std::max<size_t>(bytes, 1));
  if (e != cudaSuccess) {
    cudaGetLastError();  // forgotten, so that the next launch is not blamed
    DROVER_FAIL(ExitCode::kEnvironment,
                "no GPU memory for {} ({:.1f} MiB): {}; use more GPUs, fewer KV pages or a smaller "
                "model",
                purpose, static_cast<double>(bytes) / (1 << 20), cudaGetErrorString(e));
  }
  return p;
}

DeviceBytes::DeviceBytes(size_t bytes, std::string_view purpose, cudaStream_t s)
    : p_(device_alloc(bytes, purpose)) {
  DROVER_CUDA(cudaMemsetAsync(p_, 0, bytes, s));
}

DeviceBytes::~DeviceBytes() { cudaFree(p_); }

struct LinearEngine::Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t w = nullptr, in = nullptr, out = nullptr;
  cublasLtMatmulHeuristicResult_t choice{};
  ~Plan() {
    cublasLtMatrixLayoutDestroy(out);
    cublasLtMatrixLayoutDestroy(in);
    cublasLtMatrixLayoutDestroy(w);
    cublasLtMatmulDescDestroy(operation);
  }
};

LinearEngine::LinearEngine(const Workspace& work, cudaStream_t stream, bool fp8_inputs,
                           bool portable, Tuning tuning)
    : work_(work),
      stream_(stream),
      fp8_inputs_(fp8_inputs),
      tuning_(std::move(tuning)),
      uploads_(stream),
      lt_workspace_(kLtWorkspace, "cuBLASLt's workspace", stream) {
  int device = 0;
  DROVER_CUDA(cudaGetDevice(&device));
  DROVER_CUDA(cudaDeviceGetAttribute(&compute_capability_major_, cudaDevAttrComputeCapabilityMajor,
                                     device));
  if (portable) compute_capability_major_ = 8;
  DROVER_CUBLAS(cublasLtCreate(&handle_));
}

LinearEngine::~LinearEngine() {
  plans_.clear();
  library_plans_.clear();
  cublasLtDestroy(handle_);
}

std::unique_ptr<Linear> LinearEngine::load(std::span<const WeightTensor> parts, bool gate_up) {
  DROVER_CHECK(!parts.empty(), ExitCode::kInternal, "a linear of no parts");
  const WeightTensor& first = parts.front();
  int64_t rows = 0;
  for (const WeightTensor& p : parts) {
    DROVER_CHECK(p.cols == first.cols && p.format == first.format && p.zero == first.zero &&
                     p.group == first.group && p.scale_dtype == first.scale_dtype,
                 ExitCode::kBadInput,
                 "stacked weights must be alike: {} columns {} group {} and {} columns {} group {}",
                 first.cols, to_string(first.format), first.group, p.cols, to_string(p.format),
                 p.group);
    rows += p.rows;
  }
  auto w = quantized(first) ? load_quantized(parts, rows, gate_up) : load_float(parts, rows);
  w->rows = rows, w->cols = first.cols;
  fresh_ = true;
  return w;
}

RepackSource LinearEngine::upload(const WeightTensor& p) {
  const DeviceTensor d = uploads_.upload(p);
  return {p.format == WeightFormat::kInt4 ? 4 : 8,
          p.group,
          static_cast<int>(p.zero),
          p.rows,
          p.cols,
          d.codes,
          d.scales,
          d.zeros,
          d.minimums};
}

bool LinearEngine::gates(const Linear& w) {
  const auto* h = dynamic_cast<const HopperLinear*>(&w);
  return h != nullptr && h->w.gated;
}

std::unique_ptr<Linear> LinearEngine::load_hopper(std::span<const WeightTensor> parts, int64_t rows,
                                                  bool gate_up) {
  auto l = std::make_unique<HopperLinear>();
  const WeightTensor& first = parts.front();
  l->w = hopper_shape(fp8_inputs_, first.scale_dtype == Dtype::kBf16, rows, first.cols);
  l->w.gated = gate_up && hopper_gates(rows);
  l->bytes = hopper_bytes(l->w);
  l->records = DeviceBytes(l->bytes, "weights", stream_);
  l->w.records = l->records.get();
  l->memory = {{l->records.get(), l->bytes}};
  l->quantized_input = fp8_inputs_;
  for (const LinearChoice& c : tuning_.of(fp8_inputs_ ? "w4a8" : "w4a16", rows, first.cols)) {
    DROVER_CHECK(
        hopper_has(fp8_inputs_, variant_of(c.way)), ExitCode::kBadInput,
        "the tuning file's {} {} x {} up to {} rows has a kernel of {} tokens, cluster {}, "
        "{} a multiprocessor, which this drover has not: run `drover bench tune` again",
        c.format, c.n, c.k, c.rows, c.way.tokens, c.way.cluster, c.way.per_sm);
    l->tuned[c.rows] = variant_of(c.way);
  }
  int64_t row = 0;
  for (const WeightTensor& p : parts) {
    hopper_repack(upload(p), row, l->w, stream_);
    DROVER_CUDA_LAUNCHED("repacking for Hopper");
    row += p.rows;
  }
  return l;
}

std::unique_ptr<Linear> LinearEngine::load_quantized(std::span<const WeightTensor> parts,
                                                     int64_t rows, bool gate_up) {
  const WeightTensor& first = parts.front();
  const bool known = first.group == 32 || first.group == 64 || first.group == 128;
  DROVER_CHECK(known && first.cols % first.group == 0, ExitCode::kBadInput,
               "the CUDA backend has groups of 32, 64 and 128 columns: found {} of {} columns",
               first.group, first.cols);
  const int bits = first.format == WeightFormat::kInt4 ? 4 : 8;
  if (hopper_fits(compute_capability_major_, bits, first.group, first.zero == ZeroKind::kSymmetric,
                  first.cols))
    return load_hopper(parts, rows, gate_up);
  auto l = std::make_unique<QuantizedLinear>();
  QuantizedWeights& w = l->w;
  w.bits = bits;
  w.group = first.group;
  const bool fast = w.bits == 4 && w.group == 128 && first.zero == ZeroKind::kSymmetric;
  w.zero = first.zero == ZeroKind::kMinimums ? 2 : fast ? 0 : 1;
  w.bf16_scales = first.scale_dtype == Dtype::kBf16;
  w.rows = rows, w.cols = first.cols;
  const int64_t block_rows = 16 * kTilesOfBlock;
  w.tiles = (rows + block_rows - 1) / block_rows * kTilesOfBlock;
  w.blocks = (first.cols + 127) / 128;
  w.chunk = chunk_blocks(w.tiles, w.blocks, work_.multiprocessors);
  size_t bytes[3];
  repacked_bytes(w, bytes);
  l->codes = DeviceBytes(bytes[0], "weights", stream_);
  l->scales = DeviceBytes(bytes[1], "weights' scales", stream_);
  if (bytes[2] > 0) l->offsets = DeviceBytes(bytes[2], "weights' offsets", stream_);
  l->bytes = bytes[0] + bytes[1] + bytes[2];
  l->memory = {{l->codes.get(), bytes[0]}, {l->scales.get(), bytes[1]}};
  if (bytes[2] > 0) l->memory.push_back({l->offsets.get(), bytes[2]});
  w.codes = l->codes.get();
  w.scales = static_cast<const uint32_t*>(l->scales.get());
  w.offsets = static_cast<const uint32_t*>(l->offsets.get());
  l->quantized_input = fp8_inputs_ && bits == 4;
  const size_t widened = static_cast<size_t>(kWidenedRows * first.cols) * 2;
  if (l->quantized_input && widened > widened_bytes_) {
    widened_ = DeviceBytes(widened, "inputs in bf16", stream_);
    widened_bytes_ = widened;
  }
  int64_t row = 0;
  for (const WeightTensor& p : parts) {
    repack(upload(p), row, w, stream_);
    DROVER_CUDA_LAUNCHED("repacking");
    row += p.rows;
  }
  return l;
}

std::unique_ptr<Linear> LinearEngine::load_float(std::span<const WeightTensor> parts,
                                                 int64_t rows) {
  auto l = std::make_unique<FloatLinear>();
  const int64_t cols = parts.front().cols;
  l->bytes = static_cast<size_t>(rows * cols) * 2;
  l->weights = DeviceBytes(l->bytes, "weights", stream_);
  l->memory = {{l->weights.get(), l->bytes}};
  auto* to = static_cast<uint16_t*>(l->weights.get());
  for (const WeightTensor& p : parts) {
    to_bf16(static_cast<int>(p.format), uploads_.upload(p).codes, to,
            static_cast<size_t>(p.rows * cols), stream_);
    DROVER_CUDA_LAUNCHED("weights to bf16");
    to += p.rows * cols;
  }
  return l;
}

// Column-major as cuBLAS sees it: out^T [n, rows] = w [n, k] * in^T [k, rows].
const LinearEngine::Plan& LinearEngine::plan(int64_t n, int64_t k, int64_t rows, bool f32_out) {
  auto& slot = plans_[{n, k, rows, f32_out}];
  if (slot) return *slot;
  auto p = std::make_unique<Plan>();
  const cublasOperation_t transposed = CUBLAS_OP_T;
  DROVER_CUBLAS(cublasLtMatmulDescCreate(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  DROVER_CUBLAS(cublasLtMatmulDescSetAttribute(p->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                               &transposed, sizeof(transposed)));
  const auto un = static_cast<uint64_t>(n), uk = static_cast<uint64_t>(k),
             um = static_cast<uint64_t>(rows);
  DROVER_CUBLAS(cublasLtMatrixLayoutCreate(&p->w, CUDA_R_16BF, uk, un, k));
  DROVER_CUBLAS(cublasLtMatrixLayoutCreate(&p->in, CUDA_R_16BF, uk, um, k));
  DROVER_CUBLAS(cublasLtMatrixLayoutCreate(&p->out, f32_out ? CUDA_R_32F : CUDA_R_16BF, un, um, n));
  cublasLtMatmulPreference_t preference = nullptr;
  DROVER_CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
  const size_t room = kLtWorkspace;
  int found = 0;
  cublasStatus_t status = cublasLtMatmulPreferenceSetAttribute(
      preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room, sizeof(room));
  if (status == CUBLAS_STATUS_SUCCESS)
    status = cublasLtMatmulAlgoGetHeuristic(handle_, p->operation, p->w, p->in, p->out, p->out,
                                            preference, 1, &p->choice, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  DROVER_CHECK(status == CUBLAS_STATUS_SUCCESS && found > 0, ExitCode::kEnvironment,
               "cuBLASLt has no way for {} rows of a {} x {} layer: {}", rows, n, k,
               cublasLtGetStatusString(status));
  slot = std::move(p);
  return *slot;
}

void LinearEngine::run(const Linear& linear, const LinearInput& in, void* out, int64_t rows,
                       bool f32_out) {
  if (rows == 0) return;
  DROVER_CHECK((in.scale != nullptr) == linear.quantized_input, ExitCode::kInternal,
               "a linear of {} x {} takes {}, and its input has {}", linear.rows, linear.cols,
               linear.quantized_input ? "e4m3 with scales" : "bf16",
               in.scale != nullptr ? "scales" : "none");
  if (const auto* h = dynamic_cast<const HopperLinear*>(&linear)) {
    HopperConfig c = h->config(rows, work_);
    if (fresh_) c.variant.dependent = false;  // it would read weights before they are there
    fresh_ = false;
    DROVER_CHECK(hopper_linear(h->w, c, in.data, in.scale, out, rows, f32_out, work_, stream_),
                 ExitCode::kInternal, "no tensor map for {} rows of {} at {}", rows, linear.cols,
                 in.data);
    DROVER_CUDA_LAUNCHED("a linear");
    return;
  }
  if (const auto* q = dynamic_cast<const QuantizedLinear*>(&linear)) {
    run_quantized(*q, in, out, rows, f32_out);
    return;
  }
  if (dynamic_cast<const LibraryLinear*>(&linear) != nullptr) {
    DROVER_CHECK(!f32_out, ExitCode::kInternal, "the library's FP8 linear writes bf16");
    run_library(linear, in, out, rows);
    return;
  }
  const auto& f = static_cast<const FloatLinear&>(linear);
  const Plan& p = plan(f.rows, f.cols, rows, f32_out);
  const float one = 1, zero = 0;
  DROVER_CUBLAS(cublasLtMatmul(handle_, p.operation, &one, f.weights.get(), p.w, in.data, p.in,
                               &zero, out, p.out, out, p.out, &p.choice.algo, lt_workspace_.get(),
                               kLtWorkspace, stream_));
}

std::vector<LinearWay> LinearEngine::ways(const Linear& linear, int64_t rows) const {
  const auto* h = dynamic_cast<const HopperLinear*>(&linear);
  if (h == nullptr) return {};
  std::vector<LinearWay> all{way_of(choose_hopper(h->w, rows, work_).variant)};
  std::vector<HopperConfig> seen{plan_hopper(h->w, rows, work_, variant_of(all[0]))};
  for (const HopperVariant& v : hopper_variants(h->w.fp8, rows)) {
    // Limits that do not bind, and shares that come out the same, are one way.
    const HopperConfig c = plan_hopper(h->w, rows, work_, v);
    if (std::any_of(seen.begin(), seen.end(),
                    [&](const HopperConfig& other) { return same_launch(c, other); }))
      continue;
    seen.push_back(c);
    all.push_back(way_of(v));
  }
  return all;
}

void LinearEngine::run_as(Linear& linear, const LinearWay* way) const {
  auto* h = dynamic_cast<HopperLinear*>(&linear);
  DROVER_CHECK(h != nullptr || way == nullptr, ExitCode::kInternal, "this linear has one way");
  if (h == nullptr) return;
  h->forced.reset();
  if (way == nullptr) return;
  DROVER_CHECK(hopper_has(h->w.fp8, variant_of(*way)), ExitCode::kInternal,
               "no kernel of {} tokens, cluster {}, {} a multiprocessor", way->tokens, way->cluster,
               way->per_sm);
  h->forced = variant_of(*way);
}

LibraryFp8* LinearEngine::library_plan(int64_t n, int64_t k, int64_t rows) {
  auto [at, fresh] = library_plans_.try_emplace({n, k, rows});
  if (fresh) at->second = LibraryFp8::make(handle_, n, k, rows, kLtWorkspace);
  return at->second.get();
}

std::unique_ptr<Linear> LinearEngine::library(int64_t rows, int64_t cols) {
  if (compute_capability_major_ != 9 || rows % 16 != 0 || cols % 16 != 0) return nullptr;
  if (library_plan(rows, cols, 16) == nullptr) return nullptr;
  auto l = std::make_unique<LibraryLinear>();
  l->rows = rows, l->cols = cols, l->quantized_input = true;
  l->weights = DeviceBytes(static_cast<size_t>(rows * cols), "the library's weights", stream_);
  l->scales = DeviceBytes(static_cast<size_t>(rows) * 4, "the library's scales", stream_);
  l->bytes = static_cast<size_t>(rows * (cols + 4));
  l->memory = {{l->weights.get(), static_cast<size_t>(rows * cols)},
               {l->scales.get(), static_cast<size_t>(rows) * 4}};
  // Bell-shaped, with a row's largest near e4m3's: the chip's power depends on the bits.
  RandomMatrix m{.seed = 7, .rows = rows, .cols = cols, .all_cols = cols, .bits = 8};
  std::mt19937 random(11);
  std::normal_distribution<float> normal(0, 110);
  for (uint32_t& code : m.table) code = fp8_from_float(normal(random));
  make_random(m, l->weights.get(), stream_);
  DROVER_CUDA_LAUNCHED("the library's weights");
  const std::vector<float> scales(static_cast<size_t>(rows), 0x1p-13f);
  DROVER_CUDA(cudaMemcpyAsync(l->scales.get(), scales.data(), scales.size() * 4,
                              cudaMemcpyHostToDevice, stream_));
  DROVER_CUDA(cudaStreamSynchronize(stream_));
  return l;
}

void LinearEngine::run_library(const Linear& linear, const LinearInput& in, void* out,
                               int64_t rows) {
  const auto& l = static_cast<const LibraryLinear&>(linear);
  LibraryFp8* p = library_plan(l.rows, l.cols, LibraryFp8::padded(rows));
  DROVER_CHECK(p != nullptr, ExitCode::kEnvironment,
               "cuBLASLt has no FP8 way for {} rows of a {} x {} layer", rows, l.rows, l.cols);
  DROVER_CUBLAS(p->run(l.weights.get(), static_cast<const float*>(l.scales.get()), in.data,
                       in.scale, out, lt_workspace_.get(), stream_));
}

void LinearEngine::run_quantized(const Linear& linear, const LinearInput& in, void* out,
                                 int64_t rows, bool f32_out) {
  const auto& q = static_cast<const QuantizedLinear&>(linear);
  if (in.scale == nullptr) {
    quantized_linear(q.w, choose_linear(q.w, rows, work_), in.data, nullptr, out, rows, f32_out,
                     work_, stream_);
    DROVER_CUDA_LAUNCHED("a quantized linear");
    return;
  }
  for (int64_t first = 0; first < rows; first += kWidenedRows) {
    const int64_t count = std::min(kWidenedRows, rows - first);
    e4m3_to_bf16(static_cast<const uint8_t*>(in.data) + first * q.cols, widened_.get(),
                 static_cast<size_t>(count * q.cols), stream_);
    quantized_linear(q.w, choose_linear(q.w, count, work_), widened_.get(), in.scale + first,
                     static_cast<uint8_t*>(out) + first * q.rows * (f32_out ? 4 : 2), count,
                     f32_out, work_, stream_);
    DROVER_CUDA_LAUNCHED("a quantized linear of e4m3");
  }
}

}  // namespace drover::cuda
