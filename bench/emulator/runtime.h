// What the emulated operators and collectives ask of the emulated runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>

// Whether nothing is computed: work is only recorded, and memory is as it comes.
bool emulated_idle();

// What a launch would cost a device: bytes that it reads and writes, and floating-point operations of a convolution or
// a matrix product.
struct Cost {
  size_t bytes = 0, flops = 0;
};

// Gives work to a stream: it is done later, on the device's thread, or recorded. The name is for messages.
cudaError_t emulated_enqueue(cudaStream_t stream, const char* name, std::function<void()> work, Cost cost = {});
