#include "store/store.h"

namespace drover {

std::string DecodingTable::decode(const int32_t* ids, size_t count) const {
  std::string out;
  bool first = true;
  for (size_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || static_cast<size_t>(ids[i]) >= pieces.size()) {
      out += "\xef\xbf\xbd";
      first = false;
      continue;
    }
    const auto id = static_cast<size_t>(ids[i]);
    if (id < special.size() && special[id] != 0) continue;
    const std::string& piece = pieces[id];
    const bool strip = first && strip_leading_space && piece.starts_with(' ');
    out.append(piece, strip ? 1 : 0);
    first = false;
  }
  return out;
}

}  // namespace drover
