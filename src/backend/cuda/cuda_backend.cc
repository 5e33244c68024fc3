#include "backend/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string_view>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/graphs.h"
#include "backend/cuda/kernels.h"
#include "backend/cuda/linear.h"
#include "backend/cuda/staging.h"

namespace drover {
namespace {

using cuda::DeviceBytes;

constexpr size_t kStagingHalf = size_t{8} << 20;
constexpr size_t kCounters = 1 << 16;

class StoredEmbedding : public Embedding {
 public:
  cuda::StoredTable table;
  DeviceBytes table_bytes;
};

// The device is chosen before any member allocates, the stream ends after all of them.
struct Device {
  int id;
  cudaDeviceProp properties{};
  cudaStream_t stream = nullptr;
  explicit Device(int device) : id(device) {
    DROVER_CHECK(id >= 0 && id < cuda_device_count(), ExitCode::kEnvironment,
                 "GPU {} is not there: CUDA sees {}", id, cuda_device_count());
    DROVER_CUDA(cudaSetDevice(id));
    DROVER_CUDA(cudaGetDeviceProperties(&properties, id));
    DROVER_CHECK(properties.major >= 8, ExitCode::kEnvironment,
                 "GPU {} ({}) has compute capability {}.{}: 8.0 or later is needed", id,
                 properties.name, properties.major, properties.minor);
    DROVER_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Device() { cudaStreamDestroy(stream); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
};

cudaStream_t as_stream(Stream s) { return static_cast<cudaStream_t>(s); }

cuda::Rows rows_of(const StepRows& s) {
  return {s.rows, s.chunks, s.decode_rows, s.row_slot, s.row_position, s.page_table, s.max_pages};
}

cuda::Cache cache_of(const KvShape& s, const KvLayer& l) {
  return {static_cast<int>(s.format),
          s.page_tokens,
          s.kv_heads,
          s.head_size,
          l.k,
          l.v,
          l.k_scale,
          l.v_scale};
}

void check_shape(const KvShape& s, int32_t heads) {
  const bool known = s.head_size == 16 || s.head_size == 32 || s.head_size == 64 ||
                     s.head_size == 128 || s.head_size == 256;
  DROVER_CHECK(known, ExitCode::kUsage,
               "the CUDA backend has heads of 16, 32, 64, 128 or 256 features, not of {}",
               s.head_size);
  DROVER_CHECK(s.kv_heads > 0 && s.page_tokens > 0 && heads % s.kv_heads == 0, ExitCode::kInternal,
               "{} query heads on {} KV heads, pages of {} tokens", heads, s.kv_heads,
               s.page_tokens);
}

class CudaBackend : public Backend {
 public:
  explicit CudaBackend(const CudaOptions& o)
      : device_(o.device),
        partials_(o.workspace_bytes, "the workspace", device_.stream),
        counters_(kCounters * 4, "counters", device_.stream),
        work_{
            static_cast<float*>(partials_.get()),    o.workspace_bytes / 4,
            static_cast<uint32_t*>(counters_.get()), kCounters,
            device_.properties.multiProcessorCount,  device_.properties.major == 9 && !o.portable},
        linears_(work_, device_.stream, o.inputs == Dtype::kFp8E4m3, o.portable, o.tuning),
        staging_(kStagingHalf) {}

  std::string name() const override { return "cuda"; }
  std::string description() const override {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    const auto& p = device_.properties;
    return fmt::format(
        "cuda: {}, sm_{}{}, {} multiprocessors, {:.1f} GiB, runtime {}.{}, driver "
        "for {}.{}, cuBLASLt {}",
        p.name, p.major, p.minor, p.multiProcessorCount,
        static_cast<double>(p.totalGlobalMem) / (1 << 30), runtime / 1000, runtime % 1000 / 10,
        driver / 1000, driver % 1000 / 10, cublasLtGetVersion());
  }
  Dtype activation_dtype() const override { return Dtype::kBf16; }
  // The kernels check bounds; few distinct sizes keep cuBLASLt's plans few.
  int64_t padded_rows(int64_t rows) const override {
    return (rows + kGpuRowMultiple - 1) / kGpuRowMultiple * kGpuRowMultiple;
  }
  Stream stream() override { return device_.stream; }
  void enter_thread() override { DROVER_CUDA(cudaSetDevice(device_.id)); }

  void* alloc(size_t bytes, std::string_view purpose) override {
    return cuda::device_alloc(bytes, purpose);
  }
  void free(void* p) noexcept override { cudaFree(p); }
  void copy_in(void* device, const void* host, size_t bytes, Stream s) override {
    staging_.copy_in(device, host, bytes, as_stream(s));
  }
  void copy_out(void* host, const void* device, size_t bytes, Stream s) override {
    staging_.copy_out(host, device, bytes, as_stream(s));
  }
  void copy(void* to, const void* from, size_t bytes, Stream s) override {
    DROVER_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, as_stream(s)));
  }
  DeviceEvent record(Stream s) override { return {staging_.record(as_stream(s))}; }
  bool done(DeviceEvent e) override { return staging_.done(e.handle); }
  void wait(DeviceEvent e, Deadline deadline, const Interrupt& interrupt) override {
    staging_.wait(e.handle, deadline, interrupt);
  }
  void replay(uint64_t key, const std::function<void()>& operations) override {
    graphs_.replay(key, device_.stream, operations);
  }
  void forget_replays() override { graphs_.clear(); }
  // Steps of 8, 16, ... an eighth of the size: at most that much is computed for nothing.
  int32_t replay_rows(int32_t rows) const override {
    if (rows <= 2) return rows;
    if (rows <= 4) return 4;
    int32_t step = 8;
    while (rows > 16 * step) step *= 2;
    return (rows + step - 1) / step * step;
  }
  Memory memory() const override {
    Memory m;
    DROVER_CUDA(cudaMemGetInfo(&m.free, &m.total));
    return m;
  }

