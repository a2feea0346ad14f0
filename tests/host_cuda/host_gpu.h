// csrc/gpu.h for the emulator: one GPU, of a kind that the planner knows by name.
#pragma once

#include <cstring>

#include "atoms.cuh"
#include "device.h"

namespace pointfuse {

inline const Device*& emulated_device() {
  static const Device* device = device_by_name("h100");
  return device;
}

inline const Device& device_at(int) { return *emulated_device(); }
inline std::string no_gpu_reason() { return ""; }

}  // namespace pointfuse

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "an error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t) { return host_cuda::last_error().c_str(); }

// Plans from now on are for this device; false for a name that the planner does not know.
extern "C" __attribute__((used, visibility("default"))) inline bool pointfuse_emulate(const char* name) {
  const pointfuse::Device* device = pointfuse::device_by_name(name);
  if (device) pointfuse::emulated_device() = device;
  return device;
}

// While true, every access to global memory is a fault, as after a launch with a bad address.
extern "C" __attribute__((used, visibility("default"))) inline void pointfuse_emulate_fault(bool faulty) {
  host_cuda::clear_global();
  if (faulty) host_cuda::register_global(nullptr, 0);
}
