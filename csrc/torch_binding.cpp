// The operators pointfuse::_*_cuda for PyTorch: tensors in, a plan, a launch, tensors out.
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
#include <tuple>

#include "gpu.h"
#include "kernels/describe.h"
#include "kernels/run.h"
#include "kernels/training.h"
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
const void* channels_of(const OptionalTensor& tensor, int64_t channels, int32_t device, DType dtype) {
  if (!tensor) return nullptr;
  serve_if(tensor->dim() == 1 && tensor->size(0) == channels, "bias and batch norm need one number a channel");
  serve_if(is_on(*tensor, device), "all tensors must be on one device");
  serve_if(dtype_of(*tensor) == dtype, "the tensors of batch norm must have one dtype");
  serve_if(channels == 1 || tensor->stride(0) == 1, "a tensor of bias or batch norm is not contiguous");
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
  // The CUDA runtime linked into this library keeps a current device of its own.
  cudaSetDevice(device);
  const auto [plan, made] = cache.find_or_make(problem, device_at(device));
  if (made && print_plans()) std::fprintf(stderr, "pointfuse: %s\n", text_of(problem, plan).c_str());
  serve_if(plan.kernel != Kernel::kNone, plan.refusal ? plan.refusal : "there is no plan");
  return plan;
}

void throw_if(cudaError_t error, const std::string& from) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report it again
  throw std::runtime_error(std::string("pointfuse: ") + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) +
                           ") from " + from);
}

void launch(const Plan& plan, const Problem& problem, Operands& operands, int32_t device) {
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    const int64_t stride = 1;
    workspace = allocate(1, &plan.workspace_bytes, &stride, aoti_torch_dtype_uint8(), device);
    operands.workspace = workspace->mutable_data_ptr();
  }
  const cudaError_t error = run(plan, problem, operands, current_stream(device));
  if (error != cudaSuccess) throw_if(error, text_of(problem, plan));
}

// An output for the problem, laid out by PyTorch's rule, which it becomes y of.
Tensor allocate_output(Problem& p, Operands& operands, const Image& x, const Image& weight, const Config& config,
                       int32_t dtype, int32_t device) {
  const int64_t sizes[] = {p.batch, p.c_out, p.out_height(), p.out_width()};
  int64_t strides[4];
  dense_strides(sizes, config.channels_last() || x.channels_last() || weight.channels_last(), strides);
  Tensor y = allocate(4, sizes, strides, dtype, device);
  operands.y = y.mutable_data_ptr();
  p.y = {strides[0], strides[1], strides[2], strides[3]}, p.y_alignment = alignment_of(operands.y);
  return y;
}

void put_bias(Problem& p, Operands& operands, const OptionalTensor& bias, const Config& config, int32_t device) {
  if (!bias) return;
  p.bias = true, operands.bias_dtype = dtype_of(*bias);
  serve_if(operands.bias_dtype == p.dtype || config.frozen(), "bias must have the dtype of x");
  operands.bias = channels_of(bias, p.c_out, device, operands.bias_dtype);
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
  put_bias(p, operands, bias, config, device);
  if (mean) {
    p.batch_norm = true, operands.norm_dtype = dtype_of(*mean);
    serve_if(operands.norm_dtype == dtype || operands.norm_dtype == DType::kFloat32,
             "batch norm must be of the dtype of x or float32");
    serve_if(var.has_value(), "batch norm needs running_var beside running_mean");
    operands.mean = channels_of(mean, p.c_out, device, operands.norm_dtype);
    operands.var = channels_of(var, p.c_out, device, operands.norm_dtype);
    operands.gamma = channels_of(gamma, p.c_out, device, operands.norm_dtype);
    operands.beta = channels_of(beta, p.c_out, device, operands.norm_dtype);
  }
  operands.eps = static_cast<float>(eps), operands.negative_slope = static_cast<float>(negative_slope);

  const DeviceGuard guard(device);
  Tensor y = allocate_output(p, operands, x_image, weight_image, config, dtype_code(x), device);
  if (p.batch == 0) return y;
  launch(plan_for(p, device), p, operands, device);
  return y;
}

