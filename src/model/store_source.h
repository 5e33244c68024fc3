// Weights out of a model store. Private to the model room.
#pragma once

#include <memory>
#include <string>

#include "model/weights.h"
#include "store/store.h"

namespace drover {

// The description in /architecture; unknown kinds and sizes out of range are kBadInput.
Architecture read_architecture(const Attributes& attributes, const std::string& where);

// Every tensor that the architecture calls for is there, with its rows and columns, and no other.
// Returns the group size of the layers' linear weights, 0 when they are not quantized.
int check_tensors(const ModelStore& store, const Architecture& a, const std::string& where);

// "int4 g32 minimums, embeddings int8"
std::string describe(const ModelStore& store);

}  // namespace drover
