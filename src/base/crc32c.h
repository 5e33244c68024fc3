// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), as in RFC 3720 section 12.1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace drover {

// Of `bytes` bytes; pass an earlier result as `crc` to go on where it ended. Uses the SSE4.2
// instruction where the processor has it.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0) noexcept;

// The table version, on any processor.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc = 0) noexcept;

}  // namespace drover