// ---- Training

Tensor allocate_floats(std::initializer_list<int64_t> sizes, int32_t device) {
  int64_t strides[3] = {1, 1, 1};
  const auto rank = static_cast<int64_t>(sizes.size());
  for (int64_t i = rank - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes.begin()[i];
  return allocate(rank, sizes.begin(), strides, aoti_torch_dtype_float32(), device);
}

// What an operator returns in the place of a tensor that there is none of.
Tensor absent(int32_t device) { return allocate_floats({0}, device); }

float* floats_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// A convolution with its channels' statistics, ready to be launched.
struct Convolution {
  int32_t device;
  Problem problem{};
  Operands operands{};
  Plan plan{};
  std::optional<Tensor> y, parts;

  Convolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Config& config)
      : device(x.get_device_index()) {
    const DType dtype = dtype_of(x);
    const Image x_image(x, device, dtype), weight_image(weight, device, dtype);
    problem = problem_of(x_image, weight_image, dtype, config);
    problem.activation = Activation::kIdentity, problem.statistics = true;
    operands.x = x_image.data, operands.weight = weight_image.data;
    put_bias(problem, operands, bias, config, device);
    y = allocate_output(problem, operands, x_image, weight_image, config, dtype_code(x), device);
    const bool empty = problem.batch == 0;
    if (!empty) plan = plan_for(problem, device);
    parts = allocate_floats({empty ? 0 : statistics_parts(plan, problem), 3, problem.c_out}, device);
    operands.parts = floats_of(*parts);
  }
};

// y, and the parts of each channel's statistics. There is no way without them: another plan could round y otherwise.
std::tuple<Tensor, Tensor> conv_statistics(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           int64_t config_bits) {
  const DeviceGuard guard(x.get_device_index());
  Convolution convolution(x, weight, bias, Config(config_bits));
  if (convolution.problem.batch > 0)
    launch(convolution.plan, convolution.problem, convolution.operands, convolution.device);
  return {*convolution.y, *convolution.parts};
}

// A dense tensor without gaps, in one of the two formats; strides of dimensions of one element say nothing.
bool is_dense(const Image& image, bool channels_last) {
  int64_t strides[4];
  dense_strides(image.sizes, channels_last, strides);
  for (int i = 0; i < 4; ++i) {
    if (image.sizes[i] != 1 && image.strides[i] != strides[i]) return false;
  }
  return true;
}

// The tensors of a pass over y, [batch, channels, height, width], as they come from PyTorch.
class PassOperands {
 public:
  PassOperands(const Tensor& y, int64_t config_bits, double negative_slope)
      : y_(y), device_(y.get_device_index()), dtype_(dtype_of(y)), image_(y, device_, dtype_) {
    const int64_t* sizes = image_.sizes;
    const int64_t batch = sizes[0], channels = sizes[1], plane = sizes[2] * sizes[3];
    channels_last_ = channels > 1 && is_dense(image_, true);
    serve_if(channels_last_ || is_dense(image_, false), "y is neither contiguous nor channels_last");
    serve_if(batch > 0 && channels > 0 && plane > 0, "y is empty");
    serve_if(channels <= INT32_MAX && plane <= INT32_MAX, "y has more than 2^31 - 1 channels, or pixels of a plane");
    pass.dtype = dtype_;
    pass.outer = channels_last_ ? batch * plane : batch;
    pass.channels = channels;
    pass.inner = channels_last_ ? 1 : plane;
    pass.alignment = alignment_of(image_.data);
    pass.y = image_.data;
    const Config config(config_bits);
    pass.activation = config.activation(), pass.residual_order = config.residual();
    pass.negative_slope = static_cast<float>(negative_slope);
  }

  int32_t device() const { return device_; }
  int32_t multiprocessors() const { return device_at(device_).multiprocessors; }

  // The address of a tensor that lies as y does.
  const void* like_y(const Tensor& tensor) {
    const Image image(tensor, device_, dtype_);
    serve_if(std::equal(image_.sizes, image_.sizes + 4, image.sizes), "grad_out and residual must have the shape of y");
    serve_if(is_dense(image, channels_last_), "grad_out and residual must lie as y does");
    pass.alignment = std::min(pass.alignment, alignment_of(image.data));
    return image.data;
  }

