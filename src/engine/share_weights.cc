#include "engine/share_weights.h"

namespace drover {

namespace {

// What a rank must know of a tensor to make room for it.
struct Header {
  WeightFormat format;
  ZeroKind zero;
  Dtype scale_dtype;
  int32_t group;
  int64_t rows, cols;
  uint64_t permuted;
};

class SharedSource final : public ForwardingSource {
 public:
  SharedSource(std::unique_ptr<WeightSource> source, Comm& replicas)
      : ForwardingSource(std::move(source)), replicas_(replicas) {}

  WeightTensor read(const std::string& name, Range rows, Range cols) override {
    const bool reads = replicas_.rank() == 0;
    WeightTensor t;
    if (reads) t = source_->read(name, rows, cols);
    Header h{t.format, t.zero, t.scale_dtype, t.group, t.rows, t.cols, t.permutation.size()};
    replicas_.broadcast(&h, sizeof(h), 0, nullptr);
    if (!reads) describe(h, t);
    share(t.permutation);
    if (t.rows == 1) share(t.codes);  // a norm's weights, which are no linear's
    return t;
  }

 private:
  static void describe(const Header& h, WeightTensor& t) {
    t.format = h.format;
    t.zero = h.zero;
    t.scale_dtype = h.scale_dtype;
    t.group = h.group;
    t.rows = h.rows;
    t.cols = h.cols;
    t.permutation.resize(h.permuted);
    if (t.rows == 1) {
      t.codes.resize(t.code_bytes());
      return;
    }
    auto recipe = std::make_shared<WeightRecipe>();
    recipe->awaited = true;
    t.recipe = std::move(recipe);
    if (t.zero == ZeroKind::kZeroPoints) t.zeros.resize(t.groups());
    if (t.zero == ZeroKind::kMinimums) t.minimums.resize(t.groups());
  }
  template <typename T>
  void share(std::vector<T>& values) {
    if (!values.empty()) replicas_.broadcast(values.data(), values.size() * sizeof(T), 0, nullptr);
  }

  Comm& replicas_;
};

}  // namespace

std::unique_ptr<WeightSource> share_weights(std::unique_ptr<WeightSource> source, Comm& replicas) {
  return std::make_unique<SharedSource>(std::move(source), replicas);
}

}  // namespace drover
