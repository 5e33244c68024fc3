// Linears at Llama-2-70B's shapes and attention on one GPU: times, rates, and the share of the copy
// bandwidth measured in the same run. Weights (INT4, groups of 128, bell-shaped codes) rotate over
// more memory than the L2 cache holds; so do KV pages. Short bursts from a cool chip, not steady
// state.
//
//   cuda_ops_bench OUT.json COMMIT [linear | attention | prefill | rows]
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "base/formats.h"

namespace drover {
namespace {

struct Bench {
  std::unique_ptr<Backend> backend = [] {
    CudaOptions o;
    o.portable = std::getenv("DROVER_BENCH_PORTABLE") != nullptr;
    return make_cuda_backend(o);
  }();
  cudaStream_t stream = static_cast<cudaStream_t>(backend->stream());
  std::mt19937_64 random{7};
  double copy_gb_s = 0;
  std::string json;

  // Milliseconds of one call: median of 9 groups.
  double time(const std::function<void(int)>& call, int calls = 12) {
    cudaEvent_t a, b;
    cudaEventCreate(&a), cudaEventCreate(&b);
    int n = 0;
    for (int i = 0; i < calls; ++i) call(n++);
    std::vector<double> ms;
    for (int g = 0; g < 9; ++g) {
      cudaEventRecord(a, stream);
      for (int i = 0; i < calls; ++i) call(n++);
      cudaEventRecord(b, stream);
      if (const cudaError_t e = cudaEventSynchronize(b); e != cudaSuccess) {
        std::fprintf(stderr, "%s\n", cudaGetErrorString(e));
        std::exit(1);
      }
      float t = 0;
      cudaEventElapsedTime(&t, a, b);
      ms.push_back(t / calls);
    }
    cudaEventDestroy(a), cudaEventDestroy(b);
    std::nth_element(ms.begin(), ms.begin() + 4, ms.end());
    return ms[4];
  }

  void report(const std::string& name, double ms, double bytes, double flop) {
    const double gb = bytes / ms * 1e-6, tf = flop / ms * 1e-9;
    std::printf("%-44s %9.4f ms %8.0f GB/s %5.1f %% of copy %7.1f TFLOP/s\n", name.c_str(), ms, gb,
                100 * gb / copy_gb_s, tf);
    std::fflush(stdout);
    char line[320];
    std::snprintf(line, sizeof line,
                  "%s\n    {\"name\": \"%s\", \"ms\": %.5f, \"gb_s\": %.1f, "
                  "\"share_of_copy\": %.4f, \"tflop_s\": %.2f}",
                  json.empty() ? "" : ",", name.c_str(), ms, gb, gb / copy_gb_s, tf);
    json += line;
  }

  void* fill(size_t bytes, const std::function<uint64_t()>& word) {
    std::vector<uint64_t> host((bytes + 7) / 8);
    for (auto& w : host) w = word();
    void* p = backend->alloc(bytes, "a bench");
    backend->copy_in(p, host.data(), bytes, stream);
    return p;
  }
  void* activations(size_t count) {
    std::normal_distribution<float> d;
    std::vector<uint16_t> some(4099);
    for (auto& x : some) x = bf16_from_float(d(random));
    size_t i = 0;
    return fill(count * 2, [&] {
      uint64_t w = 0;
      for (int j = 0; j < 4; ++j) w = w << 16 | some[i++ % some.size()];
      return w;
    });
  }

  void copy() {
    const size_t bytes = size_t{2} << 30;
    void* a = fill(bytes, [&] { return random(); });
    void* b = backend->alloc(bytes, "a bench");
    const double ms =
        time([&](int) { cudaMemcpyAsync(b, a, bytes, cudaMemcpyDeviceToDevice, stream); });
    copy_gb_s = 2.0 * static_cast<double>(bytes) / ms * 1e-6;
    report("copy", ms, 2.0 * static_cast<double>(bytes), 0);
    backend->free(a), backend->free(b);
  }

