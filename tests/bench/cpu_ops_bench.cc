// The CPU backend's operations at the demo model's shapes (SmolLM2-135M), one thread unless
// DROVER_BENCH_THREADS says otherwise. Every iteration of a linear uses another copy of the
// weights, together as large as a model's layers, so that caches hold what they would in a step.
//
//   cpu_ops_bench --benchmark_format=json --benchmark_min_time=0.2
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "backend/cpu/cpu_backend.h"

namespace drover {
namespace {

using benchmark::Counter;
using benchmark::State;

int threads() {
  const char* t = std::getenv("DROVER_BENCH_THREADS");
  return t ? std::max(1, std::atoi(t)) : 1;
}

std::unique_ptr<Backend> make(bool bf16) {
  return make_cpu_backend({bf16 ? Dtype::kBf16 : Dtype::kF32, threads()});
}

struct Free {
  Backend* backend;
  void operator()(void* p) const { backend->free(p); }
};
using Block = std::unique_ptr<void, Free>;

Block block(Backend& b, size_t bytes) { return {b.alloc(bytes, "a bench"), Free{&b}}; }

Block random_floats(Backend& b, size_t count) {
  Block p = block(b, count * 4);
  std::mt19937 random(7);
  std::normal_distribution<float> d;
  for (size_t i = 0; i < count; ++i) static_cast<float*>(p.get())[i] = d(random);
  return p;
}

Counter rate(double amount) { return Counter(amount, Counter::kIsIterationInvariantRate); }

// What the machine's memory gives one thread.
void read_bandwidth(State& state) {
  std::vector<float> x(static_cast<size_t>(state.range(0)) << 18, 1.0f);
  for (auto _ : state) {
    float sum[16] = {};
    const float* p = x.data();
    for (size_t i = 0; i < x.size(); i += 16)
#pragma omp simd
      for (size_t j = 0; j < 16; ++j) sum[j] += p[i + j];
    benchmark::DoNotOptimize(sum);
  }
  state.counters["bytes/s"] = rate(static_cast<double>(x.size()) * 4);
}
BENCHMARK(read_bandwidth)->ArgName("MiB")->Arg(64)->Arg(256)->UseRealTime();

void copy_bandwidth(State& state) {
  std::vector<char> from(256 << 20, 1), to(256 << 20, 2);
  for (auto _ : state) {
    std::copy(from.begin(), from.end(), to.begin());
    benchmark::ClobberMemory();
  }
  state.counters["bytes/s"] = rate(2.0 * static_cast<double>(from.size()));
}
BENCHMARK(copy_bandwidth)->UseRealTime();

// (rows, K, N, bf16)
void linear(State& state) {
  const int64_t m = state.range(0), k = state.range(1), n = state.range(2);
  const bool bf16 = state.range(3) != 0;
  const auto b = make(bf16);
  WeightTensor w;
  w.format = WeightFormat::kBf16;
  w.rows = n, w.cols = k;
  w.codes.assign(static_cast<size_t>(n * k * 2), 0x3c);
  const double bytes = static_cast<double>(n * k) * (bf16 ? 2 : 4);
  std::vector<std::unique_ptr<Linear>> copies;
  for (double total = 0; total < 200e6; total += bytes) copies.push_back(b->load_linear({&w, 1}));
  const int64_t padded = b->padded_rows(m);
  const Block in = random_floats(*b, static_cast<size_t>(padded * k));
  const Block out = block(*b, static_cast<size_t>(padded * n * 4));
  size_t i = 0;
  for (auto _ : state) {
    b->linear(*copies[i++ % copies.size()], {in.get()}, out.get(), m, true, nullptr);
    benchmark::ClobberMemory();
  }
  state.counters["flop/s"] = rate(2.0 * static_cast<double>(m * n * k));
  state.counters["bytes/s"] = rate(bytes + 4.0 * static_cast<double>(m * (n + k)));
}

void linear_shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"M", "K", "N", "bf16"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  const int64_t shapes[][2] = {{576, 960}, {576, 576}, {576, 3072}, {1536, 576}, {576, 49152},
                               {576, 320}, {192, 576}, {576, 1024}, {512, 576},  {576, 16384}};
  for (const int64_t bf16 : {0, 1})
    for (const auto& s : shapes)
      for (const int64_t m : {1, 8, 64, 256}) b->Args({m, s[0], s[1], bf16});
}
BENCHMARK(linear)->Apply(linear_shapes);

// (sequences, rows of each, context at the last row, kv format): 9 query heads on 3 KV heads of 64.
struct AttentionBench {
  AttentionBench(int sequences, int rows, int context, KvFormat format) : backend(make(true)) {
    shape.format = format, shape.kv_heads = 3, shape.head_size = 64;
    const int per_slot = (context + 15) / 16;
    shape.pages = sequences * per_slot;
    table.resize(static_cast<size_t>(shape.pages));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(3));
    const size_t vectors = static_cast<size_t>(shape.pages) * 3 * 16;
    for (Block* p : {&k, &v}) *p = random_floats(*backend, vectors * 64);
    for (Block* p : {&k_scale, &v_scale}) *p = random_floats(*backend, vectors);
    layer = {k.get(), v.get(), static_cast<float*>(k_scale.get()),
             static_cast<float*>(v_scale.get())};
    frequencies.assign(32, 0.1f);
    // The whole of every sequence, by rope_append: whatever the format, the cache holds numbers.
    fill(sequences, context, 0);
    append();
    fill(sequences, rows, context - rows);
  }
  void fill(int sequences, int rows, int start) {
    slot.clear(), position.clear(), chunk = {0};
    for (int s = 0; s < sequences; ++s) {
      for (int r = 0; r < rows; ++r) slot.push_back(s), position.push_back(start + r);
      chunk.push_back(static_cast<int32_t>(slot.size()));
    }
    step.rows = static_cast<int32_t>(slot.size());
    step.chunks = sequences;
    step.row_slot = slot.data(), step.row_position = position.data();
    step.chunk_row = chunk.data(), step.page_table = table.data();
    step.max_pages = shape.pages / sequences;
    qkv = random_floats(*backend, slot.size() * 15 * 64);
    out = block(*backend, slot.size() * 9 * 64 * 4);
  }
  void append() {
    Backend::RopeAppend a;
    a.qkv = qkv.get(), a.heads = 9, a.inverse_frequencies = frequencies.data(), a.rope_dims = 64;
    a.shape = shape, a.cache = layer;
    backend->rope_append(a, step, nullptr);
  }
  void attend() {
    Backend::Attention a;
    a.qkv = qkv.get(), a.out = {out.get()}, a.heads = 9, a.shape = shape, a.cache = layer;
    backend->attention(a, step, nullptr);
  }

