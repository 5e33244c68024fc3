// Every kernel, copy and memset of this process's GPUs as spans in base/trace, those inside of CUDA
// graphs too. Through CUPTI, which is looked for when asked (libcupti of the CUDA version drover
// was built with, or as DROVER_CUPTI names it); drover runs without it.
#pragma once

#include <string>

namespace drover::cuda {

// Call once, after trace::start() and before the first CUDA call of the process (graphs made
// earlier may stay unseen). Returns "" when kernels will be recorded, else why they will not be:
// say so and go on with spans of whole steps. Times are of the steady clock: CUPTI is given it.
std::string start_device_trace();

// Hands over what has finished. Call with the device idle, before trace::take_json_events().
// Warns in the log when CUPTI dropped records.
void flush_device_trace();

// Ends the recording; flushes first. Nothing when it was not started.
void stop_device_trace();

}  // namespace drover::cuda
