// HDF5 with owned handles and hostile files in mind. Private to the store room.
//
// HDF5's serial build is not thread-safe: whoever calls anything here holds mutex(), but for
// Array::read and Array::verify, which take it themselves, and not while they read plain chunks. An
// Array belongs to one thread at a time.
#pragma once

#include <hdf5.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "store/store.h"

namespace drover::h5 {

constexpr uint64_t kMaxString = 1 << 20;

std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;

// The messages on HDF5's error stack, from the innermost, and clears it; "" when there are none.
std::string error_text();

class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Handle() {
    if (id_ < 0) return;
    Lock lock(mutex());
    close_(id_);
  }
  hid_t get() const { return id_; }
  bool good() const { return id_ >= 0; }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

class Group {
 public:
  // The root of a file: exists, is HDF5, attribute `format` as given, `format_version` 1. Opened
  // for reading, without file locks and without plug-ins.
  static Group open_file(const std::string& file, const std::string& format);
  // The same, of any format.
  static Group open_root(const std::string& file);

  Group group(const std::string& name) const;
  // Whether the name is there; throws unless it is a plain (hard) link.
  bool has(const std::string& name) const;
  // All names, sorted; throws when there are more than `limit`.
  std::vector<std::string> names(uint64_t limit) const;
  // All attributes: integers, floats, strings and one-dimensional integer arrays.
  Attributes attributes() const;
  hid_t id() const { return handle_.get(); }
  const std::string& where() const { return where_; }  // "FILE: /path"
  std::string child(const std::string& name) const;    // "FILE: /path/name"

 private:
  Handle handle_;
  std::string where_;
};

// Typed look-ups in attributes that name what is missing or of another type.
int64_t get_int(const Attributes& a, const std::string& name, const std::string& where);
std::string get_string(const Attributes& a, const std::string& name, const std::string& where);

enum class Element { kU8, kI8, kU16, kI32, kU32, kU64, kF32 };
size_t element_bytes(Element e);

// Rows and columns; a one-dimensional dataset is one row.
struct Extent {
  uint64_t rows = 0, cols = 0;
  uint64_t chunk_rows = 0, chunk_cols = 0;
};

// A dataset with its checksums. Opening checks type, shape, chunks, storage and filters; nothing
// is allocated that the file does not hold.
class Array {
 public:
  static Array matrix(const Group& g, const std::string& name, Element e, const Extent& extent);
  // One-dimensional, of any length up to `max_length`.
  static Array vector(const Group& g, const std::string& name, Element e, uint64_t max_length);
  // One-dimensional, of exactly this length.
  static Array vector_of(const Group& g, const std::string& name, Element e, uint64_t length);

  uint64_t length() const { return extent_.cols; }
  // The piece [r0, r1) x [c0, c1), row-major, into `out`. Reads whole chunks, verifies each.
  void read(uint64_t r0, uint64_t r1, uint64_t c0, uint64_t c1, void* out);
  void verify();  // every chunk
  const std::vector<uint32_t>& checksums();
  const std::string& where() const { return where_; }

 private:
  static Array open(const Group& g, const std::string& name, Element e);
  void check_storage(int rank) const;
  // The chunk's bytes in the file as they are, past HDF5; false where it must decode them.
  bool load_plain(int file, uint64_t offset, uint64_t bytes);
  // Fills buffer_ with the elements of one chunk that lie within the dataset.
  void load_chunk(uint64_t chunk_row, uint64_t chunk_col);
  uint64_t chunk_columns() const;  // chunks side by side

  Handle handle_;
  Handle checksum_handle_;
  Element element_ = Element::kU8;
  int rank_ = 2;
  Extent extent_;
  std::string where_;
  int file_ = -1;  // HDF5's own descriptor, where chunks lie in the file as they are; else -1
  bool checksums_read_ = false;
  std::vector<uint32_t> checksums_;
  std::vector<uint8_t> buffer_;
  uint64_t loaded_ = UINT64_MAX;  // the chunk in buffer_: small reads one after another share it
};

// A whole one-dimensional dataset.
template <typename T>
std::vector<T> read_all(Array& a) {
  std::vector<T> out(a.length());
  a.read(0, 1, 0, a.length(), out.data());
  return out;
}
std::string read_text(Array& a);  // kU8

}  // namespace drover::h5