  Tensor allocate_like_y() {
    Tensor tensor = allocate(4, image_.sizes, image_.strides, dtype_code(y_), device_);
    pass.alignment = std::min(pass.alignment, alignment_of(tensor.const_data_ptr()));
    return tensor;
  }

  const float* floats(const OptionalTensor& tensor) const {
    return static_cast<const float*>(channels_of(tensor, pass.channels, device_, DType::kFloat32));
  }

  // Of y's dtype or fp32.
  training::Channels<const void*> numbers(const OptionalTensor& tensor) const {
    if (!tensor) return {};
    const DType dtype = dtype_of(*tensor);
    serve_if(dtype == dtype_ || dtype == DType::kFloat32, "batch norm must be of the dtype of x or float32");
    return {channels_of(tensor, pass.channels, device_, dtype), dtype};
  }
  training::Channels<void*> mutable_numbers(const OptionalTensor& tensor) const {
    const auto [values, dtype] = numbers(tensor);
    return {values ? tensor->mutable_data_ptr() : nullptr, dtype};
  }

  // Tensors [count, fields, channels] of fp32. Many are merged first, to memory that lives as long as this does.
  template <class Merge>
  training::Parts parts(const Tensor& tensor, int64_t fields, Merge merge) {
    serve_if(is_on(tensor, device_), "all tensors must be on one device");
    serve_if(dtype_of(tensor) == DType::kFloat32, "parts must be float32");
    serve_if(tensor.dim() == 3 && tensor.size(0) > 0 && tensor.size(0) <= INT32_MAX && tensor.size(1) == fields &&
                 tensor.size(2) == pass.channels && tensor.is_contiguous(),
             "parts must be contiguous, [count, fields, channels]");
    training::Parts parts{static_cast<const float*>(tensor.const_data_ptr()), static_cast<int32_t>(tensor.size(0))};
    if (parts.count <= training::kFewParts) return parts;
    merged_ = allocate_floats({1, fields, pass.channels}, device_);
    throw_if(merge(parts, pass.channels, floats_of(*merged_), current_stream(device_)), "merging parts");
    return {floats_of(*merged_), 1};
  }

  // For messages.
  std::string text() const {
    const int64_t* sizes = image_.sizes;
    return " over " + std::to_string(sizes[0]) + "x" + std::to_string(sizes[1]) + "x" + std::to_string(sizes[2]) + "x" +
           std::to_string(sizes[3]);
  }

  training::Pass pass{};

 private:
  const Tensor& y_;
  int32_t device_;
  DType dtype_;
  Image image_;
  bool channels_last_;
  std::optional<Tensor> merged_;
};

// What all passes over y with given statistics read.
void put_norm(PassOperands& operands, const Tensor& mean, const Tensor& rstd, const OptionalTensor& gamma,
              const OptionalTensor& beta) {
  operands.pass.mean = operands.floats(mean), operands.pass.rstd = operands.floats(rstd);
  operands.pass.gamma = operands.numbers(gamma), operands.pass.beta = operands.numbers(beta);
}

// The residual takes part where it was added before the activation.
void put_residual_before(PassOperands& operands, const OptionalTensor& residual) {
  if (residual && operands.pass.residual_order == Residual::kAddAct)
    operands.pass.residual = operands.like_y(*residual);
}