  WeightTensor int4(int64_t rows, int64_t cols) {
    // Pairs of codes as a checkpoint has them: normal around 8 with a deviation of 2.6.
    static const std::vector<uint8_t> pairs = [] {
      std::mt19937 r(3);
      std::normal_distribution<float> d(8, 2.6f);
      const auto code = [&] { return static_cast<int>(std::clamp(std::round(d(r)), 0.f, 15.f)); };
      std::vector<uint8_t> p(65536);
      for (auto& x : p) x = static_cast<uint8_t>(code() | code() << 4);
      return p;
    }();
    WeightTensor w;
    w.format = WeightFormat::kInt4, w.rows = rows, w.cols = cols, w.group = 128;
    w.codes.resize(static_cast<size_t>(rows * cols / 2));
    for (size_t i = 0; i < w.codes.size(); i += 4) {
      const uint64_t bits = random();
      for (size_t j = 0; j < 4; ++j) w.codes[i + j] = pairs[bits >> (16 * j) & 65535];
    }
    for (int64_t i = 0; i < rows * cols / 128; ++i)
      w.scales.push_back(f16_from_float(0.004f * (1.0f + static_cast<float>(random() % 64) / 64)));
    return w;
  }

  void linears() {
    const struct {
      const char* name;
      int64_t n, k;
    } shapes[] = {
        {"qkv", 10240, 8192}, {"o", 8192, 8192}, {"gate_up", 57344, 8192}, {"down", 8192, 28672}};
    const int64_t ms[] = {1, 16, 64, 256, 1024};
    double total[5] = {};
    void* x = activations(1024 * 28672);
    void* out = backend->alloc(1024 * 57344 * 2, "a bench");
    for (const auto& s : shapes) {
      const WeightTensor w = int4(s.n, s.k);
      std::vector<std::unique_ptr<Linear>> copies;
      const size_t count = size_t{400000000} / w.bytes() + 1;
      for (size_t i = 0; i < count; ++i) copies.push_back(backend->load_linear({&w, 1}));
      for (int i = 0; i < 5; ++i) {
        const int64_t m = ms[i];
        const double t = time([&](int n) {
          backend->linear(*copies[static_cast<size_t>(n) % count], {x}, out, m, false, stream);
        });
        total[i] += t;
        report(std::string("int4 ") + s.name + " M=" + std::to_string(m), t,
               static_cast<double>(w.bytes()) + 2.0 * static_cast<double>(m * (s.n + s.k)),
               2.0 * static_cast<double>(m * s.n * s.k));
      }
    }
    const double parameters = 10240.0 * 8192 + 8192.0 * 8192 + 57344.0 * 8192 + 8192.0 * 28672;
    for (int i = 0; i < 5; ++i)
      report("int4 four linears M=" + std::to_string(ms[i]), total[i],
             parameters * (0.5 + 2.0 / 128), 2.0 * parameters * static_cast<double>(ms[i]));
    bf16(x, out);
    backend->free(x), backend->free(out);
  }

  // The library's rate for the same shape with 16-bit weights.
  void bf16(void* x, void* out) {
    WeightTensor w;
    w.format = WeightFormat::kBf16, w.rows = 8192, w.cols = 8192;
    w.codes.resize(size_t{8192} * 8192 * 2);
    std::normal_distribution<float> d;
    for (size_t i = 0; i < w.codes.size(); i += 2) {
      const uint16_t v =
          bf16_from_float(static_cast<float>(static_cast<int>(random() % 2001) - 1000) * 1e-4f);
      w.codes[i] = static_cast<uint8_t>(v), w.codes[i + 1] = static_cast<uint8_t>(v >> 8);
    }
    std::vector<std::unique_ptr<Linear>> copies;
    for (int i = 0; i < 3; ++i) copies.push_back(backend->load_linear({&w, 1}));
    for (const int64_t m : {1, 16, 64, 256, 1024}) {
      const double t = time([&](int n) {
        backend->linear(*copies[static_cast<size_t>(n) % 3], {x}, out, m, false, stream);
      });
      report("bf16 cuBLASLt o M=" + std::to_string(m), t,
             static_cast<double>(w.codes.size()) + 4.0 * static_cast<double>(m) * 8192,
             2.0 * static_cast<double>(m) * 8192 * 8192);
    }
  }

  int32_t* upload(const std::vector<int32_t>& v) {
    void* p = backend->alloc(v.size() * 4, "a bench");
    backend->copy_in(p, v.data(), v.size() * 4, stream);
    return static_cast<int32_t*>(p);
  }

