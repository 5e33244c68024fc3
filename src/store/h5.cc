#include "store/h5.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

namespace drover::h5 {

std::recursive_mutex& mutex() {
  static std::recursive_mutex m;
  return m;
}

std::string error_text() {
  std::string out;
  const auto add = [](unsigned, const H5E_error2_t* e, void* data) -> herr_t {
    auto& text = *static_cast<std::string*>(data);
    if (e->desc != nullptr && *e->desc != '\0' && text.size() < 400) {
      if (!text.empty()) text += "; ";
      text += e->desc;
    }
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, add, &out);
  H5Eclear2(H5E_DEFAULT);
  return out.empty() ? out : " (HDF5: " + out + ")";
}

namespace {

void start_library() {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  H5PLset_loading_state(0);  // a file must not be able to load code
#if !H5_VERSION_GE(1, 10, 7)
  ::setenv("HDF5_USE_FILE_LOCKING", "FALSE", 0);
#endif
}

Handle access_properties() {
  Handle list(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
#if H5_VERSION_GE(1, 10, 7)
  H5Pset_file_locking(list.get(), 0, 1);  // Lustre and NFS often have no locks
#endif
  H5Pset_fclose_degree(list.get(), H5F_CLOSE_WEAK);
  return list;
}

Attribute read_string(hid_t attribute, hid_t type, const std::string& where) {
  const Handle memory(H5Tcopy(H5T_C_S1), H5Tclose);
  if (H5Tget_cset(type) == H5T_CSET_UTF8) H5Tset_cset(memory.get(), H5T_CSET_UTF8);
  // HDF5 trusts the heap of variable-length strings: a damaged one can end the process.
  DROVER_CHECK(H5Tis_variable_str(type) == 0, ExitCode::kBadInput,
               "{}: a variable-length string, where the format wants a fixed length", where);
  const size_t size = H5Tget_size(type);
  DROVER_CHECK(size <= kMaxString, ExitCode::kBadInput, "{}: {} bytes, at most {} are allowed",
               where, size, kMaxString);
  // One more byte: the copy ends in a zero even when the stored text fills its field.
  std::string out(size + 1, '\0');
  H5Tset_size(memory.get(), size + 1);
  DROVER_CHECK(H5Aread(attribute, memory.get(), out.data()) >= 0, ExitCode::kBadInput,
               "{}: cannot be read{}", where, error_text());
  out.resize(::strnlen(out.data(), size));
  return out;
}

Attribute read_integers(hid_t attribute, int rank, hsize_t count, const std::string& where) {
  std::vector<int64_t> values(count);
  if (count > 0) {
    DROVER_CHECK(H5Aread(attribute, H5T_NATIVE_INT64, values.data()) >= 0, ExitCode::kBadInput,
                 "{}: cannot be read{}", where, error_text());
  }
  if (rank == 0) return values.at(0);
  return values;
}

Attribute read_attribute(hid_t object, const std::string& name, const std::string& where) {
  const Handle attribute(H5Aopen(object, name.c_str(), H5P_DEFAULT), H5Aclose);
  DROVER_CHECK(attribute.good(), ExitCode::kBadInput, "{}: cannot be opened{}", where,
               error_text());
  const Handle type(H5Aget_type(attribute.get()), H5Tclose);
  const Handle space(H5Aget_space(attribute.get()), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space.get());
  const H5S_class_t space_class = H5Sget_simple_extent_type(space.get());
  hsize_t count = 1;
  DROVER_CHECK((space_class == H5S_SCALAR || space_class == H5S_SIMPLE) && rank >= 0 && rank <= 1,
               ExitCode::kBadInput, "{}: expected one value or a list", where);
  if (rank == 1) H5Sget_simple_extent_dims(space.get(), &count, nullptr);
  DROVER_CHECK(count <= 65536, ExitCode::kBadInput, "{}: {} values, at most 65536 are allowed",
               where, count);
  const H5T_class_t type_class = H5Tget_class(type.get());
  if (type_class == H5T_INTEGER && H5Tget_size(type.get()) <= 8) {
    return read_integers(attribute.get(), rank, count, where);
  }
  if (type_class == H5T_FLOAT && H5Tget_size(type.get()) <= 8 && rank == 0) {
    double value = 0;
    DROVER_CHECK(H5Aread(attribute.get(), H5T_NATIVE_DOUBLE, &value) >= 0, ExitCode::kBadInput,
                 "{}: cannot be read{}", where, error_text());
    return value;
  }
  if (type_class == H5T_STRING && rank == 0) {
    return read_string(attribute.get(), type.get(), where);
  }
  DROVER_FAIL(ExitCode::kBadInput,
              "{}: of a type that the format does not know; expected an integer, a float, a "
              "string or a list of integers",
              where);
}

}  // namespace

Group Group::open_root(const std::string& file) {
  namespace fs = std::filesystem;
  start_library();
  std::error_code error;
  const auto status = fs::status(file, error);
  DROVER_CHECK(fs::exists(status), ExitCode::kBadInput, "{}: no such file", file);
  DROVER_CHECK(fs::is_regular_file(status), ExitCode::kBadInput, "{}: not a regular file", file);
  DROVER_CHECK(::access(file.c_str(), R_OK) == 0, ExitCode::kBadInput, "{}: cannot be read: {}",
               file, std::strerror(errno));
  const Handle access = access_properties();
  const Handle opened(H5Fopen(file.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  DROVER_CHECK(opened.good(), ExitCode::kBadInput,
               "{}: not a whole HDF5 file{}; make it again, or copy it again", file, error_text());
  Group root;
  root.where_ = file + ": /";
  root.handle_ = Handle(H5Gopen2(opened.get(), "/", H5P_DEFAULT), H5Gclose);
  DROVER_CHECK(root.handle_.good(), ExitCode::kBadInput, "{}: its root cannot be opened{}", file,
               error_text());
  return root;
}

Group Group::open_file(const std::string& file, const std::string& format) {
  Group root = open_root(file);
  const Attributes a = root.attributes();
  const auto found = a.find("format");
  const auto* text = found == a.end() ? nullptr : std::get_if<std::string>(&found->second);
  DROVER_CHECK(text != nullptr && *text == format, ExitCode::kBadInput,
               "{}: attribute `format` is {}, expected {}", file,
               text == nullptr ? "missing" : "`" + *text + "`", format);
  const int64_t version = get_int(a, "format_version", root.where_);
  DROVER_CHECK(version == 1, ExitCode::kBadInput,
               "{}: format version {}; this drover reads version 1: import the file again", file,
               version);
  return root;
}

std::string Group::child(const std::string& name) const {
  return where_.ends_with('/') ? where_ + name : where_ + "/" + name;
}

bool Group::has(const std::string& name) const {
  const htri_t there = H5Lexists(id(), name.c_str(), H5P_DEFAULT);
  DROVER_CHECK(there >= 0, ExitCode::kBadInput, "{}: its links cannot be read{}", where_,
               error_text());
  if (there == 0) return false;
  H5L_info_t info;
  DROVER_CHECK(H5Lget_info(id(), name.c_str(), &info, H5P_DEFAULT) >= 0, ExitCode::kBadInput,
               "{}: cannot be read{}", child(name), error_text());
  DROVER_CHECK(info.type == H5L_TYPE_HARD, ExitCode::kBadInput,
               "{}: is {}; only objects of the file itself are allowed", child(name),
               info.type == H5L_TYPE_SOFT       ? "a soft link"
               : info.type == H5L_TYPE_EXTERNAL ? "an external link"
                                                : "a user-defined link");
  return true;
}

Group Group::group(const std::string& name) const {
  DROVER_CHECK(has(name), ExitCode::kBadInput, "{}: missing", child(name));
  Group out;
  out.where_ = child(name);
  out.handle_ = Handle(H5Gopen2(id(), name.c_str(), H5P_DEFAULT), H5Gclose);
  DROVER_CHECK(out.handle_.good(), ExitCode::kBadInput, "{}: expected a group{}", out.where_,
               error_text());
  return out;
}

std::vector<std::string> Group::names(uint64_t limit) const {
  H5G_info_t info;
  DROVER_CHECK(H5Gget_info(id(), &info) >= 0, ExitCode::kBadInput, "{}: cannot be read{}", where_,
               error_text());
  DROVER_CHECK(info.nlinks <= limit, ExitCode::kBadInput, "{}: {} objects, at most {} are allowed",
               where_, info.nlinks, limit);
  std::vector<std::string> out;
  const auto add = [](hid_t, const char* name, const H5L_info_t*, void* data) -> herr_t {
    static_cast<std::vector<std::string>*>(data)->emplace_back(name);
    return 0;
  };
  DROVER_CHECK(H5Literate(id(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &out) >= 0,
               ExitCode::kBadInput, "{}: its links cannot be read{}", where_, error_text());
  std::sort(out.begin(), out.end());
  return out;
}

Attributes Group::attributes() const {
  std::vector<std::string> found;
  const auto add = [](hid_t, const char* name, const H5A_info_t*, void* data) -> herr_t {
    auto& list = *static_cast<std::vector<std::string>*>(data);
    list.emplace_back(name);
    return list.size() > 256 ? 1 : 0;
  };
  DROVER_CHECK(H5Aiterate2(id(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add, &found) >= 0,
               ExitCode::kBadInput, "{}: its attributes cannot be read{}", where_, error_text());
  DROVER_CHECK(found.size() <= 256, ExitCode::kBadInput, "{}: more than 256 attributes", where_);
  Attributes out;
  for (const auto& name : found) {
    out[name] = read_attribute(id(), name, fmt::format("{}: attribute {}", where_, name));
  }
  return out;
}

int64_t get_int(const Attributes& a, const std::string& name, const std::string& where) {
  const auto found = a.find(name);
  DROVER_CHECK(found != a.end(), ExitCode::kBadInput, "{}: attribute {} is missing", where, name);
  const auto* value = std::get_if<int64_t>(&found->second);
  DROVER_CHECK(value != nullptr, ExitCode::kBadInput, "{}: attribute {}: expected an integer",
               where, name);
  return *value;
}

std::string get_string(const Attributes& a, const std::string& name, const std::string& where) {
  const auto found = a.find(name);
  DROVER_CHECK(found != a.end(), ExitCode::kBadInput, "{}: attribute {} is missing", where, name);
  const auto* value = std::get_if<std::string>(&found->second);
  DROVER_CHECK(value != nullptr, ExitCode::kBadInput, "{}: attribute {}: expected a string", where,
               name);
  return *value;
}

}  // namespace drover::h5
