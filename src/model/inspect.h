// What `drover inspect FILE` prints.
#pragma once

#include <ostream>
#include <string>

namespace drover {

// Prints what a model store or a dataset holds; `verify`: then reads every chunk and checks it.
// Throws kBadInput, as opening and reading do.
void inspect(const std::string& file, bool verify, std::ostream& out);

}  // namespace drover
