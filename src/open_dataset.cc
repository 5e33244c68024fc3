#include "open_dataset.h"

#include "base/error.h"

namespace drover {

std::unique_ptr<Dataset> open_dataset(const std::string& spec, const WeightSource& source) {
  if (spec.rfind("synthetic:", 0) == 0) {
    return synthetic_dataset(spec, source.architecture().vocab, 1);
  }
  auto dataset = Dataset::open(spec);
  DROVER_CHECK(dataset->vocab() <= source.architecture().vocab, ExitCode::kBadInput,
               "{}: made for a vocabulary of {} tokens, the model has {}: it belongs to another "
               "tokenizer; import the data again with this model's",
               spec, dataset->vocab(), source.architecture().vocab);
  const std::string model = source.tokenizer_sha256();
  DROVER_CHECK(
      model.empty() || dataset->tokenizer_sha256() == model, ExitCode::kBadInput,
      "{}: made with another tokenizer (sha256 {:.12}..., the model's is {:.12}...): import "
      "the data again with this model's",
      spec, dataset->tokenizer_sha256(), model);
  return dataset;
}

}  // namespace drover
