// Interface of the emulated runtime for the emulated operators and collectives.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <functional>
#include <string>

// Whether nothing is computed: work is only recorded, and memory is not poisoned.
bool emulated_idle();

// Cost of a launch: bytes read and written, and floating-point operations of convolutions and matrix products. Of
// convolutions also the shape, separated by spaces: N, C, H, W of the input, O, side of the kernel, stride, passes.
struct Cost {
  size_t bytes = 0, flops = 0;
  std::string shape;
};

// Enqueues work on a stream. The device's thread runs it later, or a capture records it. The name is for messages.
cudaError_t emulated_enqueue(cudaStream_t stream, const char* name, std::function<void()> work, Cost cost = {});
