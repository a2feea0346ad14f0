// The kernels for Python's tests, in the emulator or on a GPU: run() plans one candidate, launches it on tensors given
// by address, and waits for it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "atoms.cuh"
#include "plan.h"
#include "run.h"

namespace py = pybind11;
using namespace pointfuse;

namespace {

// ---- What differs between the emulator and a GPU.

#if defined(POINTFUSE_HOST_CUDA)

void forget_memory() { host_cuda::clear_global(); }
void announce_memory(const void* base, size_t bytes) { host_cuda::register_global(base, bytes); }
void set_options(bool late, uint64_t seed) { host_cuda::options() = {late, seed}; }
std::string failure(cudaError_t error) { return error == cudaSuccess ? "" : host_cuda::last_error(); }
int32_t architecture() { return 90; }

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

void forget_memory() {}
void announce_memory(const void*, size_t) {}
void set_options(bool, uint64_t) {}
std::string failure(cudaError_t error) {
  if (error == cudaSuccess) error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

int32_t architecture() {
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

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("no such dtype: " + name);
}

Activation activation_of(const std::string& name) {
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

struct Unit {
  Problem problem{};
  Operands operands{};
};

Unit unit_of(const py::dict& tensors, const py::dict& options) {
  const Tensor x(tensors, "x"), weight(tensors, "weight"), y(tensors, "y"), residual(tensors, "residual");
  const Tensor bias(tensors, "bias"), mean(tensors, "mean"), var(tensors, "var"), gamma(tensors, "gamma"),
      beta(tensors, "beta");
  const auto pair = [&](const char* name) { return options[name].cast<std::pair<int32_t, int32_t>>(); };
  Unit unit;
  Problem& p = unit.problem;
  p.batch = x.sizes.at(0), p.c_in = x.sizes.at(1), p.height = x.sizes.at(2), p.width = x.sizes.at(3);
  p.c_out = weight.sizes.at(0);
  p.kernel_h = static_cast<int32_t>(weight.sizes.at(2)), p.kernel_w = static_cast<int32_t>(weight.sizes.at(3));
  std::tie(p.stride_h, p.stride_w) = pair("stride");
  std::tie(p.padding_h, p.padding_w) = pair("padding");
  p.dtype = x.dtype;
  p.tf32 = options["tf32"].cast<bool>();
  p.x = x.four(), p.weight = weight.four(), p.y = y.four();
  p.x_alignment = x.alignment(), p.weight_alignment = weight.alignment(), p.y_alignment = y.alignment();
  p.bias = bias.data, p.batch_norm = mean.data;
  p.activation = activation_of(options["activation"].cast<std::string>());
  p.constant_weight = options["constant_weight"].cast<bool>();
  if (residual.data) {
    p.residual = options["residual_order"].cast<std::string>() == "add_act" ? Residual::kAddAct : Residual::kActAdd;
    p.residual_strides = residual.four();
    p.residual_alignment = residual.alignment();
  }
  unit.operands = {x.data,
                   weight.data,
                   y.data,
                   residual.data,
                   bias.data,
                   mean.data,
                   var.data,
                   gamma.data,
                   beta.data,
                   bias.dtype,
                   mean.dtype,
                   options["eps"].cast<float>(),
                   options["negative_slope"].cast<float>(),
                   nullptr};
  return unit;
}

py::dict described(const Plan& plan) {
  py::dict result;
  result["x_vector"] = plan.x_vector;
  result["weight_vector"] = plan.weight_vector;
  result["y_vector"] = plan.y_vector;
  result["vectorised"] = plan.vectorised;
  result["x_pixel_major"] = plan.x_pixel_major;
  result["y_pixel_major"] = plan.y_pixel_major;
  result["split_k"] = plan.split_k;
  result["grid"] = plan.grid;
  return result;
}

// Raises ValueError where there is no such plan and RuntimeError where the launch fails. `general` asks the sm_80
// kernel for its general path where the vectorised one would do, `grid` the sm_90 kernel for so many blocks.
py::dict run_unit(const py::dict& tensors, const py::dict& options, const std::string& kernel, int tile, int split_k,
                  bool general, int64_t grid, bool late, uint64_t seed) {
  forget_memory();
  Unit unit = unit_of(tensors, options);
  const Kernel which = kernel == "sm80" ? Kernel::kSm80 : Kernel::kSm90;
  Device device = *device_by_name("h100");
  device.architecture = architecture();
  Plan plan = make_plan(unit.problem, device, which, tile, split_k);
  if (plan.refusal) throw py::value_error(plan.refusal);
  if (general) plan.vectorised = false;
  if (grid > 0) plan.grid = grid;

  Workspace workspace(plan.workspace_bytes);
  unit.operands.workspace = workspace.data();
  set_options(late, seed);
  const std::string message = failure(run(plan, unit.problem, unit.operands, nullptr));
  if (!message.empty()) throw std::runtime_error(message);
  return described(plan);
}

}  // namespace

PYBIND11_MODULE(POINTFUSE_TEST_MODULE, module) {
  module.def("run", &run_unit, py::arg("tensors"), py::arg("options"), py::kw_only(), py::arg("kernel"),
             py::arg("tile"), py::arg("split_k") = 1, py::arg("general") = false, py::arg("grid") = 0,
             py::arg("late") = true, py::arg("seed") = 0);
  module.attr("tiles") = py::dict(py::arg("sm80") = sm80::kTileCount, py::arg("sm90") = sm90::kTileCount);
}