  bool makes_weights() const override { return true; }
  std::unique_ptr<Linear> load_linear(std::span<const WeightTensor> parts) override {
    return linears_.load(parts);
  }
  std::unique_ptr<Linear> load_gate_up(std::span<const WeightTensor> parts) override {
    return linears_.load_gate_up(parts);
  }
  std::unique_ptr<Embedding> load_embedding(const WeightTensor& table) override;
  void loaded() override { linears_.loaded(); }
  std::unique_ptr<Linear> library_linear(int64_t rows, int64_t cols) override {
    return linears_.library(rows, cols);
  }
  std::vector<LinearWay> linear_ways(const Linear& w, int64_t rows) override {
    return linears_.ways(w, rows);
  }
  void run_linear_as(Linear& w, const LinearWay* way) override { linears_.run_as(w, way); }

  void embed(const Embedding& table, int64_t vocab_begin, const int32_t* tokens, int64_t max_tokens,
             const StepRows& step, void* out, Stream s) override {
    cuda::embed(static_cast<const StoredEmbedding&>(table).table, vocab_begin, tokens, max_tokens,
                step.row_slot, step.row_position, step.rows, out, as_stream(s));
    DROVER_CUDA_LAUNCHED("embed");
  }
  void norm(const Norm& a, Stream s) override;
  PeerSums peer_sums(int ranks, int64_t features) const override;
  void linear(const Linear& w, const LinearInput& in, void* out, int64_t rows, bool f32_out,
              Stream s) override {
    DROVER_CHECK(s == device_.stream, ExitCode::kInternal,
                 "linears run on the backend's own stream");
    linears_.run(w, in, out, rows, f32_out);
  }
  void gather_columns(const void* in, int64_t, int64_t segment_cols, const int32_t* index,
                      const LinearInput& out, int64_t rows, int64_t cols, Stream s) override {
    cuda::gather_columns(in, segment_cols, index, out.data, out.scale, rows, cols, as_stream(s));
    DROVER_CUDA_LAUNCHED("gather_columns");
  }
  void rope_append(const RopeAppend& a, const StepRows& step, Stream s) override {
    check_shape(a.shape, a.heads);
    DROVER_CHECK(a.rope_dims >= 0 && a.rope_dims % 2 == 0 && a.rope_dims <= a.shape.head_size,
                 ExitCode::kInternal, "{} rotated dimensions of heads of {}", a.rope_dims,
                 a.shape.head_size);
    cuda::rope_append(a.qkv, a.heads, a.inverse_frequencies, a.rope_dims, a.half_pairing,
                      cache_of(a.shape, a.cache), rows_of(step), as_stream(s));
    DROVER_CUDA_LAUNCHED("rope_append");
  }
  void attention(const Attention& a, const StepRows& step, Stream s) override {
    check_shape(a.shape, a.heads);
    // Where the output is quantized, the queries make room for it.
    cuda::attention(a.qkv, a.out.data, a.out.scale, a.heads, cache_of(a.shape, a.cache),
                    rows_of(step), work_, as_stream(s));
    DROVER_CUDA_LAUNCHED("attention");
  }
  void silu_gate(const void* in, const LinearInput& out, int64_t rows, int64_t features,
                 Stream s) override {
    cuda::silu_gate(in, out.data, out.scale, rows, features, as_stream(s));
    DROVER_CUDA_LAUNCHED("silu_gate");
  }
  void gate_up(const Linear& w, const LinearInput& in, void* scratch, const LinearInput& out,
               int64_t rows, Stream s) override {
    if (!cuda::LinearEngine::gates(w)) {
      linear(w, in, scratch, rows, false, s);
      return silu_gate(scratch, out, rows, w.rows / 2, s);
    }
    const bool quantizes = out.scale != nullptr;
    linears_.run(w, in, quantizes ? scratch : out.data, rows, false);
    if (!quantizes) return;
    cuda::quantize_gated(scratch, out.data, out.scale, rows, w.rows / 2, as_stream(s));
    DROVER_CUDA_LAUNCHED("quantizing gated rows");
  }
  void argmax(const Argmax& a, Stream s) override {
    cuda::argmax(a.logits, a.rows, a.vocab_begin, a.vocab_count, a.forbid_eos, a.eos_ids,
                 a.eos_count, reinterpret_cast<cuda::TokenCandidate*>(a.out), as_stream(s));
    DROVER_CUDA_LAUNCHED("argmax");
  }
  void merge_argmax(const Candidate* candidates, int32_t shards, int64_t rows, int32_t* ids,
                    Stream s) override {
    cuda::merge_argmax(reinterpret_cast<const cuda::TokenCandidate*>(candidates), shards, rows, ids,
                       as_stream(s));
    DROVER_CUDA_LAUNCHED("merge_argmax");
  }
  void store_tokens(const int32_t* ids, const int32_t* slot, const int32_t* position, int64_t rows,
                    int32_t* tokens, int64_t max_tokens, Stream s) override {
    cuda::store_tokens(ids, slot, position, rows, tokens, max_tokens, as_stream(s));
    DROVER_CUDA_LAUNCHED("store_tokens");
  }
  size_t page_bytes(const KvShape& s) const override {
    return 8 * (value_words(s) + scale_words(s));
  }
  void gather_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                    int32_t count, void* packed, Stream s) override {
    move_pages(shape, layers, pages, count, packed, true, s);
  }
  void scatter_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                     int32_t count, const void* packed, Stream s) override {
    move_pages(shape, layers, pages, count, const_cast<void*>(packed), false, s);
  }

