// Training's passes over the convolution's output y as plain data, and their launches. N is a channel's elements.
//
//   z = (y - mean) * rstd * gamma + beta                                             x_hat = (y - mean) * rstd
//   out = act(z)            or  act(z + residual)             or  act(z) + residual
//   dz = grad_out * act'(z) or  grad_out * act'(z + residual)
//   sum_dz = sum of dz          sum_dzx = sum of dz * x_hat                          over the N elements of a channel
//   dy = gamma * rstd * (dz - sum_dz / N - x_hat * sum_dzx / N)
//
// Everything is computed in fp32. Functions neither allocate nor synchronise; no tensor may be empty.
#pragma once

#include <algorithm>

#include "atoms.cuh"

namespace pointfuse::training {

// One number a channel; null where absent.
template <class Pointer>
struct Channels {
  Pointer values;
  DType dtype;
};

// What every pass reads. y and all tensors of its shape are dense [outer, channels, inner]: in NCHW inner is the plane,
// in channels_last it is 1.
struct Pass {
  DType dtype;
  int64_t outer, channels, inner;
  int32_t alignment;  // the largest power of two, at most 16, that divides the address of each of those tensors
  const void* y;
  const void* residual;  // null where absent
  const float* mean;
  const float* rstd;
  Channels<const void*> gamma, beta;
  Activation activation;
  Residual residual_order;  // backward passes read the residual where it is kAddAct
  float negative_slope;
};

// Per-channel numbers that parts of the tensor contribute to: [count, fields, channels]. Null where absent.
struct Parts {
  const float* values;
  int32_t count;
};

struct Normalise {
  Pass pass;    // its mean and rstd are read where there are no parts
  Parts parts;  // fields: elements, mean, sum of squared distances from that mean
  void* out;
  // With parts: written, and the running statistics moved towards them, where not null.
  float* mean;
  float* rstd;
  Channels<void*> running_mean, running_var;
  float momentum, eps;
};

struct Sums {
  Pass pass;
  const void* grad_out;
  float* parts;  // [sums_parts(pass), 2, channels]: sum_dz and sum_dzx
};

struct Gradients {
  Pass pass;
  const void* grad_out;
  Parts parts;     // as Sums gives them; absent where the statistics are not the batch's: dy is gamma * rstd * dz
  float elements;  // N
  void* dy;
  // Null where unwanted: dz, and with parts sum_dzx and sum_dz.
  void* d_residual;
  float* d_gamma;
  float* d_beta;
};

// A pass reads each channel's parts once a block: more than these are better merged first.
constexpr int32_t kFewParts = 32;

cudaError_t merge_moments(const Parts& parts, int64_t channels, float* merged, cudaStream_t stream);
cudaError_t merge_sums(const Parts& parts, int64_t channels, float* merged, cudaStream_t stream);
cudaError_t normalise(const Normalise& operation, int32_t multiprocessors, cudaStream_t stream);
cudaError_t sums(const Sums& operation, int32_t multiprocessors, cudaStream_t stream);
cudaError_t gradients(const Gradients& operation, int32_t multiprocessors, cudaStream_t stream);

// ---- How a pass is cut into blocks

constexpr int kThreads = 256;
// Blocks that a multiprocessor holds at once, which bounds a thread's registers.
constexpr int kResidentForward = 3, kResidentBackward = 2;

// A block has `columns` vectors side by side (in channels_last, each of channels of its own; in NCHW one, of one
// channel) and, of the vectors that follow each of them along its channels, every `slices`-th row of them.
struct Cut {
  int32_t vector;      // numbers in a vector
  int32_t columns;     // a power of two
  int32_t row_length;  // vectors of a channel in an inner row
  int32_t tiles;       // of columns, over all channels
  int32_t slices;
  int64_t length;  // vectors of a channel
  // From one of a thread's vectors to the next: inner rows, and vectors beyond them.
  int64_t step_outer;
  int32_t step_inner;
};

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Numbers in the widest vector whose size divides the addresses and whose count divides the contiguous dimension.
constexpr int32_t vector_of(const Pass& pass) {
  const bool channels_last = pass.inner == 1;
  const int32_t bytes = element_bytes(pass.dtype);
  const int64_t contiguous = channels_last ? pass.channels : pass.inner;
  for (const int32_t vector_bytes : {16, 8}) {
    if (vector_bytes == 8 && (channels_last || bytes == 4)) continue;  // there are no kernels for these
    const int32_t vector = vector_bytes / bytes;
    if (pass.alignment >= vector_bytes && contiguous % vector == 0) return vector;
  }
  return 1;
}

// Vectors that a thread has in hand at a time: at least 16 bytes of each tensor, for enough loads to be under way.
constexpr int group_of(int vector, int bytes) { return vector * bytes == 16 ? 2 : 16 / (vector * bytes); }

inline Cut make_cut(const Pass& pass, int32_t multiprocessors, int resident) {
  const bool channels_last = pass.inner == 1;
  Cut cut{};
  cut.vector = vector_of(pass);
  cut.columns = 1;
  int64_t vectors = pass.channels;
  if (channels_last) {
    // Lines of 128 bytes of a pixel: wider tiles would leave too few blocks, or have each read more parts.
    const int limit = cut.vector > 1 ? 8 : 32;
    vectors = pass.channels / cut.vector;
    while (cut.columns < limit && cut.columns < vectors) cut.columns *= 2;
  }
  cut.row_length = channels_last ? 1 : static_cast<int32_t>(pass.inner / cut.vector);
  cut.length = pass.outer * cut.row_length;
  cut.tiles = static_cast<int32_t>(ceil_divide(vectors, cut.columns));
  // One wave of blocks, or where the tiles alone are nearly that many, four: either leaves little of the chip idle.
  const int64_t at_once = int64_t{multiprocessors} * resident;
  const int64_t wanted = cut.tiles <= at_once / 4 ? at_once / cut.tiles : ceil_divide(4 * at_once, cut.tiles);
  const int64_t rows = kThreads / cut.columns,
                most = ceil_divide(cut.length, rows * group_of(cut.vector, element_bytes(pass.dtype)));
  cut.slices = static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, most));
  cut.step_outer = cut.slices * rows / cut.row_length;
  cut.step_inner = static_cast<int32_t>(cut.slices * rows % cut.row_length);
  return cut;
}

inline int32_t sums_parts(const Pass& pass, int32_t multiprocessors) {
  return make_cut(pass, multiprocessors, kResidentBackward).slices;
}

}  // namespace pointfuse::training
