// A problem and its plan in one line, for people.
#pragma once

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "schedule.h"

// Lets the compiler check the arguments against the format.
#if defined(__GNUC__)
#define POINTFUSE_PRINTF __attribute__((format(printf, 2, 3)))
#else
#define POINTFUSE_PRINTF
#endif

namespace pointfuse {
namespace description {

inline const char* dtype_name(const Problem& p) {
  if (p.dtype == DType::kFloat16) return "float16";
  if (p.dtype == DType::kBFloat16) return "bfloat16";
  return p.tf32 ? "float32 by TF32" : "float32";
}

inline const char* activation_name(Activation activation) {
  switch (activation) {
    case Activation::kLeakyRelu:
      return "leaky_relu";
    case Activation::kRelu:
      return "relu";
    case Activation::kRelu6:
      return "relu6";
    case Activation::kSilu:
      return "silu";
    default:
      return "identity";
  }
}

// Appends to a buffer and counts, as snprintf does, what a long enough buffer would have held.
struct Text {
  char* buffer;
  int size, length;

  POINTFUSE_PRINTF void add(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const bool room = length < size;
    const int more = std::vsnprintf(room ? buffer + length : nullptr, room ? size - length : 0, format, arguments);
    va_end(arguments);
    if (more > 0) length += more;
  }
};

inline void add_problem(Text& text, const Problem& p) {
  text.add("%" PRId32 "x%" PRId32 " %" PRId64 "->%" PRId64, p.kernel_h, p.kernel_w, p.c_in, p.c_out);
  if (p.stride_h != 1 || p.stride_w != 1) text.add(" stride %" PRId32 "x%" PRId32, p.stride_h, p.stride_w);
  if (p.padding_h != 0 || p.padding_w != 0) text.add(" padding %" PRId32 "x%" PRId32, p.padding_h, p.padding_w);
  text.add(" of %" PRId64 "x%" PRId64 "x%" PRId64 "x%" PRId64 " %s%s%s %s", p.batch, p.c_in, p.height, p.width,
           dtype_name(p), p.bias ? ", bias" : "", p.batch_norm ? ", batch norm" : "", activation_name(p.activation));
  if (p.statistics) text.add(", statistics");
  if (p.residual != Residual::kNone) text.add(p.residual == Residual::kAddAct ? " (z + residual)" : " (z) + residual");
}

inline void add_strides(Text& text, const char* name, const Strides& s, int32_t alignment) {
  text.add("%s (%" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64 ") at %" PRId32, name, s.outer, s.channel, s.height,
           s.width, alignment);
}

inline void add_refusal(Text& text, const Problem& p, const char* reason) {
  text.add(": no plan: %s; strides and alignment: ", reason);
  add_strides(text, "x", p.x, p.x_alignment);
  add_strides(text, ", weight", p.weight, p.weight_alignment);
  add_strides(text, ", y", p.y, p.y_alignment);
  if (p.residual != Residual::kNone) add_strides(text, ", residual", p.residual_strides, p.residual_alignment);
}

inline void add_plan(Text& text, const Plan& plan) {
  const bool sm90 = plan.kernel == Kernel::kSm90;
  text.add(": %s tile %" PRId32 "x%" PRId32 "x%" PRId32 ", %" PRId32 " stages", sm90 ? "sm_90" : "sm_80",
           plan.block_channels, plan.block_pixels, plan.block_k, plan.stages);
  if (plan.split_k > 1) text.add(", K split by %" PRId32 "%s", plan.split_k, sm90 ? " in a cluster" : "");
  text.add(", grid %" PRId64 " of %" PRId32 " threads, %" PRId32 " B shared", plan.grid, plan.threads,
           plan.shared_bytes);
  if (plan.workspace_bytes > 0) text.add(", %" PRId64 " B workspace", plan.workspace_bytes);
  if (sm90) {
    text.add(", x %s, y %s", plan.x_pixel_major ? "by planes" : "by pixels",
             plan.tensor_store ? "by TMA" : "by element");
  } else {
    text.add(", x %s by %" PRId32 " B, weight by %" PRId32 " B, y %s by %" PRId32 " B",
             plan.x_pixel_major ? "along pixels" : "along channels", plan.x_vector, plan.weight_vector,
             plan.y_pixel_major ? "along pixels" : "along channels", plan.y_vector);
  }
  text.add("; predicted %.1f us, floor %.1f us", static_cast<double>(plan.predicted_us),
           static_cast<double>(plan.floor_us));
}

}  // namespace description

// Writes at most `size` characters with the final zero and returns, as snprintf does, the whole text's length.
inline int describe(const Problem& problem, const Plan& plan, char* buffer, int size) {
  description::Text text{buffer, size, 0};
  description::add_problem(text, problem);
  if (plan.refusal) {
    description::add_refusal(text, problem, plan.refusal);
  } else {
    description::add_plan(text, plan);
  }
  return text.length;
}

}  // namespace pointfuse
