// Operations on rows: embed, norm, silu_gate, gather_columns, store_tokens.
#include "ops/harness.h"
#include "ops/reference.h"

namespace drover::ops {
namespace {

class RowsTest : public OpsTest {};

TEST_P(RowsTest, EmbedEveryFormat) {
  struct Kind {
    WeightFormat format;
    ZeroKind zero;
    int group;
  };
  std::vector<Kind> kinds = {{WeightFormat::kF16, ZeroKind::kSymmetric, 0},
                             {WeightFormat::kBf16, ZeroKind::kSymmetric, 0},
                             {WeightFormat::kF32, ZeroKind::kSymmetric, 0}};
  for (const auto format : {WeightFormat::kInt4, WeightFormat::kInt8})
    for (const auto zero : {ZeroKind::kSymmetric, ZeroKind::kZeroPoints, ZeroKind::kMinimums})
      for (const int group : {32, 64, 128}) kinds.push_back({format, zero, group});
  const int64_t rows = 129, hidden = 256, held = 50, begin = 30, slots = 4, max_tokens = 64;
  for (const Kind& kind : kinds) {
    const WeightTensor w =
        random_weights(random_, kind.format, kind.zero, kind.group, Dtype::kF16, held, hidden);
    const auto table = backend_->load_embedding(w);
    EXPECT_EQ(table->rows, held);
    std::vector<int32_t> tokens(slots * max_tokens), slot(rows), position(rows);
    for (auto& t : tokens) t = static_cast<int32_t>(integer(0, 110));
    tokens[0] = begin, tokens[1] = begin + held - 1;
    tokens[2] = begin - 1, tokens[3] = begin + held;
    for (int64_t r = 0; r < rows; ++r) {
      slot[r] = r < 4 ? 0 : static_cast<int32_t>(integer(0, slots - 1));
      position[r] = static_cast<int32_t>(r < 4 ? r : integer(0, max_tokens - 1));
    }
    Buffer b_tokens(*backend_, tokens.size() * 4), b_slot(*backend_, rows * 4),
        b_position(*backend_, rows * 4), out(*backend_, activation_bytes(rows * hidden));
    b_tokens.put(tokens), b_slot.put(slot), b_position.put(position);
    StepRows step;
    step.rows = rows;
    step.row_slot = b_slot.as<int32_t>();
    step.row_position = b_position.as<int32_t>();
    backend_->embed(*table, begin, b_tokens.as<int32_t>(), max_tokens, step, out.as<void>(),
                    backend_->stream());
    const auto got = get_activations(out, rows * hidden);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = tokens[slot[r] * max_tokens + position[r]] - begin;
      for (int64_t c = 0; c < hidden; ++c) {
        const double want = row >= 0 && row < held ? reference::weight(w, row, c) : 0.0;
        // s * q + m may round twice; its terms are at most 4.
        check(got[r * hidden + c], want, 4 * 0x1p-23 + std::abs(want) * activation_unit(),
              to_string(kind.format));
      }
    }
  }
}

TEST_P(RowsTest, NormWithResidualAndSelection) {
  for (const int64_t rows : kRowCounts)
    for (const int64_t features : {576, 77, 8192, 20000}) {
      if (rows * features > 2000000 && features != 8192) continue;
      const auto n = static_cast<size_t>(rows * features);
      const bool has_delta = rows != 2, selects = rows % 2 == 1;
      const int64_t out_rows = selects ? (rows + 2) / 3 : rows;
      auto x = normals(n, 3.0), delta = normals(n);
      const auto weight = normals(static_cast<size_t>(features));
      std::vector<int32_t> select(static_cast<size_t>(out_rows));
      for (auto& s : select) s = static_cast<int32_t>(integer(0, rows - 1));
      Buffer residual(*backend_, activation_bytes(n)), b_delta(*backend_, activation_bytes(n)),
          b_weight(*backend_, features * 4), b_select(*backend_, out_rows * 4),
          out(*backend_, activation_bytes(out_rows * features));
      put_activations(residual, x), put_activations(b_delta, delta);
      b_weight.put(weight), b_select.put(select);
      Backend::Norm a;
      a.residual = residual.as<void>();
      a.delta = has_delta ? b_delta.as<void>() : nullptr;
      a.weight = b_weight.as<float>();
      a.out.data = out.as<void>();
      a.rows = rows, a.features = features, a.epsilon = 1e-5f, a.out_rows = out_rows;
      a.select = selects ? b_select.as<int32_t>() : nullptr;
      backend_->norm(a, backend_->stream());
      const auto sum = get_activations(residual, n);
      for (size_t i = 0; i < n; ++i) {
        const double want = x[i] + (has_delta ? static_cast<double>(delta[i]) : 0.0);
        check(sum[i], want, std::abs(want) * 2 * activation_unit() + 1e-30, "residual");
      }
      const auto got = get_activations(out, out_rows * features);
      Quantized quantized(*backend_, out_rows, features);
      put_activations(residual, x);
      a.out = quantized.input();
      backend_->norm(a, backend_->stream());
      EXPECT_EQ(sum, get_activations(residual, n));
      check_quantized(quantized, got, "norm");
      std::vector<double> row, want;
      for (int64_t i = 0; i < out_rows; ++i) {
        const int64_t r = selects ? select[i] : i;
        row.assign(sum.begin() + r * features, sum.begin() + (r + 1) * features);
        reference::rms_norm(row, weight.data(), 1e-5f, want);
        // A sum of squares, a root and three products: a few ulp.
        for (int64_t c = 0; c < features; ++c)
          check(got[i * features + c], want[c],
                std::abs(want[c]) * (16 * 0x1p-24 + 2 * activation_unit()) + 1e-30, "norm");
      }
    }
}

TEST_P(RowsTest, NormMayOnlyAdd) {
  auto x = normals(300), delta = normals(300);
  Buffer residual(*backend_, activation_bytes(300)), b_delta(*backend_, activation_bytes(300));
  put_activations(residual, x), put_activations(b_delta, delta);
  Backend::Norm a;
  a.residual = residual.as<void>(), a.delta = b_delta.as<void>();
  a.rows = 3, a.features = 100, a.out_rows = 3, a.epsilon = 1e-5f;
  backend_->norm(a, backend_->stream());
  const auto sum = get_activations(residual, 300);
  for (size_t i = 0; i < 300; ++i) {
    const double want = static_cast<double>(x[i]) + delta[i];
    check(sum[i], want, std::abs(want) * 2 * activation_unit() + 1e-30, "residual");
  }
}

TEST_P(RowsTest, SiluGate) {
  for (const int64_t rows : kRowCounts)
    for (const int64_t features : {512, 39, 28672, 40000}) {
      if (rows * features > 4000000) continue;
      auto in = normals(static_cast<size_t>(rows * 2 * features), 4.0);
      const float extremes[] = {-200.f, -88.f, -87.5f, -20.f, 0.f, -0.f, 20.f, 88.f, 200.f};
      for (size_t i = 0; i < std::size(extremes); ++i) in[i] = extremes[i];
      Buffer from(*backend_, activation_bytes(in.size())),
          out(*backend_, activation_bytes(in.size() / 2));
      put_activations(from, in);
      backend_->silu_gate(from.as<void>(), {out.as<void>()}, rows, features, backend_->stream());
      const auto got = get_activations(out, in.size() / 2);
      Quantized quantized(*backend_, rows, features);
      backend_->silu_gate(from.as<void>(), quantized.input(), rows, features, backend_->stream());
      check_quantized(quantized, got, "silu");
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < features; ++j) {
          const double gate = in[r * 2 * features + j], up = in[r * 2 * features + features + j];
          const double want = reference::silu(gate) * up;
          // exp to 2e-7, which -gate's rounding cannot worsen; under 1e-30 nothing matters.
          check(got[r * features + j], want,
                std::abs(want) * (6e-7 + 2 * activation_unit()) + 1e-30,
                "gate " + std::to_string(gate));
        }
    }
}

