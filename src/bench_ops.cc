// drover bench linear, drover bench attention: single operations at a model's shapes on one device,
// beside what the device can do at most. Weights and pages rotate over more memory than caches
// hold.
#include <fmt/format.h>

#include <algorithm>

#include "bench.h"
#include "bench_device.h"
#include "engine/kv_cache.h"

namespace drover {

namespace {

// The library's FP8 of the same shape, as many copies as no cache holds; none where it has none.
std::vector<std::unique_ptr<Linear>> library_linears(Backend& backend,
                                                     const std::vector<Linear*>& ours) {
  std::vector<std::unique_ptr<Linear>> list;
  size_t bytes = 0;
  while (list.size() < ours.size() && (bytes < (size_t{400} << 20) || list.size() < 2)) {
    auto l = backend.library_linear(ours[0]->rows, ours[0]->cols);
    if (!l) return {};
    bytes += l->bytes;
    list.push_back(std::move(l));
  }
  return list;
}

// Each linear at each number of rows, beside the library's where the device has it.
void linears(OpBench& bench) {
  const auto rows = numbers_of(bench.options, "rows");
  BenchLinears linears(bench, *std::max_element(rows.begin(), rows.end()));
  std::vector<std::unique_ptr<Linear>> library[BenchLinears::kParts];
  for (size_t part = 0; part < BenchLinears::kParts; ++part) {
    library[part] = library_linears(bench.backend(), linears.copies(part));
  }
  for (const int n : rows) {
    for (size_t part = 0; part < BenchLinears::kParts; ++part) {
      const auto ours = linears.copies(part);
      const OpFigure f =
          linears.measure(fmt::format("{} {} x {}, {} rows", BenchLinears::name(part),
                                      ours[0]->rows, ours[0]->cols, n),
                          ours, n);
      std::vector<Linear*> theirs;
      for (const auto& l : library[part]) theirs.push_back(l.get());
      if (theirs.empty()) {
        bench.report(f);
      } else {
        bench.report(f, linears.measure("  cuBLASLt FP8, a scale a row", theirs, n));
      }
    }
  }
}

// Attention of one layer: --sequences of --context tokens each, the last --rows of them in this
// step.
void attention(OpBench& bench) {
  const Options& o = bench.options;
  Backend& backend = bench.backend();
  const Architecture a = open_weights(o.text("model"), "")->architecture();
  const auto tp = static_cast<int>(o.integer("tp", 1, 1024));
  const Shard shard = make_shard(a, tp, 0, 1, 0, 0);
  const auto page = static_cast<int32_t>(o.integer("page-tokens", 1, 4096));
  const auto heads = static_cast<int32_t>(shard.heads.size());
  const auto kv_heads = static_cast<int32_t>(shard.kv_heads.size());
  const auto rows = static_cast<int32_t>(o.integer("rows", 1, 1 << 16));
  for (const int sequences : numbers_of(o, "sequences")) {
    for (const int context : numbers_of(o, "context")) {
      DROVER_CHECK(rows <= context, ExitCode::kUsage, "--rows {} of a context of {}", rows,
                   context);
      const int32_t pages_each = (context + page - 1) / page;
      const KvShape shape{.format = kv_format(o.text("kv")),
                          .pages = pages_each * sequences,
                          .page_tokens = page,
                          .kv_heads = kv_heads,
                          .head_size = a.head_size};
      const size_t bytes = KvCache::page_bytes(shape, 1) * static_cast<size_t>(shape.pages);
      const auto layers =
          static_cast<int64_t>(std::clamp<size_t>((size_t{512} << 20) / bytes + 1, 2, 8));
      const KvCache cache(backend, shape, layers);
      std::vector<int32_t> table(static_cast<size_t>(shape.pages)), slot, position, chunk{0};
      for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
      std::shuffle(table.begin(), table.end(), bench.random);
      const auto ints = [&](const std::vector<int32_t>& v) {
        DeviceArray<int32_t> d(backend, v.size(), "a bench");
        d.upload(v);
        return d;
      };
      const auto page_table = ints(table);
      const auto qkv_width = int64_t{heads + 2 * kv_heads} * a.head_size;
      const auto frequencies = a.inverse_frequencies();
      const DeviceArray<float> inverse(backend, frequencies.size(), "a bench");
      inverse.upload(frequencies);
      // Fills the cache as a prompt does, sequence by sequence.
      const auto fill = bench.activations(int64_t{context} * qkv_width);
      std::vector<int32_t> whole(static_cast<size_t>(context));
      for (size_t i = 0; i < whole.size(); ++i) whole[i] = static_cast<int32_t>(i);
      const auto fill_position = ints(whole);
      const auto fill_chunk = ints({0, context});
      for (int s = 0; s < sequences; ++s) {
        const auto fill_slot = ints(std::vector<int32_t>(static_cast<size_t>(context), s));
        const StepRows step{.rows = context,
                            .chunks = 1,
                            .row_slot = fill_slot.data(),
                            .row_position = fill_position.data(),
                            .chunk_row = fill_chunk.data(),
                            .page_table = page_table.data(),
                            .max_pages = pages_each};
        for (int64_t l = 0; l < layers; ++l) {
          backend.rope_append({.qkv = fill.data(),
                               .heads = heads,
                               .inverse_frequencies = inverse.data(),
                               .rope_dims = a.rope_dims,
                               .half_pairing = a.rope_pairing == RopePairing::kHalf,
                               .shape = shape,
                               .cache = cache.layer(static_cast<size_t>(l))},
                              step, backend.stream());
        }
        backend.wait(backend.record(backend.stream()), deadline_in(60), Interrupt());
      }
      double pairs = 0;
      for (int s = 0; s < sequences; ++s) {
        for (int r = 0; r < rows; ++r) {
          slot.push_back(s);
          position.push_back(context - rows + r);
          pairs += position.back() + 1;
        }
        chunk.push_back(static_cast<int32_t>(slot.size()));
      }
      const auto d_slot = ints(slot), d_position = ints(position), d_chunk = ints(chunk);
      const auto n = static_cast<int32_t>(slot.size());
      const StepRows step{.rows = n,
                          .chunks = sequences,
                          .decode_rows = rows == 1 ? n : 0,
                          .row_slot = d_slot.data(),
                          .row_position = d_position.data(),
                          .chunk_row = d_chunk.data(),
                          .page_table = page_table.data(),
                          .max_pages = pages_each};
      const auto qkv = bench.activations(int64_t{n} * qkv_width);
      const DeviceArray<std::byte> out(
          backend,
          static_cast<size_t>(backend.padded_rows(n)) * static_cast<size_t>(heads) *
              static_cast<size_t>(a.head_size) * dtype_bytes(backend.activation_dtype()),
          "a bench");
      const double cached = static_cast<double>(KvCache::page_bytes(shape, 1)) / page;
      bench.report(
          bench.measure({.name = fmt::format("{} x {} tokens, {} row{}, {}", sequences, context,
                                             rows, rows == 1 ? "" : "s", o.text("kv")),
                         .bytes = cached * context * sequences,
                         .flops = 4.0 * pairs * heads * a.head_size},
                        static_cast<int>(layers), [&](int i) {
                          backend.attention({.qkv = qkv.data(),
                                             .out = {out.data()},
                                             .heads = heads,
                                             .shape = shape,
                                             .cache = cache.layer(static_cast<size_t>(i))},
                                            step, backend.stream());
                        }));
      backend.forget_replays();
    }
  }
}

}  // namespace

int bench_linear(const std::vector<std::string>& arguments) {
  return bench_operation("linear", bench_linear_options(), arguments, linears);
}

int bench_attention(const std::vector<std::string>& arguments) {
  return bench_operation("attention", bench_attention_options(), arguments, attention);
}

}  // namespace drover
