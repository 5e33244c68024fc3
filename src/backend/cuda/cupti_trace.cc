#include "backend/cuda/cupti_trace.h"

#if __has_include(<cupti.h>)

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <vector>

#include "base/log.h"
#include "base/trace.h"

namespace drover::cuda {
namespace {

#if CUPTI_API_VERSION >= 130000
using KernelRecord = CUpti_ActivityKernel10;
using CopyRecord = CUpti_ActivityMemcpy6;
#else
using KernelRecord = CUpti_ActivityKernel9;
using CopyRecord = CUpti_ActivityMemcpy5;
#endif
using MemsetRecord = CUpti_ActivityMemset4;

constexpr size_t kBuffer = size_t{4} << 20;
constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

struct Cupti {
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityRegisterTimestampCallback) register_clock = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next = nullptr;
  decltype(&cuptiActivityGetNumDroppedRecords) dropped = nullptr;
  decltype(&cuptiGetResultString) text = nullptr;
};

// CUPTI's callbacks carry no context, so what they use is the process's. Never unloaded: CUPTI may
// call back until the process ends.
Cupti cupti;
std::atomic<bool> started{false};
std::atomic<size_t> lost{0};

uint64_t steady_clock_ns() { return static_cast<uint64_t>(trace::now_ns()); }

void give_buffer(uint8_t** buffer, size_t* bytes, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBuffer));
  *bytes = *buffer == nullptr ? 0 : kBuffer;
  *most_records = 0;  // as many as fit
}

// "void drover::cuda::(anonymous namespace)::write_kernel<4>(drover::cuda::NormRows)" ->
// "write_kernel<4>(NormRows)": overloads differ in their parameters, long lists of those say
// little.
std::string readable(const char* mangled) {
  constexpr size_t kLong = 80;
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string s = status == 0 && demangled != nullptr ? demangled : mangled;
  std::free(demangled);  // NOLINT: __cxa_demangle's malloc
  for (const std::string noise : {"(anonymous namespace)::", "drover::cuda::"}) {
    for (size_t at; (at = s.find(noise)) != std::string::npos;) s.erase(at, noise.size());
  }
  if (s.starts_with("void ")) s.erase(0, 5);
  if (s.size() <= kLong || !s.ends_with(')')) return s;
  int depth = 0;
  for (size_t i = s.size(); i-- > 0;) {
    depth += s[i] == ')' ? 1 : s[i] == '(' ? -1 : 0;
    if (depth == 0) {
      s.resize(i);
      break;
    }
  }
  return s;
}

// Names and rows are few; CUPTI's own pointers to names stay valid.
const char* kernel_name(const char* mangled) {
  static std::mutex mutex;
  static std::map<const char*, const char*> known;
  if (mangled == nullptr) return "a kernel without a name";
  const std::lock_guard lock(mutex);
  const char*& name = known[mangled];
  if (name == nullptr) name = trace::keep(readable(mangled));
  return name;
}

int row(const char* category, uint32_t device, uint32_t stream) {
  static std::mutex mutex;
  static std::map<std::pair<uint32_t, uint32_t>, int> kernels;
  static const int copies = trace::track("GPU copies", "copy");
  if (*category == 'c') return copies;
  const std::lock_guard lock(mutex);
  const auto [at, fresh] = kernels.try_emplace({device, stream}, 0);
  if (fresh) at->second = trace::track(fmt::format("GPU {} stream {}", device, stream), category);
  return at->second;
}

const char* copy_name(uint8_t kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
      return "copy host to device";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
      return "copy device to host";
    case CUPTI_ACTIVITY_MEMCPY_KIND_PTOP:
      return "copy device to device (peer)";
    default:
      return "copy device to device";
  }
}