 private:
  static_assert(sizeof(cuda::TokenCandidate) == sizeof(Candidate));
  // Words of 4 bytes of a page's k (and of its v), and of its k_scale; heads are of 16 or more.
  static size_t value_words(const KvShape& s) {
    const size_t bytes = s.format == KvFormat::kF32 ? 4 : s.format == KvFormat::kBf16 ? 2 : 1;
    return static_cast<size_t>(s.kv_heads) * s.page_tokens * s.head_size * bytes / 4;
  }
  static size_t scale_words(const KvShape& s) {
    return s.format == KvFormat::kFp8 ? static_cast<size_t>(s.kv_heads) * s.page_tokens : 0;
  }
  void move_pages(const KvShape& shape, std::span<const KvLayer> layers, const int32_t* pages,
                  int32_t count, void* packed, bool gather, Stream s);
  void sum_and_norm(const Norm& a, Stream s);

  Device device_;
  DeviceBytes partials_, counters_;
  cuda::Workspace work_;
  cuda::LinearEngine linears_;
  cuda::Staging staging_;
  cuda::Graphs graphs_;
};

std::unique_ptr<Embedding> CudaBackend::load_embedding(const WeightTensor& t) {
  DROVER_CHECK(t.permutation.empty(), ExitCode::kBadInput,
               "an embedding table cannot have permuted columns (act-order)");
  auto e = std::make_unique<StoredEmbedding>();
  e->table_bytes = DeviceBytes(std::max<size_t>(cuda::device_tensor_bytes(t), 16),
                               "the embedding table", device_.stream);
  const cuda::DeviceTensor d = linears_.uploads().upload_to(t, e->table_bytes.get());
  e->table = {static_cast<int>(t.format),
              static_cast<int>(t.zero),
              t.group,
              t.scale_dtype == Dtype::kBf16,
              t.rows,
              t.cols,
              d.codes,
              d.scales,
              d.zeros,
              d.minimums};
  e->memory.push_back({e->table_bytes.get(), cuda::device_tensor_bytes(t)});
  e->rows = t.rows, e->cols = t.cols, e->bytes = t.bytes();
  return e;
}

// One rank's rows, what it sends, and blocks, which run all at once on every GPU: more is NCCL's.
// The same on all ranks, whatever GPUs they have.
Backend::PeerSums CudaBackend::peer_sums(int ranks, int64_t features) const {
  constexpr int64_t kPart = 1 << 20, kSent = 2 << 20, kBlocks = 128;
  if (ranks < 2 || ranks > cuda::kMostPeers || features % 8 != 0 || features > cuda::kPeerFeatures)
    return {};
  const int64_t row = 2 * features;
  const int64_t rows = std::min({kPart / row, kSent / (row * (ranks - 1)), kBlocks});
  return {rows, cuda::kPeerHeader + static_cast<size_t>(2 * ranks * rows * row)};
}

