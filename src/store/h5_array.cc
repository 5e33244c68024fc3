#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/crc32c.h"
#include "store/h5.h"

namespace drover::h5 {
namespace {

// HDF5's deflate shrinks by at most about 1,030; a dataset that claims more is not backed by data.
constexpr uint64_t kMaxShrink = 1100;

hid_t file_type(Element e) {
  switch (e) {
    case Element::kU8:
      return H5T_STD_U8LE;
    case Element::kI8:
      return H5T_STD_I8LE;
    case Element::kU16:
      return H5T_STD_U16LE;
    case Element::kI32:
      return H5T_STD_I32LE;
    case Element::kU32:
      return H5T_STD_U32LE;
    case Element::kU64:
      return H5T_STD_U64LE;
    case Element::kF32:
      return H5T_IEEE_F32LE;
  }
  return -1;
}

const char* type_name(Element e) {
  constexpr const char* kNames[] = {"uint8",  "int8",   "uint16", "int32",
                                    "uint32", "uint64", "float32"};
  return kNames[static_cast<int>(e)];
}

Handle open_dataset(const Group& g, const std::string& name) {
  DROVER_CHECK(g.has(name), ExitCode::kBadInput, "{}: missing", g.child(name));
  // No chunk cache: chunks are read whole, once, and verified here.
  const Handle access(H5Pcreate(H5P_DATASET_ACCESS), H5Pclose);
  H5Pset_chunk_cache(access.get(), 0, 0, 1.0);
  Handle out(H5Dopen2(g.id(), name.c_str(), access.get()), H5Dclose);
  DROVER_CHECK(out.good(), ExitCode::kBadInput, "{}: expected a dataset{}", g.child(name),
               error_text());
  return out;
}

void check_type(hid_t dataset, Element e, const std::string& where) {
  const Handle type(H5Dget_type(dataset), H5Tclose);
  DROVER_CHECK(type.good() && H5Tequal(type.get(), file_type(e)) > 0, ExitCode::kBadInput,
               "{}: not of type little-endian {}", where, type_name(e));
}

// Layout and filters, before anything that could reach out of the file.
Handle check_layout(hid_t dataset, const std::string& where) {
  Handle list(H5Dget_create_plist(dataset), H5Pclose);
  DROVER_CHECK(list.good(), ExitCode::kBadInput, "{}: cannot be read{}", where, error_text());
  const H5D_layout_t layout = H5Pget_layout(list.get());
  DROVER_CHECK(layout == H5D_CHUNKED || layout == H5D_CONTIGUOUS, ExitCode::kBadInput,
               "{}: {}; expected chunks, or one piece for checksums", where,
               layout == H5D_VIRTUAL ? "is a virtual dataset" : "has an unknown layout");
  DROVER_CHECK(H5Pget_external_count(list.get()) == 0, ExitCode::kBadInput,
               "{}: keeps its data in another file, which is not allowed", where);
  for (int i = 0; i < H5Pget_nfilters(list.get()); ++i) {
    unsigned flags = 0;
    size_t count = 0;
    const H5Z_filter_t filter = H5Pget_filter2(list.get(), static_cast<unsigned>(i), &flags, &count,
                                               nullptr, 0, nullptr, nullptr);
    DROVER_CHECK(filter == H5Z_FILTER_SHUFFLE || filter == H5Z_FILTER_DEFLATE ||
                     filter == H5Z_FILTER_FLETCHER32,
                 ExitCode::kBadInput,
                 "{}: uses HDF5 filter {}; only shuffle, deflate and fletcher32 are allowed", where,
                 static_cast<int>(filter));
  }
  return list;
}

std::vector<hsize_t> dimensions(hid_t dataset, int rank, const std::string& where) {
  const Handle space(H5Dget_space(dataset), H5Sclose);
  DROVER_CHECK(space.good() && H5Sget_simple_extent_type(space.get()) == H5S_SIMPLE &&
                   H5Sget_simple_extent_ndims(space.get()) == rank,
               ExitCode::kBadInput, "{}: expected {} dimension(s)", where, rank);
  std::vector<hsize_t> dims(static_cast<size_t>(rank));
  H5Sget_simple_extent_dims(space.get(), dims.data(), nullptr);
  return dims;
}

struct StoredChunk {
  uint64_t bytes = 0;  // 0 when the chunk is not there, or this HDF5 (before 1.10.5) cannot tell
  uint64_t offset = 0;
  bool filtered = false;
};

StoredChunk stored_chunk(hid_t dataset, const hsize_t* begin) {
  StoredChunk out;
#if H5_VERSION_GE(1, 10, 5)
  hsize_t bytes = 0;
  unsigned skipped = 0;
  haddr_t offset = 0;
  if (H5Dget_chunk_info_by_coord(dataset, begin, &skipped, &offset, &bytes) < 0) {
    H5Eclear2(H5E_DEFAULT);
    return out;
  }
  if (offset != HADDR_UNDEF) out = {bytes, offset, skipped != 0};
#else
  static_cast<void>(dataset), static_cast<void>(begin);
#endif
  return out;
}

// The descriptor behind a dataset without filters, in a file whose addresses are offsets; else -1.
int plain_file(hid_t dataset, hid_t creation) {
  if (H5Pget_layout(creation) != H5D_CHUNKED || H5Pget_nfilters(creation) != 0) return -1;
  const Handle file(H5Iget_file_id(dataset), H5Fclose);
  const Handle made(H5Fget_create_plist(file.get()), H5Pclose);
  const Handle access(H5Fget_access_plist(file.get()), H5Pclose);
  hsize_t user_block = 1;
  void* descriptor = nullptr;
  const bool plain =
      made.good() && access.good() && H5Pget_userblock(made.get(), &user_block) >= 0 &&
      user_block == 0 && H5Pget_driver(access.get()) == H5FD_SEC2 &&
      H5Fget_vfd_handle(file.get(), H5P_DEFAULT, &descriptor) >= 0 && descriptor != nullptr;
  H5Eclear2(H5E_DEFAULT);
  return plain ? *static_cast<int*>(descriptor) : -1;
}

uint64_t chunks_along(uint64_t size, uint64_t chunk) { return (size + chunk - 1) / chunk; }

}  // namespace

size_t element_bytes(Element e) {
  switch (e) {
    case Element::kU8:
    case Element::kI8:
      return 1;
    case Element::kU16:
      return 2;
    case Element::kU64:
      return 8;
    default:
      return 4;
  }
}

Array Array::open(const Group& g, const std::string& name, Element e) {
  Array a;
  a.where_ = g.child(name);
  a.element_ = e;
  a.handle_ = open_dataset(g, name);
  const Handle creation = check_layout(a.handle_.get(), a.where_);
  check_type(a.handle_.get(), e, a.where_);
  a.file_ = plain_file(a.handle_.get(), creation.get());
  a.checksum_handle_ = open_dataset(g, name + "_crc32c");
  const std::string sums = a.where_ + "_crc32c";
  const Handle list = check_layout(a.checksum_handle_.get(), sums);
  DROVER_CHECK(H5Pget_layout(list.get()) == H5D_CONTIGUOUS, ExitCode::kBadInput,
               "{}: expected in one piece (contiguous)", sums);
  check_type(a.checksum_handle_.get(), Element::kU32, sums);
  return a;
}

Array Array::matrix(const Group& g, const std::string& name, Element e, const Extent& extent) {
  Array a = open(g, name, e);
  const auto dims = dimensions(a.handle_.get(), 2, a.where_);
  DROVER_CHECK(dims[0] == extent.rows && dims[1] == extent.cols, ExitCode::kBadInput,
               "{}: shape [{}, {}], expected [{}, {}]", a.where_, dims[0], dims[1], extent.rows,
               extent.cols);
  a.extent_ = extent;
  a.check_storage(2);
  return a;
}

Array Array::vector(const Group& g, const std::string& name, Element e, uint64_t max_length) {
  Array a = open(g, name, e);
  a.rank_ = 1;
  const auto dims = dimensions(a.handle_.get(), 1, a.where_);
  DROVER_CHECK(dims[0] <= max_length, ExitCode::kBadInput,
               "{}: {} elements, at most {} are allowed", a.where_, dims[0], max_length);
  a.extent_ = {1, dims[0], 1, std::clamp<uint64_t>(dims[0], 1, 65536)};
  a.check_storage(1);
  return a;
}

Array Array::vector_of(const Group& g, const std::string& name, Element e, uint64_t length) {
  Array a = vector(g, name, e, length);
  DROVER_CHECK(a.length() == length, ExitCode::kBadInput, "{}: {} elements, expected {}", a.where_,
               a.length(), length);
  return a;
}

uint64_t Array::chunk_columns() const { return chunks_along(extent_.cols, extent_.chunk_cols); }

void Array::check_storage(int rank) const {
  const uint64_t down = chunks_along(extent_.rows, extent_.chunk_rows);
  const auto sums = dimensions(checksum_handle_.get(), rank, where_ + "_crc32c");
  DROVER_CHECK(sums.back() == chunk_columns() && (rank == 1 || sums[0] == down),
               ExitCode::kBadInput, "{}_crc32c: [{}] checksums, expected {} x {} chunks", where_,
               fmt::join(sums, ", "), down, chunk_columns());
  if (extent_.cols == 0) return;
  const Handle list(H5Dget_create_plist(handle_.get()), H5Pclose);
  DROVER_CHECK(H5Pget_layout(list.get()) == H5D_CHUNKED, ExitCode::kBadInput,
               "{}: expected chunked storage", where_);
  hsize_t chunk[2] = {0, 0};
  const int chunk_rank = H5Pget_chunk(list.get(), 2, chunk);
  const bool same = rank == 1 ? chunk[0] == extent_.chunk_cols
                              : chunk[0] == extent_.chunk_rows && chunk[1] == extent_.chunk_cols;
  DROVER_CHECK(chunk_rank == rank && same, ExitCode::kBadInput,
               "{}: chunks of [{}, {}], expected {} x {}", where_, chunk[0], chunk[1],
               extent_.chunk_rows, extent_.chunk_cols);
  // What the dataset claims to hold must be there, or its size would be free to invent.
  const uint64_t bytes = extent_.rows * extent_.cols * element_bytes(element_);
  const bool filtered = H5Pget_nfilters(list.get()) > 0;
  const uint64_t stored = H5Dget_storage_size(handle_.get());
  const uint64_t backed =
      filtered && stored < UINT64_MAX / kMaxShrink ? stored * kMaxShrink : stored;
  DROVER_CHECK(backed >= bytes, ExitCode::kBadInput,
               "{}: holds {} bytes and claims {}; the file was not written whole", where_, stored,
               bytes);
  DROVER_CHECK(H5Dget_storage_size(checksum_handle_.get()) >= down * chunk_columns() * 4,
               ExitCode::kBadInput, "{}_crc32c: was not written whole", where_);
}

const std::vector<uint32_t>& Array::checksums() {
  if (checksums_read_) return checksums_;
  checksums_.resize(chunks_along(extent_.rows, extent_.chunk_rows) * chunk_columns());
  if (!checksums_.empty()) {
    DROVER_CHECK(H5Dread(checksum_handle_.get(), H5T_NATIVE_UINT32, H5S_ALL, H5S_ALL, H5P_DEFAULT,
                         checksums_.data()) >= 0,
                 ExitCode::kBadInput, "{}_crc32c: cannot be read{}", where_, error_text());
  }
  checksums_read_ = true;
  return checksums_;
}

bool Array::load_plain(int file, uint64_t offset, uint64_t bytes) {
  buffer_.resize(bytes);
  for (uint64_t at = 0; at < bytes;) {
    const ssize_t n =
        ::pread(file, buffer_.data() + at, bytes - at, static_cast<off_t>(offset + at));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;  // HDF5 tells what is wrong
    at += static_cast<uint64_t>(n);
  }
  return true;
}

// HDF5's lock is held to find the chunk, not while its bytes are read and summed, so that threads
// read several at once.
void Array::load_chunk(uint64_t chunk_row, uint64_t chunk_col) {
  const uint64_t index = chunk_row * chunk_columns() + chunk_col;
  if (loaded_ == index) return;
  loaded_ = UINT64_MAX;
  const hsize_t begin[2] = {chunk_row * extent_.chunk_rows, chunk_col * extent_.chunk_cols};
  const hsize_t count[2] = {std::min<hsize_t>(extent_.chunk_rows, extent_.rows - begin[0]),
                            std::min<hsize_t>(extent_.chunk_cols, extent_.cols - begin[1])};
  const int skip = rank_ == 1 ? 1 : 0;
  const size_t element = element_bytes(element_);
  const size_t bytes = count[0] * count[1] * element;
  const uint64_t whole = extent_.chunk_rows * extent_.chunk_cols * element;
  uint32_t want = 0;
  StoredChunk stored;
  {
    const Lock lock(mutex());
    want = checksums()[index];
    stored = stored_chunk(handle_.get(), begin + skip);
  }
  // A compressed chunk larger than its contents is made to swell.
  DROVER_CHECK(stored.bytes <= whole + whole / 100 + 1024, ExitCode::kBadInput,
               "{}: chunk [{}, {}] takes {} bytes in the file, for {} bytes", where_, chunk_row,
               chunk_col, stored.bytes, whole);
  if (file_ >= 0 && !stored.filtered && stored.bytes == whole &&
      load_plain(file_, stored.offset, whole)) {
    // A chunk at the edge is stored whole: what lies past the dataset goes.
    const size_t row = count[1] * element, stored_row = extent_.chunk_cols * element;
    for (size_t r = 1; row != stored_row && r < count[0]; ++r)
      std::memmove(buffer_.data() + r * row, buffer_.data() + r * stored_row, row);
  } else {
    const Lock lock(mutex());
    const Handle memory(H5Screate_simple(rank_, count + skip, nullptr), H5Sclose);
    const Handle space(H5Dget_space(handle_.get()), H5Sclose);
    H5Sselect_hyperslab(space.get(), H5S_SELECT_SET, begin + skip, nullptr, count + skip, nullptr);
    buffer_.resize(bytes);
    DROVER_CHECK(H5Dread(handle_.get(), file_type(element_), memory.get(), space.get(), H5P_DEFAULT,
                         buffer_.data()) >= 0,
                 ExitCode::kBadInput, "{}: chunk [{}, {}] cannot be read{}", where_, chunk_row,
                 chunk_col, error_text());
  }
  const uint32_t got = crc32c(buffer_.data(), bytes);
  DROVER_CHECK(
      got == want, ExitCode::kBadInput,
      "{}: chunk [{}, {}] has CRC-32C {:08x}, {:08x} was stored; the file is damaged: copy "
      "or import it again",
      where_, chunk_row, chunk_col, got, want);
  loaded_ = index;
}

void Array::read(uint64_t r0, uint64_t r1, uint64_t c0, uint64_t c1, void* out) {
  DROVER_CHECK(r0 <= r1 && r1 <= extent_.rows && c0 <= c1 && c1 <= extent_.cols,
               ExitCode::kInternal, "{}: [{}, {}) x [{}, {}) is outside of [{}, {}]", where_, r0,
               r1, c0, c1, extent_.rows, extent_.cols);
  if (r0 == r1 || c0 == c1) return;
  const size_t element = element_bytes(element_);
  auto* to = static_cast<uint8_t*>(out);
  const uint64_t ch = extent_.chunk_rows, cw = extent_.chunk_cols;
  for (uint64_t cr = r0 / ch; cr <= (r1 - 1) / ch; ++cr) {
    for (uint64_t cc = c0 / cw; cc <= (c1 - 1) / cw; ++cc) {
      load_chunk(cr, cc);
      const uint64_t width = std::min(cw, extent_.cols - cc * cw);
      const uint64_t left = std::max(c0, cc * cw), right = std::min(c1, cc * cw + width);
      for (uint64_t r = std::max(r0, cr * ch); r < std::min(r1, (cr + 1) * ch); ++r) {
        std::memcpy(to + ((r - r0) * (c1 - c0) + left - c0) * element,
                    buffer_.data() + ((r - cr * ch) * width + left - cc * cw) * element,
                    (right - left) * element);
      }
    }
  }
}

void Array::verify() {
  if (extent_.cols == 0) return;
  for (uint64_t r = 0; r < chunks_along(extent_.rows, extent_.chunk_rows); ++r) {
    for (uint64_t c = 0; c < chunk_columns(); ++c) load_chunk(r, c);
  }
}

std::string read_text(Array& a) {
  std::string out(a.length(), '\0');
  a.read(0, 1, 0, a.length(), out.data());
  return out;
}

}  // namespace drover::h5
