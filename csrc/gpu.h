// What the CUDA runtime tells about this machine: the planner's view of each GPU, and why there is none to run on.
#pragma once

#include <string>

#include "kernels/device.h"

#if defined(POINTFUSE_HOST_CUDA)

#include "host_gpu.h"

#else

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

namespace pointfuse {

inline int device_attribute(cudaDeviceAttr attribute, int index) {
  int value = 0;
  cudaDeviceGetAttribute(&value, attribute, index);
  return value;
}

inline Device query_device(int index) {
  const auto get = [index](cudaDeviceAttr attribute) { return device_attribute(attribute, index); };
  const float clock_ghz = 1e-6f * get(cudaDevAttrClockRate);
  // kHz times bits; two transfers a clock, eight bits a byte.
  const float memory_gb_s = 2e-6f / 8 * get(cudaDevAttrMemoryClockRate) * get(cudaDevAttrGlobalMemoryBusWidth);
  return estimate_device(10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor),
                         get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                         get(cudaDevAttrMaxSharedMemoryPerMultiprocessor), get(cudaDevAttrL2CacheSize), clock_ghz,
                         memory_gb_s);
}

// Queried once a device: a device's properties do not change while the process lives.
inline const Device& device_at(int index) {
  static std::mutex mutex;
  static std::vector<Device*> devices;
  const std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<int>(devices.size()) <= index) devices.resize(index + 1);
  if (!devices[index]) devices[index] = new Device(query_device(index));
  return *devices[index];
}

// Empty where at least one GPU can run these kernels.
inline std::string no_gpu_reason() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "there is no NVIDIA driver";
    return "the driver is for CUDA " + std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
           " and the kernels were built with CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
           std::to_string(CUDART_VERSION % 1000 / 10) + ": update the driver, or build with an older nvcc";
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) return "there is no NVIDIA GPU";
  if (error != cudaSuccess) return std::string("CUDA cannot start: ") + cudaGetErrorString(error);
  for (int i = 0; i < count; ++i) {
    if (device_attribute(cudaDevAttrComputeCapabilityMajor, i) >= 8) return "";
  }
  return "no GPU here has compute capability 8.0 or later";
}

}  // namespace pointfuse

#endif