// out, mean, rstd; the last two absent where they were given.
std::tuple<Tensor, Tensor, Tensor> normalise(const Tensor& y, const OptionalTensor& parts, const OptionalTensor& mean,
                                             const OptionalTensor& rstd, const OptionalTensor& gamma,
                                             const OptionalTensor& beta, const OptionalTensor& residual,
                                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                             double momentum, double eps, int64_t config_bits, double negative_slope) {
  PassOperands operands(y, config_bits, negative_slope);
  const int32_t device = operands.device();
  training::Normalise operation{};
  operands.pass.gamma = operands.numbers(gamma), operands.pass.beta = operands.numbers(beta);
  if (residual) operands.pass.residual = operands.like_y(*residual);

  const DeviceGuard guard(device);
  cudaSetDevice(device);
  Tensor out = operands.allocate_like_y(), new_mean = absent(device), new_rstd = absent(device);
  if (parts) {
    operation.running_mean = operands.mutable_numbers(running_mean);
    operation.running_var = operands.mutable_numbers(running_var);
    operation.parts = operands.parts(*parts, 3, training::merge_moments);
    new_mean = allocate_floats({operands.pass.channels}, device);
    new_rstd = allocate_floats({operands.pass.channels}, device);
    operation.mean = floats_of(new_mean), operation.rstd = floats_of(new_rstd);
  } else {
    serve_if(mean && rstd, "without parts there must be mean and rstd");
    operands.pass.mean = operands.floats(mean), operands.pass.rstd = operands.floats(rstd);
  }
  operation.momentum = static_cast<float>(momentum), operation.eps = static_cast<float>(eps);
  operation.out = out.mutable_data_ptr(), operation.pass = operands.pass;
  throw_if(training::normalise(operation, operands.multiprocessors(), current_stream(device)),
           "normalise" + operands.text());
  return {out, new_mean, new_rstd};
}

// out, y, mean, rstd: the convolution and normalise, in one launch where the chip holds all of y at once.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                                   const OptionalTensor& residual, const OptionalTensor& running_mean,
                                                   const OptionalTensor& running_var, double momentum, double eps,
                                                   int64_t config_bits, double negative_slope) {
  const DeviceGuard guard(x.get_device_index());
  Convolution convolution(x, weight, bias, Config(config_bits));
  const int32_t device = convolution.device;
  serve_if(convolution.problem.batch > 0, "y is empty");
  PassOperands operands(*convolution.y, config_bits, negative_slope);
  if (residual) operands.pass.residual = operands.like_y(*residual);
  const auto in_two_launches = [&]() -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    launch(convolution.plan, convolution.problem, convolution.operands, device);
    const auto [out, mean, rstd] = normalise(*convolution.y, convolution.parts, {}, {}, gamma, beta, residual,
                                             running_mean, running_var, momentum, eps, config_bits, negative_slope);
    return {out, *convolution.y, mean, rstd};
  };
  // One launch reads the residual by TMA.
  if (operands.pass.alignment < 16 || cooperative_refusal(convolution.problem, convolution.plan, device_at(device)))
    return in_two_launches();
  const training::Channels<const void*> scale = operands.numbers(gamma), shift = operands.numbers(beta);
  const training::Channels<void*> moving_mean = operands.mutable_numbers(running_mean),
                                  moving_var = operands.mutable_numbers(running_var);
  Tensor out = operands.allocate_like_y();
  Tensor mean = allocate_floats({operands.pass.channels}, device),
         rstd = allocate_floats({operands.pass.channels}, device);
  Tensor arrived = allocate_floats({1}, device);
  Forward operation{};
  operation.out = out.mutable_data_ptr(), operation.residual = operands.pass.residual;
  operation.residual_order = operands.pass.residual_order, operation.activation = operands.pass.activation;
  operation.negative_slope = operands.pass.negative_slope;
  operation.momentum = static_cast<float>(momentum), operation.eps = static_cast<float>(eps);
  operation.gamma = scale.values, operation.gamma_dtype = scale.dtype;
  operation.beta = shift.values, operation.beta_dtype = shift.dtype;
  operation.running_mean = moving_mean.values, operation.running_mean_dtype = moving_mean.dtype;
  operation.running_var = moving_var.values, operation.running_var_dtype = moving_var.dtype;
  operation.mean = floats_of(mean), operation.rstd = floats_of(rstd);
  operation.arrived = static_cast<uint32_t*>(arrived.mutable_data_ptr());
  const cudaStream_t stream = current_stream(device);
  throw_if(cudaMemsetAsync(operation.arrived, 0, sizeof(uint32_t), stream), "a training forward");
  const cudaError_t error = run_forward(convolution.plan, convolution.problem, convolution.operands, operation, stream);
  if (error == cudaErrorCooperativeLaunchTooLarge) {  // part of the device is another process's
    cudaGetLastError();
    return in_two_launches();
  }
  if (error != cudaSuccess) throw_if(error, text_of(convolution.problem, convolution.plan));
  return {out, *convolution.y, mean, rstd};
}