void record(const CUpti_Activity* any) {
  const auto time = [](uint64_t ns) { return static_cast<int64_t>(ns); };
  switch (any->kind) {
    case CUPTI_ACTIVITY_KIND_KERNEL:
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
      const auto& k = *reinterpret_cast<const KernelRecord*>(any);
      trace::span(row("kernel", k.deviceId, k.streamId), kernel_name(k.name), time(k.start),
                  time(k.end), {"blocks", int64_t{k.gridX} * int64_t{k.gridY} * int64_t{k.gridZ}},
                  {"graph", k.graphId});
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto& c = *reinterpret_cast<const CopyRecord*>(any);
      trace::span(row("copy", 0, 0), copy_name(c.copyKind), time(c.start), time(c.end),
                  {"bytes", static_cast<int64_t>(c.bytes)});
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto& m = *reinterpret_cast<const MemsetRecord*>(any);
      trace::span(row("copy", 0, 0), "memset", time(m.start), time(m.end),
                  {"bytes", static_cast<int64_t>(m.bytes)});
      break;
    }
    default:
      break;
  }
}

void take_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t, size_t valid) {
  CUpti_Activity* any = nullptr;
  while (valid > 0 && cupti.next(buffer, valid, &any) == CUPTI_SUCCESS) record(any);
  size_t dropped = 0;
  if (cupti.dropped(context, stream, &dropped) == CUPTI_SUCCESS) lost += dropped;
  std::free(buffer);  // NOLINT: CUPTI hands back what give_buffer allocated
}

void* open_library(std::string* tried) {
  std::vector<std::string> names;
  if (const char* given = std::getenv("DROVER_CUPTI")) names.emplace_back(given);
  const std::string file = fmt::format("libcupti.so.{}", CUPTI_API_VERSION / 10000);
  std::vector<std::string> folders = {"", "/usr/local/cuda/extras/CUPTI/lib64/",
                                      "/usr/local/cuda/lib64/"};
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* home = std::getenv(variable)) {
      folders.push_back(fmt::format("{}/extras/CUPTI/lib64/", home));
      folders.push_back(fmt::format("{}/lib64/", home));
    }
  }
  for (const auto& folder : folders) names.push_back(folder + file);
  for (const auto& name : names) {
    if (void* library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
  }
  *tried = fmt::format("{} is not found; name it with DROVER_CUPTI=FILE", file);
  return nullptr;
}

template <typename F>
bool look_up(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(::dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::string start_device_trace() {
  if (started) return {};
  std::string why;
  void* library = open_library(&why);
  if (library == nullptr) return why;
  Cupti c;
  const bool whole = look_up(library, "cuptiActivityRegisterCallbacks", c.register_callbacks) &&
                     look_up(library, "cuptiActivityRegisterTimestampCallback", c.register_clock) &&
                     look_up(library, "cuptiActivityEnable", c.enable) &&
                     look_up(library, "cuptiActivityDisable", c.disable) &&
                     look_up(library, "cuptiActivityFlushAll", c.flush) &&
                     look_up(library, "cuptiActivityGetNextRecord", c.next) &&
                     look_up(library, "cuptiActivityGetNumDroppedRecords", c.dropped) &&
                     look_up(library, "cuptiGetResultString", c.text);
  if (!whole) return "libcupti lacks functions that drover uses; it is of another version";
  cupti = c;
  const auto failed = [&](const char* what, CUptiResult r) {
    const char* text = "unknown";
    cupti.text(r, &text);
    return fmt::format("CUPTI: {} failed: {}", what, text);
  };
  // The clock first: records take the one that is known when they are made.
  CUptiResult r = cupti.register_clock(steady_clock_ns);
  if (r != CUPTI_SUCCESS) return failed("setting its clock", r);
  r = cupti.register_callbacks(give_buffer, take_buffer);
  if (r != CUPTI_SUCCESS) return failed("registering for buffers", r);
  for (const auto kind : kKinds) {
    r = cupti.enable(kind);
    if (r != CUPTI_SUCCESS) return failed("recording", r);
  }
  started = true;
  return {};
}

void flush_device_trace() {
  if (!started) return;
  cupti.flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  if (const size_t n = lost.exchange(0); n > 0)
    log::warn("CUPTI dropped {} records: kernels are missing from the trace", n);
}

void stop_device_trace() {
  flush_device_trace();
  if (!started.exchange(false)) return;
  for (const auto kind : kKinds) cupti.disable(kind);
}

}  // namespace drover::cuda

#else

namespace drover::cuda {

std::string start_device_trace() { return "drover was built without CUPTI's headers"; }
void flush_device_trace() {}
void stop_device_trace() {}

}  // namespace drover::cuda

#endif
