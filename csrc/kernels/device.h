// What the planner has to know about a GPU: the GPUs it knows by name, and estimates for all others.
#pragma once

#include <cstdint>
#include <cstring>

namespace pointfuse {

struct Device {
  int32_t architecture;  // compute capability, 10 * major + minor
  int32_t multiprocessors;
  int32_t shared_bytes_per_block;  // the opt-in limit
  int32_t shared_bytes_per_multiprocessor;
  int64_t l2_bytes;
  float clock_ghz;                              // at which the rates hold
  float memory_gb_s;                            // device memory bandwidth
  float half_tflops, tf32_tflops, fp32_tflops;  // dense peak rates of bf16/fp16, TF32 and plain fp32 arithmetic
};

constexpr int64_t kRegistersPerMultiprocessor = 65536;
constexpr int32_t kReservedSharedBytes = 1024;  // per block, taken by the system out of the multiprocessor's

constexpr int32_t threads_per_multiprocessor(const Device& device) {
  const int32_t minor = device.architecture % 10, major = device.architecture / 10;
  return (major == 8 && minor != 0) || major == 12 ? 1536 : 2048;
}

constexpr int32_t blocks_per_multiprocessor(const Device& device) {
  return threads_per_multiprocessor(device) == 2048 ? 32 : device.architecture == 86 ? 16 : 24;
}

struct NamedDevice {
  const char* name;
  Device device;
};

constexpr int32_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * 1024;

// Datasheets and architecture whitepapers. Rates are without sparsity and with fp32 accumulation; the clock is the one
// that the half-precision rate implies.
constexpr NamedDevice kDevices[] = {
    {"a100-40gb", {80, 108, 163 * kKiB, 164 * kKiB, 40 * kMiB, 1.41f, 1555.0f, 312.0f, 156.0f, 19.5f}},
    {"a100-80gb", {80, 108, 163 * kKiB, 164 * kKiB, 40 * kMiB, 1.41f, 2039.0f, 312.0f, 156.0f, 19.5f}},
    {"a30", {80, 56, 163 * kKiB, 164 * kKiB, 24 * kMiB, 1.44f, 933.0f, 165.0f, 82.0f, 10.3f}},
    {"a10", {86, 72, 99 * kKiB, 100 * kKiB, 6 * kMiB, 1.695f, 600.0f, 125.0f, 62.5f, 31.2f}},
    {"a40", {86, 84, 99 * kKiB, 100 * kKiB, 6 * kMiB, 1.74f, 696.0f, 149.7f, 74.8f, 37.4f}},
    {"rtx-a6000", {86, 84, 99 * kKiB, 100 * kKiB, 6 * kMiB, 1.8f, 768.0f, 154.8f, 77.4f, 38.7f}},
    {"rtx-3090", {86, 82, 99 * kKiB, 100 * kKiB, 6 * kMiB, 1.695f, 936.0f, 71.0f, 35.6f, 35.6f}},
    {"l4", {89, 58, 99 * kKiB, 100 * kKiB, 48 * kMiB, 2.04f, 300.0f, 121.0f, 60.0f, 30.3f}},
    {"l40s", {89, 142, 99 * kKiB, 100 * kKiB, 96 * kMiB, 2.52f, 864.0f, 362.0f, 183.0f, 91.6f}},
    {"rtx-4090", {89, 128, 99 * kKiB, 100 * kKiB, 72 * kMiB, 2.52f, 1008.0f, 165.2f, 82.6f, 82.6f}},
    {"h100", {90, 132, 227 * kKiB, 228 * kKiB, 50 * kMiB, 1.83f, 3350.0f, 989.4f, 494.7f, 66.9f}},
    {"h100-pcie", {90, 114, 227 * kKiB, 228 * kKiB, 50 * kMiB, 1.62f, 2039.0f, 756.0f, 378.0f, 51.2f}},
    {"h200", {90, 132, 227 * kKiB, 228 * kKiB, 50 * kMiB, 1.83f, 4800.0f, 989.4f, 494.7f, 66.9f}},
    {"b200", {100, 148, 227 * kKiB, 228 * kKiB, 126 * kMiB, 1.85f, 8000.0f, 2250.0f, 1125.0f, 75.0f}},
    {"rtx-5090", {120, 170, 99 * kKiB, 100 * kKiB, 96 * kMiB, 2.41f, 1792.0f, 209.5f, 104.8f, 104.8f}},
};

// "a100" and "h100-sxm" are names too. Null for an unknown name.
inline const Device* device_by_name(const char* name) {
  if (std::strcmp(name, "a100") == 0) name = "a100-80gb";
  if (std::strcmp(name, "h100-sxm") == 0) name = "h100";
  for (const NamedDevice& known : kDevices) {
    if (std::strcmp(known.name, name) == 0) return &known.device;
  }
  return nullptr;
}

// A device from what CUDA tells about it; the rates follow from the architecture. Cards of one architecture may differ
// by a factor of two in half precision (8.6, 8.9 and 12.0: GeForce half of data centre); the lower one is assumed.
constexpr Device estimate_device(int32_t architecture, int32_t multiprocessors, int32_t shared_bytes_per_block,
                                 int32_t shared_bytes_per_multiprocessor, int64_t l2_bytes, float clock_ghz,
                                 float memory_gb_s) {
  // Floating-point operations per clock and multiprocessor.
  int half = 512, tf32 = 256, fp32 = 256;
  if (architecture == 80) half = 2048, tf32 = 1024, fp32 = 128;
  if (architecture == 87) half = 1024, tf32 = 512;
  if (architecture / 10 == 9) half = 4096, tf32 = 2048;
  if (architecture / 10 == 10) half = 8192, tf32 = 4096;
  const float scale = 1e-3f * multiprocessors * clock_ghz;
  return {architecture,
          multiprocessors,
          shared_bytes_per_block,
          shared_bytes_per_multiprocessor,
          l2_bytes,
          clock_ghz,
          memory_gb_s,
          scale * half,
          scale * tf32,
          scale * fp32};
}

}  // namespace pointfuse