  // `count` sequences of `context` tokens, the last `rows` of each in this step; then `decodes`
  // sequences as long, one row each.
  void attention(int count, int context, int rows, int decodes = 0, int kv_heads = 8,
                 bool quantized = false) {
    const int group = 8, d = 128, page = 16, per_slot = (context + page - 1) / page;
    const int all = count + decodes;
    const KvShape shape{KvFormat::kFp8, all * per_slot, page, kv_heads, d};
    const auto vectors = static_cast<size_t>(shape.pages) * kv_heads * page;
    const auto codes = [&] { return random() & 0xf7f7f7f7f7f7f7f7ull; };  // no NaN
    const auto scales = [] { return uint64_t{0x3c23d70a3c23d70aull}; };   // 0.01
    std::vector<KvLayer> layers(1 + size_t{150000000} / (vectors * 2 * (d + 4)));
    for (KvLayer& l : layers)
      l = {fill(vectors * d, codes), fill(vectors * d, codes),
           static_cast<float*>(fill(vectors * 4, scales)),
           static_cast<float*>(fill(vectors * 4, scales))};
    std::vector<int32_t> table(static_cast<size_t>(shape.pages)), slot, position, chunk = {0};
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    std::shuffle(table.begin(), table.end(), random);
    for (int s = 0; s < all; ++s) {
      const int here = s < count ? rows : 1;
      for (int r = 0; r < here; ++r) slot.push_back(s), position.push_back(context - here + r);
      chunk.push_back(static_cast<int32_t>(slot.size()));
    }
    int32_t* device[] = {upload(slot), upload(position), upload(chunk), upload(table)};
    const auto n = static_cast<int32_t>(slot.size());
    const StepRows step{
        n, all, rows == 1 ? all : decodes, device[0], device[1], device[2], device[3], per_slot};
    void* qkv = activations(static_cast<size_t>(n) * (kv_heads * (group + 2)) * d);
    void* out = backend->alloc(static_cast<size_t>(n) * kv_heads * group * d * 2, "a bench");
    auto* scale = static_cast<float*>(backend->alloc(static_cast<size_t>(n) * 4, "a bench"));
    const double t = time([&](int i) {
      const Backend::Attention a{qkv,
                                 {out, quantized ? scale : nullptr},
                                 kv_heads * group,
                                 shape,
                                 layers[static_cast<size_t>(i) % layers.size()]};
      backend->attention(a, step, stream);
    });
    double pairs = 0;
    for (const int32_t p : position) pairs += p + 1;
    std::string name = "attention fp8 " + std::to_string(count) + " x " + std::to_string(context) +
                       " tokens, " + std::to_string(rows) + " rows";
    if (decodes > 0) name += ", " + std::to_string(decodes) + " decode";
    if (kv_heads != 8) name += ", " + std::to_string(kv_heads) + " kv heads";
    if (quantized) name += ", to e4m3";
    report(name, t, static_cast<double>(all) * context * kv_heads * 2.0 * (d + 4),
           4.0 * pairs * kv_heads * group * d);
    for (const KvLayer& l : layers)
      for (void* p : {l.k, l.v, static_cast<void*>(l.k_scale), static_cast<void*>(l.v_scale)})
        backend->free(p);
    for (void* p : {qkv, out, static_cast<void*>(scale)}) backend->free(p);
    for (int32_t* p : device) backend->free(p);
  }

  // Rotation and append of so many sequences' newest tokens.
  void rope(int32_t rows) {
    const KvShape shape{KvFormat::kFp8, rows, 16, 8, 128};
    const auto vectors = static_cast<size_t>(rows) * 8 * 16;
    KvLayer layer{backend->alloc(vectors * 128, "a bench"),
                  backend->alloc(vectors * 128, "a bench"),
                  static_cast<float*>(backend->alloc(vectors * 4, "a bench")),
                  static_cast<float*>(backend->alloc(vectors * 4, "a bench"))};
    std::vector<int32_t> number(static_cast<size_t>(rows) + 1);
    std::iota(number.begin(), number.end(), 0);
    int32_t* slot = upload(number);
    int32_t* position = upload(std::vector<int32_t>(number.size(), 7));
    auto* frequencies =
        static_cast<float*>(fill(64 * 4, [] { return uint64_t{0x3dcccccd3dcccccdull}; }));
    void* qkv = activations(static_cast<size_t>(rows) * 80 * 128);
    const StepRows step{rows, rows, rows, slot, position, slot, slot, 1};
    Backend::RopeAppend a;
    a.qkv = qkv, a.heads = 64, a.inverse_frequencies = frequencies, a.rope_dims = 128;
    a.half_pairing = true, a.shape = shape, a.cache = layer;
    report("rope_append M=" + std::to_string(rows),
           time([&](int) { backend->rope_append(a, step, stream); }),
           static_cast<double>(rows) * 128 * (80 * 2 + 72 * 2 + 16), 0);
    for (void* p : {layer.k, layer.v, static_cast<void*>(layer.k_scale),
                    static_cast<void*>(layer.v_scale), qkv, static_cast<void*>(frequencies),
                    static_cast<void*>(slot), static_cast<void*>(position)})
      backend->free(p);
  }