void CudaBackend::norm(const Norm& a, Stream s) {
  if (a.peers != nullptr) return sum_and_norm(a, s);
  const bool apart = a.weight == nullptr || a.select != nullptr;
  if (apart && a.delta != nullptr)
    cuda::add_rows(a.residual, a.delta, static_cast<size_t>(a.rows * a.features), as_stream(s));
  if (a.weight != nullptr)
    cuda::norm(a.residual, apart ? nullptr : a.delta, a.weight, a.out.data, a.out.scale, a.features,
               a.epsilon, a.select, a.select != nullptr ? a.out_rows : a.rows, as_stream(s));
  DROVER_CUDA_LAUNCHED("norm");
}

void CudaBackend::sum_and_norm(const Norm& a, Stream s) {
  const auto ranks = a.peers->memory.size();
  const PeerSums most = peer_sums(static_cast<int>(ranks), a.features);
  DROVER_CHECK(a.delta != nullptr && a.select == nullptr && a.rows <= most.rows,
               ExitCode::kInternal, "{} rows of {} features to be summed by {} ranks, at most {}",
               a.rows, a.features, ranks, most.rows);
  cuda::Peers peers{a.peers->rank, static_cast<int>(ranks), most.rows, {}, a.peers->stop};
  std::copy(a.peers->memory.begin(), a.peers->memory.end(), peers.memory);
  cuda::peer_norm(peers, a.residual, a.delta, a.weight, a.out.data, a.out.scale, a.rows, a.features,
                  a.epsilon, as_stream(s));
  DROVER_CUDA_LAUNCHED("a sum over peers");
}

void CudaBackend::move_pages(const KvShape& shape, std::span<const KvLayer> layers,
                             const int32_t* pages, int32_t count, void* packed, bool gather,
                             Stream s) {
  const auto words = [](auto* p) { return reinterpret_cast<uint32_t*>(p); };
  for (size_t first = 0; first < layers.size(); first += cuda::kLayersALaunch) {
    const size_t n = std::min<size_t>(cuda::kLayersALaunch, layers.size() - first);
    cuda::PagePools pools{};
    for (size_t i = 0; i < n; ++i) {
      const KvLayer& l = layers[first + i];
      pools.part[i][0] = static_cast<uint32_t*>(l.k),
      pools.part[i][1] = static_cast<uint32_t*>(l.v);
      pools.part[i][2] = words(l.k_scale), pools.part[i][3] = words(l.v_scale);
    }
    cuda::move_pages(pools, static_cast<int>(n), static_cast<int>(first),
                     static_cast<int>(layers.size()), value_words(shape), scale_words(shape), pages,
                     count, static_cast<uint32_t*>(packed), gather, as_stream(s));
    DROVER_CUDA_LAUNCHED("moving pages");
  }
}

}  // namespace

int cuda_device_count() noexcept {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

std::string cuda_problem() {
  int count = 0;
  const cudaError_t e = cudaGetDeviceCount(&count);
  cudaGetLastError();
  if (e == cudaErrorInsufficientDriver) {
    int runtime = 0, driver = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "no NVIDIA driver is loaded here";
    return fmt::format(
        "the NVIDIA driver serves CUDA {}.{}, drover was built with {}.{}: update "
        "the driver, or build with an older toolkit",
        driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
  }
  if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0))
    return "no GPU is visible (see nvidia-smi, and CUDA_VISIBLE_DEVICES)";
  if (e != cudaSuccess) return fmt::format("CUDA cannot start: {}", cudaGetErrorString(e));
  if (const int capability = cuda_capability(0); capability < 80)
    return fmt::format("GPU 0 has compute capability {}.{}, 8.0 or later is needed",
                       capability / 10, capability % 10);
  return {};
}

std::string cuda_device_uuid(int device) {
  cudaDeviceProp p{};
  DROVER_CUDA(cudaGetDeviceProperties(&p, device));
  std::string id = "GPU";
  for (size_t i = 0; i < std::size(p.uuid.bytes); ++i) {
    const bool group = i == 0 || i == 4 || i == 6 || i == 8 || i == 10;
    id += fmt::format("{}{:02x}", group ? "-" : "", static_cast<uint8_t>(p.uuid.bytes[i]));
  }
  return id;
}

std::string cuda_device_name(int device) {
  cudaDeviceProp p{};
  DROVER_CUDA(cudaGetDeviceProperties(&p, device));
  return p.name;
}

int cuda_capability(int device) {
  int major = 0, minor = 0;
  DROVER_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  DROVER_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<CudaBackend>(options);
}

}  // namespace drover