Tensor sums(const Tensor& grad_out, const Tensor& y, const Tensor& mean, const Tensor& rstd,
            const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& residual,
            int64_t config_bits, double negative_slope) {
  PassOperands operands(y, config_bits, negative_slope);
  const int32_t device = operands.device(), multiprocessors = operands.multiprocessors();
  put_norm(operands, mean, rstd, gamma, beta);
  put_residual_before(operands, residual);
  training::Sums operation{};
  operation.grad_out = operands.like_y(grad_out), operation.pass = operands.pass;

  const DeviceGuard guard(device);
  cudaSetDevice(device);
  Tensor parts =
      allocate_floats({training::sums_parts(operation.pass, multiprocessors), 2, operation.pass.channels}, device);
  operation.parts = floats_of(parts);
  throw_if(training::sums(operation, multiprocessors, current_stream(device)), "sums" + operands.text());
  return parts;
}

// dy, d_residual, d_gamma, d_beta.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const Tensor& grad_out, const Tensor& y, const Tensor& mean,
                                                     const Tensor& rstd, const OptionalTensor& gamma,
                                                     const OptionalTensor& beta, const OptionalTensor& residual,
                                                     const OptionalTensor& parts, int64_t count, bool want_residual,
                                                     int64_t config_bits, double negative_slope) {
  PassOperands operands(y, config_bits, negative_slope);
  const int32_t device = operands.device();
  put_norm(operands, mean, rstd, gamma, beta);
  put_residual_before(operands, residual);
  training::Gradients operation{};
  operation.grad_out = operands.like_y(grad_out);

  const DeviceGuard guard(device);
  cudaSetDevice(device);
  Tensor dy = operands.allocate_like_y(), d_residual = absent(device);
  Tensor d_gamma = absent(device), d_beta = absent(device);
  operation.dy = dy.mutable_data_ptr();
  if (want_residual && operands.pass.residual_order == Residual::kAddAct) {
    d_residual = operands.allocate_like_y();
    operation.d_residual = d_residual.mutable_data_ptr();
  }
  if (parts) {
    serve_if(count > 0, "count must be positive");
    operation.parts = operands.parts(*parts, 2, training::merge_sums);
    operation.elements = static_cast<float>(count);
    d_gamma = allocate_floats({operands.pass.channels}, device);
    d_beta = allocate_floats({operands.pass.channels}, device);
    operation.d_gamma = floats_of(d_gamma), operation.d_beta = floats_of(d_beta);
  }
  operation.pass = operands.pass;
  throw_if(training::gradients(operation, operands.multiprocessors(), current_stream(device)),
           "gradients" + operands.text());
  return {dy, d_residual, d_gamma, d_beta};
}

}  // namespace
}  // namespace pointfuse

// Why these kernels cannot run on this machine; empty where they can. Called from Python by ctypes, before any tensor.
extern "C" __attribute__((visibility("default"))) const char* pointfuse_unusable_reason() {
  static const std::string reason = pointfuse::no_gpu_reason();
  return reason.c_str();
}

// Must be INTERFACE of backends/cuda.py.
extern "C" __attribute__((visibility("default"))) int pointfuse_interface() { return 2; }

STABLE_TORCH_LIBRARY_IMPL(pointfuse, POINTFUSE_DISPATCH_KEY, m) {
  m.impl("_conv_bn_act_cuda", TORCH_BOX(&pointfuse::conv_bn_act));
  m.impl("_conv_statistics_cuda", TORCH_BOX(&pointfuse::conv_statistics));
  m.impl("_forward_cuda", TORCH_BOX(&pointfuse::forward));
  m.impl("_normalise_cuda", TORCH_BOX(&pointfuse::normalise));
  m.impl("_sums_cuda", TORCH_BOX(&pointfuse::sums));
  m.impl("_gradients_cuda", TORCH_BOX(&pointfuse::gradients));
}