TEST_P(RowsTest, GatherColumns) {
  for (const int64_t rows : kRowCounts)
    for (const int64_t segments : {1, 3, 8}) {
      const int64_t segment_cols = 40, cols = segments == 3 ? 104 : 100;
      auto in = normals(static_cast<size_t>(segments * rows * segment_cols));
      std::vector<int32_t> index(cols);
      for (auto& i : index) i = static_cast<int32_t>(integer(0, segments * segment_cols - 1));
      Buffer from(*backend_, activation_bytes(in.size())), b_index(*backend_, cols * 4),
          out(*backend_, activation_bytes(rows * cols));
      put_activations(from, in), b_index.put(index);
      backend_->gather_columns(from.as<void>(), segments, segment_cols, b_index.as<int32_t>(),
                               {out.as<void>()}, rows, cols, backend_->stream());
      Quantized quantized(*backend_, rows, cols);
      backend_->gather_columns(from.as<void>(), segments, segment_cols, b_index.as<int32_t>(),
                               quantized.input(), rows, cols, backend_->stream());
      const auto got = get_activations(out, rows * cols);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < cols; ++j) {
          const int64_t s = index[j] / segment_cols, c = index[j] % segment_cols;
          ASSERT_EQ(got[r * cols + j], in[(s * rows + r) * segment_cols + c]);
        }
      check_quantized(quantized, got, "gather");
    }
}

