// A convolution unit as plain data: what is computed (Problem) and where its tensors lie (Operands).
//
//   z = gamma * (conv(x, weight) + bias - mean) / sqrt(var + eps) + beta
//   y = act(z)    or    act(z + residual)    or    act(z) + residual
//
// x [batch, c_in, height, width], weight [c_out, c_in, kernel_h, kernel_w], y and residual
// [batch, c_out, out_height, out_width], all with strides of their own, in elements; everything else is [c_out].
#pragma once

#include <cstdint>

// Functions that the planner (host) and the kernels (device) share.
#if defined(__CUDACC__)
#define POINTFUSE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define POINTFUSE_HOST_DEVICE inline
#endif

namespace pointfuse {

// Half-precision numbers as storage; atoms.cuh converts them.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };
enum class Activation : int32_t { kIdentity, kLeakyRelu, kRelu, kRelu6, kSilu };
enum class Residual : int32_t { kNone, kAddAct, kActAdd };

constexpr int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Distance in elements between neighbours along each dimension: of [batch, channel, height, width], or for the weight
// [c_out, c_in, kernel_h, kernel_w].
struct Strides {
  int64_t outer, channel, height, width;
};

struct Problem {
  int64_t batch, c_in, height, width, c_out;
  int32_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  DType dtype;
  // Of fp32 alone: whether products may be rounded to TF32, as torch's setting for convolutions says.
  bool tf32;
  Strides x, weight, y, residual_strides;
  // The largest power of two, at most 16, that divides each tensor's address in bytes.
  int32_t x_alignment, weight_alignment, y_alignment, residual_alignment;
  bool bias, batch_norm;
  Activation activation;
  Residual residual;
  // The weight is not written while kernels that read it may run (a frozen model): it may be read ahead of the
  // preceding kernel's end.
  bool constant_weight;
  // Training: y is conv(x, weight) + bias alone, and each channel's mean and spread go to Operands::parts.
  bool statistics;

  POINTFUSE_HOST_DEVICE int64_t out_height() const { return (height + 2 * padding_h - kernel_h) / stride_h + 1; }
  POINTFUSE_HOST_DEVICE int64_t out_width() const { return (width + 2 * padding_w - kernel_w) / stride_w + 1; }
  POINTFUSE_HOST_DEVICE int64_t pixels() const { return batch * out_height() * out_width(); }
  POINTFUSE_HOST_DEVICE int32_t taps() const { return kernel_h * kernel_w; }
};

struct Operands {
  const void* x;
  const void* weight;
  void* y;
  const void* residual;
  // Per output channel; null where absent. bias has bias_dtype, the four of batch norm have norm_dtype.
  const void* bias;
  const void* mean;
  const void* var;
  const void* gamma;
  const void* beta;
  DType bias_dtype, norm_dtype;
  float eps, negative_slope;
  // plan.workspace_bytes of device memory, 16-byte aligned; null where the plan needs none.
  void* workspace;
  // With Problem::statistics, [statistics_parts][3][c_out]: of each tile of pixels how many they are, their mean, and
  // the sum of the squared distances from it, of conv(x, weight) + bias before rounding. Null otherwise.
  float* parts;
};

// What a training forward does with the statistics, where one launch does it all: out = act(z) of the batch's norm,
// with a residual as in the problem of inference. out and residual are as y is: strides, dtype, alignment.
struct Forward {
  void* out;
  const void* residual;
  Residual residual_order;
  Activation activation;
  float negative_slope, momentum, eps;
  // Per output channel. Null where absent: gamma and beta, and the running statistics, which move towards the batch's.
  const void* gamma;
  const void* beta;
  void* running_mean;
  void* running_var;
  DType gamma_dtype, beta_dtype, running_mean_dtype, running_var_dtype;
  float* mean;
  float* rstd;
  // The blocks that have left their parts: zero before the launch.
  uint32_t* arrived;
};

}  // namespace pointfuse
