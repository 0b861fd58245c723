// What the emulated operators and collectives ask of the emulated runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

// Gives work to a stream: it is done later, on the device's thread, or recorded. The name is for messages.
cudaError_t emulated_enqueue(cudaStream_t stream, const char* name, std::function<void()> work);