// Rows of zeros, with a NaN, an infinity, of tiny numbers; and rows whose scale is a power of two,
// made of codes and of ties between codes, which leave no choice.
TEST_P(RowsTest, QuantizedRowsWithoutAChoice) {
  for (const int64_t cols : {104, 99}) {
    const int64_t rows = 40;
    auto in = normals(static_cast<size_t>(rows * cols));
    std::vector<int32_t> index(static_cast<size_t>(cols));
    for (int64_t j = 0; j < cols; ++j) index[j] = static_cast<int32_t>(cols - 1 - j);
    std::fill_n(in.begin(), cols, 0.0f);
    in[cols + 7] = std::nanf(""), in[2 * cols + 9] = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < cols; ++j) in[3 * cols + j] *= 1e-37f;
    for (int64_t r = 4; r < rows; ++r) {
      const float unit = std::ldexp(1.0f, static_cast<int>(integer(-20, 20)));
      for (int64_t j = 0; j < cols; ++j) {
        const auto code = static_cast<uint8_t>(integer(0, 125));
        const double a = reference::fp8(code), b = reference::fp8(static_cast<uint8_t>(code + 1));
        const double x = r % 2 == 0 ? a : (a + b) / 2;
        in[r * cols + j] = static_cast<float>(integer(0, 1) ? x : -x) * unit;
      }
      in[r * cols + integer(0, cols - 1)] = -448 * unit;
    }
    Buffer from(*backend_, activation_bytes(in.size())), b_index(*backend_, cols * 4);
    put_activations(from, in), b_index.put(index);
    Quantized out(*backend_, rows, cols);
    backend_->gather_columns(from.as<void>(), 1, cols, b_index.as<int32_t>(), out.input(), rows,
                             cols, backend_->stream());
    std::vector<float> plain(in.size());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < cols; ++j) plain[r * cols + j] = in[r * cols + index[j]];
    check_quantized(out, plain, "special");
    const auto scales = out.scale.get<float>();
    const auto codes = wide() ? std::vector<uint8_t>() : out.data.get<uint8_t>(in.size());
    const auto values = wide() ? out.data.get<float>(in.size()) : std::vector<float>();
    EXPECT_EQ(scales[0], 0.0f);
    for (int64_t r = 4; r < rows; ++r)
      for (int64_t j = 0; j < cols; ++j) {
        const auto i = static_cast<size_t>(r * cols + j);
        const double unit = scales[static_cast<size_t>(r)];
        ASSERT_EQ(wide() ? values[i] / unit : reference::fp8(codes[i]),
                  reference::round_fp8(plain[i] / unit))
            << plain[i] << " in units of " << unit;
      }
  }
}

