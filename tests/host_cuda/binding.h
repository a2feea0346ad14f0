// What the bindings of the kernels for Python's tests share: the machine that runs them, and tensors from Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "atoms.cuh"

namespace pointfuse::testing {

namespace py = pybind11;

// ---- What differs between the emulator and a GPU.

#if defined(POINTFUSE_HOST_CUDA)

inline void forget_memory() { host_cuda::clear_global(); }
inline void announce_memory(const void* base, size_t bytes) { host_cuda::register_global(base, bytes); }
inline void set_options(bool late, uint64_t seed) { host_cuda::options() = {late, seed}; }
inline std::string failure(cudaError_t error) { return error == cudaSuccess ? "" : host_cuda::last_error(); }
inline int32_t architecture() { return 90; }

// Filled with NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_((static_cast<size_t>(bytes) + sizeof(float4) - 1) / sizeof(float4)) {
    std::memset(memory_.data(), 0xff, memory_.size() * sizeof(float4));
    announce_memory(memory_.data(), static_cast<size_t>(bytes));
  }
  void* data() { return memory_.data(); }

 private:
  std::vector<float4> memory_;
};

#else

inline void forget_memory() {}
inline void announce_memory(const void*, size_t) {}
inline void set_options(bool, uint64_t) {}
inline std::string failure(cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

inline int32_t architecture() {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  return 10 * major + minor;
}

class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes > 0) cudaMalloc(&memory_, static_cast<size_t>(bytes));
    if (memory_) cudaMemset(memory_, 0xff, static_cast<size_t>(bytes));
  }
  ~Workspace() { cudaFree(memory_); }
  void* data() { return memory_; }

 private:
  void* memory_ = nullptr;
};

#endif

// ---- A unit from Python

inline DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("no such dtype: " + name);
}

inline Activation activation_of(const std::string& name) {
  const std::pair<const char*, Activation> known[] = {{"identity", Activation::kIdentity},
                                                      {"leaky_relu", Activation::kLeakyRelu},
                                                      {"relu", Activation::kRelu},
                                                      {"relu6", Activation::kRelu6},
                                                      {"silu", Activation::kSilu}};
  for (const auto& [known_name, activation] : known) {
    if (name == known_name) return activation;
  }
  throw py::value_error("no such activation: " + name);
}

// A tensor as Python describes it: address, sizes, strides, dtype; None is absent.
struct Tensor {
  char* data = nullptr;
  std::vector<int64_t> sizes, strides;
  DType dtype = DType::kFloat32;

  Tensor(const py::dict& tensors, const char* name) {
    if (!tensors.contains(name) || tensors[name].is_none()) return;
    const py::object tensor = tensors[name];
    data = reinterpret_cast<char*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    sizes = tensor.attr("shape").cast<std::vector<int64_t>>();
    strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
    dtype = dtype_of(py::str(tensor.attr("dtype")).cast<std::string>().substr(sizeof("torch.") - 1));
    const py::object storage = tensor.attr("untyped_storage")();
    announce_memory(reinterpret_cast<char*>(storage.attr("data_ptr")().cast<uintptr_t>()),
                    storage.attr("nbytes")().cast<size_t>());
  }

  Strides four() const { return {strides.at(0), strides.at(1), strides.at(2), strides.at(3)}; }
  int32_t alignment() const {
    const auto address = reinterpret_cast<uintptr_t>(data);
    return address % 16 == 0 ? 16 : static_cast<int32_t>(address & -address);
  }
};

// Adds the passes of training.h to a module.
void define_training(py::module_& module);

}  // namespace pointfuse::testing
