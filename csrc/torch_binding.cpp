// The operator pointfuse::_conv_bn_act_cuda for PyTorch: tensors in, a plan, a launch, a tensor out.
//
// The only file that knows torch, and of torch only its stable ABI: the library depends neither on torch's version
// (from 2.10 on) nor on Python's, and loads where torch has no CUDA. The schema, what tracing sees, and the checks of
// what these kernels serve stand in Python; here is checked what a wrong launch could come from.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "gpu.h"
#include "kernels/describe.h"
#include "kernels/run.h"
#include "memory_format.h"
#include "plan_cache.h"

#if defined(POINTFUSE_HOST_CUDA)
// Tests run the binding on tensors of the CPU, over emulated kernels.
#define POINTFUSE_DISPATCH_KEY CPU
#else
#define POINTFUSE_DISPATCH_KEY CUDA
// Lives in libtorch_cuda, which a PyTorch without CUDA lacks.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace pointfuse {
namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#if defined(POINTFUSE_HOST_CUDA)
int32_t device_type() { return aoti_torch_device_type_cpu(); }
cudaStream_t current_stream(int32_t) { return nullptr; }
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
#else
using torch::stable::accelerator::DeviceGuard;
int32_t device_type() { return aoti_torch_device_type_cuda(); }
cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// Python recognises a refusal by this prefix and lets PyTorch answer the call.
constexpr const char* kRefused = "pointfuse does not serve this call: ";
// And an allocation that failed by this one.
constexpr const char* kOutOfMemory = "pointfuse: CUDA out of memory";

void serve_if(bool condition, const char* otherwise) {
  if (!condition) throw std::runtime_error(std::string(kRefused) + otherwise);
}

int32_t dtype_code(const Tensor& tensor) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

DType dtype_of(const Tensor& tensor) {
  const int32_t code = dtype_code(tensor);
  if (code == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  serve_if(code == aoti_torch_dtype_float32(), "dtypes are float32, float16 and bfloat16");
  return DType::kFloat32;
}

bool is_on(const Tensor& tensor, int32_t device) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type == device_type() && tensor.get_device_index() == device;
}

// The largest power of two, at most 16, that divides an address.
int32_t alignment_of(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | 16;
  return static_cast<int32_t>(bits & -bits);
}

// A tensor [outer, channels, height, width] of the problem, checked against x.
struct Image {
  const int64_t* sizes;
  const int64_t* strides;
  const void* data;

  Image(const Tensor& tensor, int32_t device, DType dtype) {
    serve_if(tensor.dim() == 4, "x, weight and residual need four dimensions");
    serve_if(is_on(tensor, device), "all tensors must be on one device");
    serve_if(dtype_of(tensor) == dtype, "x, weight and residual must have one dtype");
    sizes = tensor.sizes().data(), strides = tensor.strides().data(), data = tensor.const_data_ptr();
  }

  Strides layout() const { return {strides[0], strides[1], strides[2], strides[3]}; }
  bool channels_last() const { return is_channels_last(sizes, strides); }
};

// The last argument of the operator, packed by arguments() in backends/calls.py: a list of numbers costs 0.6 us a
// call more.
class Config {
 public:
  explicit Config(int64_t bits) : bits_(bits) {}

  int32_t stride_h() const { return field(0, 8); }
  int32_t stride_w() const { return field(8, 8); }
  int32_t padding_h() const { return field(16, 8); }
  int32_t padding_w() const { return field(24, 8); }
  Activation activation() const { return static_cast<Activation>(field(32, 3)); }
  Residual residual() const { return static_cast<Residual>(field(35, 2)); }
  bool tf32() const { return field(37, 1); }
  // A frozen unit: the weight does not change, the bias may be fp32, and the output is channels_last if asked for.
  bool frozen() const { return field(38, 1); }
  bool channels_last() const { return field(39, 1); }

 private:
  int32_t field(int shift, int width) const { return static_cast<int32_t>(bits_ >> shift & ((1 << width) - 1)); }

  int64_t bits_;
};

Problem problem_of(const Image& x, const Image& weight, DType dtype, const Config& config) {
  Problem p{};
  p.batch = x.sizes[0], p.c_in = x.sizes[1], p.height = x.sizes[2], p.width = x.sizes[3];
  p.c_out = weight.sizes[0], p.kernel_h = weight.sizes[2], p.kernel_w = weight.sizes[3];
  p.stride_h = config.stride_h(), p.stride_w = config.stride_w();
  p.padding_h = config.padding_h(), p.padding_w = config.padding_w();
  p.dtype = dtype, p.tf32 = config.tf32();
  p.activation = config.activation(), p.constant_weight = config.frozen();
  p.x = x.layout(), p.weight = weight.layout();
  p.x_alignment = alignment_of(x.data), p.weight_alignment = alignment_of(weight.data);
  p.residual_alignment = 16;
  serve_if(p.c_in > 0 && p.c_out > 0 && p.height > 0 && p.width > 0, "every size but the batch must be at least 1");
  serve_if(weight.sizes[1] == p.c_in, "weight and x must have the same input channels");
  serve_if(p.height + 2 * p.padding_h >= p.kernel_h && p.width + 2 * p.padding_w >= p.kernel_w,
           "the padded plane must not be smaller than the kernel");
  return p;
}