// Rows of slot -1: zeros from embed, nothing from store_tokens, their positions anything.
TEST_P(RowsTest, PaddingRows) {
  const int64_t hidden = 128, held = 20, max_tokens = 9;
  const int32_t rows = 5;
  const WeightTensor w = random_weights(random_, WeightFormat::kInt8, ZeroKind::kSymmetric, 64,
                                        Dtype::kF16, held, hidden);
  const auto table = backend_->load_embedding(w);
  std::vector<int32_t> tokens(2 * max_tokens, 3), ids = {7, 8, 9, 10, 11};
  const std::vector<int32_t> slot = {1, -1, 0, -1, -1}, position = {2, 1 << 30, 4, -5, 0};
  Buffer b_tokens(*backend_, tokens.size() * 4), b_slot(*backend_, rows * 4),
      b_position(*backend_, rows * 4), b_ids(*backend_, rows * 4),
      out(*backend_, activation_bytes(rows * hidden));
  b_tokens.put(tokens), b_slot.put(slot), b_position.put(position), b_ids.put(ids);
  StepRows step;
  step.rows = rows, step.row_slot = b_slot.as<int32_t>();
  step.row_position = b_position.as<int32_t>();
  backend_->embed(*table, 0, b_tokens.as<int32_t>(), max_tokens, step, out.as<void>(),
                  backend_->stream());
  const auto got = get_activations(out, rows * hidden);
  for (int r = 0; r < rows; ++r)
    for (int64_t c = 0; c < hidden; ++c) {
      const double want = slot[r] < 0 ? 0.0 : reference::weight(w, 3, c);
      check(got[r * hidden + c], want, 4 * 0x1p-23 + std::abs(want) * activation_unit(), "padding");
    }
  backend_->store_tokens(b_ids.as<int32_t>(), b_slot.as<int32_t>(), b_position.as<int32_t>(), rows,
                         b_tokens.as<int32_t>(), max_tokens, backend_->stream());
  tokens[max_tokens + 2] = 7, tokens[4] = 9;
  EXPECT_EQ(tokens, b_tokens.get<int32_t>());
}

TEST_P(RowsTest, StoreTokens) {
  const int64_t slots = 70, max_tokens = 33, rows = 64;
  std::vector<int32_t> tokens(slots * max_tokens, -7), ids(rows), slot(rows), position(rows);
  for (int64_t r = 0; r < rows; ++r) {
    ids[r] = static_cast<int32_t>(integer(0, 1 << 30));
    slot[r] = static_cast<int32_t>(slots - 1 - r);
    position[r] = static_cast<int32_t>(integer(0, max_tokens - 1));
  }
  Buffer b_tokens(*backend_, tokens.size() * 4), b_ids(*backend_, rows * 4),
      b_slot(*backend_, rows * 4), b_position(*backend_, rows * 4);
  b_tokens.put(tokens), b_ids.put(ids), b_slot.put(slot), b_position.put(position);
  backend_->store_tokens(b_ids.as<int32_t>(), b_slot.as<int32_t>(), b_position.as<int32_t>(), rows,
                         b_tokens.as<int32_t>(), max_tokens, backend_->stream());
  for (int64_t r = 0; r < rows; ++r) tokens[slot[r] * max_tokens + position[r]] = ids[r];
  EXPECT_EQ(tokens, b_tokens.get<int32_t>());
}

TEST_P(RowsTest, AllocationsAreAlignedAndTooMuchIsAClearError) {
  Buffer small(*backend_, 1);
  EXPECT_EQ(0u, reinterpret_cast<uintptr_t>(small.as<void>()) % 64);
  for (const size_t bytes : {SIZE_MAX, SIZE_MAX / 2}) try {
      backend_->alloc(bytes, "a test of limits");
      FAIL() << "allocated " << bytes;
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ExitCode::kEnvironment);
      EXPECT_NE(std::string(e.what()).find("a test of limits"), std::string::npos);
    }
}

TEST_P(RowsTest, DescriptionTellsTheMachine) {
  EXPECT_FALSE(backend_->name().empty());
  EXPECT_GT(backend_->description().size(), backend_->name().size());
  std::cout << backend_->description() << "\n";
}

DROVER_OPS_SUITE(RowsTest);

}  // namespace
}  // namespace drover::ops
