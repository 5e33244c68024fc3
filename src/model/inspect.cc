#include "model/inspect.h"

#include <algorithm>
#include <chrono>
#include <filesystem>

#include "base/error.h"
#include "model/store_source.h"

namespace drover {
namespace {

void line(std::ostream& out, const char* name, const std::string& value) {
  out << fmt::format("{:<16}{}\n", name, value);
}

// Text for one line of a terminal: no control characters, not without end.
std::string printable(const std::string& text, size_t most) {
  std::string out;
  for (char c : text) {
    if (out.size() >= most) return out + " ...";
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? ' ' : c;
  }
  return out;
}

template <typename T>
void verify_file(T& opened, const std::string& file, std::ostream& out) {
  const auto begin = std::chrono::steady_clock::now();
  opened.verify_all();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const double bytes = static_cast<double>(std::filesystem::file_size(file));
  line(out, "verified",
       fmt::format("every checksum agrees ({:.1f} MB in {:.2f} s)", bytes * 1e-6, seconds));
}

void inspect_model(const std::string& file, bool verify, std::ostream& out) {
  const auto store = ModelStore::open(file);
  const Architecture a = read_architecture(store->architecture(), file + ": /architecture");
  check_tensors(*store, a, file);
  line(out, "file", file);
  line(out, "holds", "a model store, format version 1");
  line(out, "architecture", a.summary());
  line(out, "weights", describe(*store));
  line(out, "end ids", fmt::format("{}", fmt::join(a.eos_ids, ", ")));
  for (const auto& [name, value] : store->provenance()) {
    if (const auto* text = std::get_if<std::string>(&value)) {
      line(out, name.c_str(), printable(*text, 400));
    }
  }
  line(out, "tokenizer", "sha256 " + store->tokenizer_sha256());
  line(out, "fingerprint", store->fingerprint());
  uint64_t bytes = 0;
  out << fmt::format("\n{:<24}{:<8}{:>18}{:>8}  {:<12}{:>12}\n", "tensor", "kind", "rows x columns",
                     "group", "zero", "KB");
  for (const auto& t : store->tensors()) {
    bytes += t.stored_bytes;
    // Layers are alike; the first stands for all.
    if (t.name.starts_with("layers.") && !t.name.starts_with("layers.0.")) continue;
    out << fmt::format("{:<24}{:<8}{:>18}{:>8}  {:<12}{:>12.1f}\n", t.name, to_string(t.format),
                       fmt::format("{} x {}", t.rows, t.cols),
                       t.group > 0 ? std::to_string(t.group) : "-",
                       t.group > 0 ? to_string(t.zero) : "-", t.stored_bytes * 1e-3);
  }
  out << fmt::format("{} tensors, {:.1f} MB; of the layers, the first is shown\n\n",
                     store->tensors().size(), bytes * 1e-6);
  if (verify) verify_file(*store, file, out);
}

void inspect_dataset(const std::string& file, bool verify, std::ostream& out) {
  const auto data = Dataset::open(file);
  line(out, "file", file);
  line(out, "holds", "a dataset, format version 1");
  line(out, "name", printable(data->name(), 200));
  line(out, "samples", std::to_string(data->size()));
  std::vector<int64_t> in, reference;
  for (size_t i = 0; i < data->size(); ++i) {
    const Sample s = data->sample(i);
    in.push_back(static_cast<int64_t>(s.input.size()));
    reference.push_back(s.output_length);
  }
  const auto spread = [](std::vector<int64_t>& v) {
    std::sort(v.begin(), v.end());
    int64_t sum = 0;
    for (int64_t x : v) sum += x;
    return fmt::format("{} to {} tokens, median {}, mean {:.1f}, {} in all", v.front(), v.back(),
                       v[v.size() / 2], static_cast<double>(sum) / static_cast<double>(v.size()),
                       sum);
  };
  line(out, "prompts", spread(in));
  line(out, "references", spread(reference));
  line(out, "synthetic", data->synthetic() ? "yes" : "no");
  line(out, "vocabulary", std::to_string(data->vocab()));
  line(out, "tokenizer", "sha256 " + data->tokenizer_sha256());
  line(out, "fingerprint", data->fingerprint());
  line(out, "first question", printable(data->question_text(0), 200));
  line(out, "its reference", printable(data->reference_text(0), 200));
  if (verify) verify_file(*data, file, out);
}

}  // namespace

void inspect(const std::string& file, bool verify, std::ostream& out) {
  if (holds_dataset(file)) {
    inspect_dataset(file, verify, out);
  } else {
    inspect_model(file, verify, out);
  }
}

}  // namespace drover