// A tensor of one number an output channel; null where absent.
const void* channels_of(const OptionalTensor& tensor, const Problem& problem, int32_t device, DType dtype) {
  if (!tensor) return nullptr;
  serve_if(tensor->dim() == 1 && tensor->size(0) == problem.c_out, "bias and batch norm need one number a channel");
  serve_if(is_on(*tensor, device), "all tensors must be on one device");
  serve_if(dtype_of(*tensor) == dtype, "the tensors of batch norm must have one dtype");
  serve_if(problem.c_out == 1 || tensor->stride(0) == 1, "a tensor of bias or batch norm is not contiguous");
  return tensor->const_data_ptr();
}

Tensor allocate(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(rank, sizes, strides, dtype, device_type(), device, &handle) != TORCH_SUCCESS)
    throw std::runtime_error(kOutOfMemory);
  return Tensor(handle);
}

std::string text_of(const Problem& problem, const Plan& plan) {
  std::string text(static_cast<size_t>(describe(problem, plan, nullptr, 0)) + 1, ' ');
  describe(problem, plan, text.data(), static_cast<int>(text.size()));
  text.pop_back();
  return text;
}

bool print_plans() {
  static const bool wanted = [] {
    const char* value = std::getenv("POINTFUSE_PRINT_PLAN");
    return value && *value && std::string(value) != "0";
  }();
  return wanted;
}

Plan plan_for(const Problem& problem, int32_t device) {
  static PlanCache cache;
  const auto [plan, made] = cache.find_or_make(problem, device_at(device));
  if (made && print_plans()) std::fprintf(stderr, "pointfuse: %s\n", text_of(problem, plan).c_str());
  serve_if(plan.kernel != Kernel::kNone, plan.refusal ? plan.refusal : "there is no plan");
  return plan;
}

void launch(const Problem& problem, Operands& operands, int32_t device) {
  // The CUDA runtime linked into this library keeps a current device of its own.
  cudaSetDevice(device);
  const Plan plan = plan_for(problem, device);
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    const int64_t stride = 1;
    workspace = allocate(1, &plan.workspace_bytes, &stride, aoti_torch_dtype_uint8(), device);
    operands.workspace = workspace->mutable_data_ptr();
  }
  const cudaError_t error = run(plan, problem, operands, current_stream(device));
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  throw std::runtime_error(std::string("pointfuse: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                           ") from " + text_of(problem, plan));
}

Tensor conv_bn_act(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mean,
                   const OptionalTensor& var, const OptionalTensor& gamma, const OptionalTensor& beta,
                   const OptionalTensor& residual, int64_t config_bits, double eps, double negative_slope) {
  const Config config(config_bits);
  const int32_t device = x.get_device_index();
  const DType dtype = dtype_of(x);
  const Image x_image(x, device, dtype), weight_image(weight, device, dtype);
  Problem p = problem_of(x_image, weight_image, dtype, config);
  const int64_t y_sizes[] = {p.batch, p.c_out, p.out_height(), p.out_width()};

  Operands operands{};
  operands.x = x_image.data, operands.weight = weight_image.data;
  if (residual) {
    const Image image(*residual, device, dtype);
    serve_if(std::equal(y_sizes, y_sizes + 4, image.sizes), "the residual must have the output's shape");
    p.residual = config.residual(), p.residual_strides = image.layout();
    p.residual_alignment = alignment_of(image.data), operands.residual = image.data;
  }
  if (bias) {
    p.bias = true, operands.bias_dtype = dtype_of(*bias);
    serve_if(operands.bias_dtype == dtype || config.frozen(), "bias must have the dtype of x");
    operands.bias = channels_of(bias, p, device, operands.bias_dtype);
  }
  if (mean) {
    p.batch_norm = true, operands.norm_dtype = dtype_of(*mean);
    serve_if(operands.norm_dtype == dtype || operands.norm_dtype == DType::kFloat32,
             "batch norm must be of the dtype of x or float32");
    serve_if(var.has_value(), "batch norm needs running_var beside running_mean");
    operands.mean = channels_of(mean, p, device, operands.norm_dtype);
    operands.var = channels_of(var, p, device, operands.norm_dtype);
    operands.gamma = channels_of(gamma, p, device, operands.norm_dtype);
    operands.beta = channels_of(beta, p, device, operands.norm_dtype);
  }
  operands.eps = static_cast<float>(eps), operands.negative_slope = static_cast<float>(negative_slope);

  const DeviceGuard guard(device);
  int64_t strides[4];
  dense_strides(y_sizes, config.channels_last() || x_image.channels_last() || weight_image.channels_last(), strides);
  Tensor y = allocate(4, y_sizes, strides, dtype_code(x), device);
  if (p.batch == 0) return y;
  operands.y = y.mutable_data_ptr();
  p.y = {strides[0], strides[1], strides[2], strides[3]}, p.y_alignment = alignment_of(operands.y);
  launch(p, operands, device);
  return y;
}

}  // namespace
}  // namespace pointfuse

// Why these kernels cannot run on this machine; empty where they can. Called from Python by ctypes, before any tensor.
extern "C" __attribute__((visibility("default"))) const char* pointfuse_unusable_reason() {
  static const std::string reason = pointfuse::no_gpu_reason();
  return reason.c_str();
}

// Must be INTERFACE of backends/cuda.py.
extern "C" __attribute__((visibility("default"))) int pointfuse_interface() { return 1; }

STABLE_TORCH_LIBRARY_IMPL(pointfuse, POINTFUSE_DISPATCH_KEY, m) {
  m.impl("_conv_bn_act_cuda", TORCH_BOX(&pointfuse::conv_bn_act));
}