  std::unique_ptr<Backend> backend;
  KvShape shape;
  std::vector<int32_t> table, slot, position, chunk;
  Block k, v, k_scale, v_scale, qkv, out;
  KvLayer layer;
  std::vector<float> frequencies;
  StepRows step;
};

void attention(State& state) {
  const int sequences = static_cast<int>(state.range(0)), rows = static_cast<int>(state.range(1));
  const int context = static_cast<int>(state.range(2));
  const auto format = static_cast<KvFormat>(state.range(3));
  AttentionBench bench(sequences, rows, context, format);
  for (auto _ : state) bench.attend();
  const double pairs = sequences * rows * (context - (rows - 1) / 2.0);
  state.counters["flop/s"] = rate(pairs * 9 * 64 * 4);
  const double element = format == KvFormat::kFp8 ? 1 : format == KvFormat::kBf16 ? 2 : 4;
  state.counters["bytes/s"] = rate(2.0 * sequences * context * 3 * 64 * element);
  state.counters["us/row"] =
      Counter(sequences * rows * 1e-6, Counter::kIsIterationInvariantRate | Counter::kInvert);
}
BENCHMARK(attention)
    ->ArgNames({"sequences", "rows", "context", "kv"})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond)
    ->ArgsProduct({{1, 8, 64}, {1}, {128, 512}, {0, 1, 2}})
    ->ArgsProduct({{1}, {1}, {2048}, {0, 1, 2}})
    ->ArgsProduct({{1}, {256}, {256, 1024}, {0, 1, 2}});

void rope_append(State& state) {
  AttentionBench bench(static_cast<int>(state.range(0)), static_cast<int>(state.range(1)), 512,
                       KvFormat::kFp8);
  for (auto _ : state) bench.append();
}
BENCHMARK(rope_append)
    ->ArgNames({"sequences", "rows"})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond)
    ->Args({1, 1})
    ->Args({64, 1})
    ->Args({1, 256});

void norm(State& state) {
  const auto b = make(true);
  const int64_t rows = state.range(0);
  const Block x = random_floats(*b, static_cast<size_t>(rows * 576));
  const Block delta = block(*b, static_cast<size_t>(rows * 576 * 4));
  std::fill_n(static_cast<float*>(delta.get()), rows * 576, 0.0f);
  const Block w = random_floats(*b, 576), out = block(*b, static_cast<size_t>(rows * 576 * 4));
  Backend::Norm a;
  a.residual = x.get(), a.delta = delta.get(), a.weight = static_cast<float*>(w.get());
  a.out = {out.get()}, a.rows = a.out_rows = rows, a.features = 576, a.epsilon = 1e-5f;
  for (auto _ : state) b->norm(a, nullptr);
}
BENCHMARK(norm)->Unit(benchmark::kMicrosecond)->UseRealTime()->Arg(1)->Arg(64)->Arg(256);

void silu_gate(State& state) {
  const auto b = make(true);
  const int64_t rows = state.range(0);
  const Block in = random_floats(*b, static_cast<size_t>(rows * 3072));
  const Block out = block(*b, static_cast<size_t>(rows * 1536 * 4));
  for (auto _ : state) b->silu_gate(in.get(), {out.get()}, rows, 1536, nullptr);
}
BENCHMARK(silu_gate)->Unit(benchmark::kMicrosecond)->UseRealTime()->Arg(1)->Arg(64)->Arg(256);

void argmax(State& state) {
  const auto b = make(true);
  const int64_t rows = state.range(0);
  const Block logits = random_floats(*b, static_cast<size_t>(rows * 49152));
  std::vector<Candidate> out(static_cast<size_t>(rows));
  Backend::Argmax a;
  a.logits = static_cast<float*>(logits.get()), a.rows = rows, a.vocab_count = 49152;
  a.out = out.data();
  for (auto _ : state) b->argmax(a, nullptr);
}
BENCHMARK(argmax)->Unit(benchmark::kMicrosecond)->UseRealTime()->Arg(1)->Arg(64);

}  // namespace
}  // namespace drover

BENCHMARK_MAIN();