  // Writers of linears' inputs, and argmax. Rows rotate over more than the L2 cache holds where
  // there are many of them; few rows are read from it, as in a step.
  void rows() {
    const int64_t hidden = 8192, inner = 28672, vocabulary = 32000;
    for (const int64_t m : {1, 64, 1024, 2048}) {
      rope(static_cast<int32_t>(m));
      void* in = activations(static_cast<size_t>(m * 2 * inner));
      void* delta = activations(static_cast<size_t>(m * hidden));
      void* out = backend->alloc(static_cast<size_t>(m * inner * 2), "a bench");
      auto* scale = static_cast<float*>(backend->alloc(static_cast<size_t>(m) * 4, "a bench"));
      auto* weight = static_cast<float*>(
          fill(static_cast<size_t>(hidden) * 4, [] { return uint64_t{0x3f8000003f800000ull}; }));
      auto* logits = static_cast<float*>(fill(static_cast<size_t>(m * vocabulary) * 4,
                                              [&] { return random() & 0x3fffffff3fffffffull; }));
      const std::string rows_text = " M=" + std::to_string(m);
      for (const bool fp8 : {false, true}) {
        const LinearInput to{out, fp8 ? scale : nullptr};
        const double each = fp8 ? 1 : 2;
        Backend::Norm a;
        a.residual = in, a.delta = delta, a.weight = weight, a.out = to;
        a.rows = a.out_rows = m, a.features = hidden, a.epsilon = 1e-5f;
        report(std::string(fp8 ? "norm to e4m3" : "norm") + rows_text,
               time([&](int) { backend->norm(a, stream); }),
               static_cast<double>(m * hidden) * (6 + each), 0);
        report(std::string(fp8 ? "silu_gate to e4m3" : "silu_gate") + rows_text,
               time([&](int) { backend->silu_gate(in, to, m, inner, stream); }),
               static_cast<double>(m * inner) * (4 + each), 0);
      }
      Backend::Argmax best;
      best.logits = logits, best.rows = m, best.vocab_count = vocabulary;
      best.out = static_cast<Candidate*>(out);
      report("argmax" + rows_text, time([&](int) { backend->argmax(best, stream); }),
             static_cast<double>(m * vocabulary) * 4, 0);
      for (void* p : {in, delta, out, static_cast<void*>(scale), static_cast<void*>(weight),
                      static_cast<void*>(logits)})
        backend->free(p);
    }
  }
};

}  // namespace
}  // namespace drover

int main(int argc, char** argv) {
  if (argc < 3)
    return std::fprintf(stderr,
                        "cuda_ops_bench OUT.json COMMIT [linear | attention | prefill | rows]\n"),
           2;
  const std::string only = argc > 3 ? argv[3] : "";
  drover::Bench b;
  std::printf("%s\n", b.backend->description().c_str());
  b.copy();
  if (only.empty() || only == "linear") b.linears();
  if (only.empty() || only == "attention") {
    b.attention(256, 512, 1);
    b.attention(64, 2048, 1);
    b.attention(1024, 400, 1);
    b.attention(1400, 210, 1);
    b.attention(16, 1024, 1);
    b.attention(1, 8192, 1);
    b.attention(256, 512, 1, 0, 4);
    b.attention(256, 512, 1, 0, 8, true);
  }
  if (only.empty() || only == "attention" || only == "prefill") {
    b.attention(1, 512, 512, 255);
    b.attention(4, 2048, 512);
    b.attention(8, 512, 512);
    b.attention(7, 294, 294);
    b.attention(1, 2048, 2048);
    b.attention(1, 4096, 4096);
  }
  if (only.empty() || only == "rows") b.rows();
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  std::FILE* f = std::fopen(argv[1], "w");
  if (f == nullptr) return std::perror(argv[1]), 1;
  std::fprintf(f,
               "{\n  \"device\": \"%s\",\n  \"date\": \"%s\",\n  \"commit\": \"%s\",\n"
               "  \"steady_state\": false,\n  \"results\": [%s\n  ]\n}\n",
               b.backend->description().c_str(), date, argv[2], b.json.c_str());
  return std::fclose(f) == 0 ? 0 : 1;
}
