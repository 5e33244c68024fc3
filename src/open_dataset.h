// A dataset for a model.
#pragma once

#include <memory>
#include <string>

#include "model/weights.h"
#include "store/store.h"

namespace drover {

// `spec` is a dataset file, or synthetic:... (see store.h). Throws kBadInput when the file was made
// with another tokenizer than the model's.
std::unique_ptr<Dataset> open_dataset(const std::string& spec, const WeightSource& source);

}  // namespace drover
