// What follows the convolution, in fp32: batch norm as scale and shift, residual, activation, and the way to memory.
#pragma once

#include "atoms.cuh"
#include "schedule.h"

namespace pointfuse {

struct ScaleShift {
  float scale, shift;
};

__device__ __forceinline__ float load_channel(const void* values, DType dtype, int64_t channel) {
  switch (dtype) {
    case DType::kFloat16:
      return to_float(static_cast<const half_t*>(values)[channel]);
    case DType::kBFloat16:
      return to_float(static_cast<const bfloat16_t*>(values)[channel]);
    default:
      return static_cast<const float*>(values)[channel];
  }
}

// z = sum * scale + shift for one output channel: bias and batch norm from the tensors as they are now.
__device__ __forceinline__ ScaleShift scale_shift(const Operands& operands, int64_t channel) {
  float shift = operands.bias ? load_channel(operands.bias, operands.bias_dtype, channel) : 0.0f;
  if (!operands.mean) return {1.0f, shift};
  const DType dtype = operands.norm_dtype;
  float scale = 1.0f / sqrt_rn(load_channel(operands.var, dtype, channel) + operands.eps);
  if (operands.gamma) scale *= load_channel(operands.gamma, dtype, channel);
  shift = (shift - load_channel(operands.mean, dtype, channel)) * scale;
  if (operands.beta) shift += load_channel(operands.beta, dtype, channel);
  return {scale, shift};
}

// The comparisons are written so that NaN passes through, as it does in PyTorch.
template <Activation kActivation>
__device__ __forceinline__ float activate(float z, float slope) {
  switch (kActivation) {
    case Activation::kLeakyRelu:
      return z > 0.0f ? z : z * slope;
    case Activation::kRelu:
      return z < 0.0f ? 0.0f : z;
    case Activation::kRelu6:
      return z < 0.0f ? 0.0f : (z > 6.0f ? 6.0f : z);
    case Activation::kSilu:
      return divide_fast(z, 1.0f + exp_fast(-z));
    default:
      return z;
  }
}

template <Activation kActivation, Residual kResidual>
__device__ __forceinline__ float finish(float sum, ScaleShift norm, float residual, float slope) {
  const float z = fma(sum, norm.scale, norm.shift);
  if (kResidual == Residual::kAddAct) return activate<kActivation>(z + residual, slope);
  if (kResidual == Residual::kActAdd) return activate<kActivation>(z, slope) + residual;
  return activate<kActivation>(z, slope);
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// Calls `body` with the activation as a constant, so that the choice is made once and not for every element.
template <class Body>
__device__ __forceinline__ void with_activation(Activation activation, Body&& body) {
  switch (activation) {
    case Activation::kLeakyRelu:
      return body(ActivationTag<Activation::kLeakyRelu>{});
    case Activation::kRelu:
      return body(ActivationTag<Activation::kRelu>{});
    case Activation::kRelu6:
      return body(ActivationTag<Activation::kRelu6>{});
    case Activation::kSilu:
      return body(ActivationTag<Activation::kSilu>{});
    default:
      return body(ActivationTag<Activation::kIdentity>{});
  }
}

// ---- A block's outputs on their way to memory: from fp32 in shared memory to vectors along whichever dimension of y
// is contiguous, so that every layout is one path.

// Where a pixel lies in y and in the residual, in elements from channel 0; filled by a thread for each pixel.
struct OutputPixel {
  int64_t y, residual;
};

__device__ __forceinline__ OutputPixel output_pixel(const Problem& problem, int64_t p) {
  const Pixel pixel = decode_pixel(problem, p);
  return {element_offset(problem.y, pixel.n, 0, pixel.h, pixel.w),
          element_offset(problem.residual_strides, pixel.n, 0, pixel.h, pixel.w)};
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
  using type = uint16_t;
};
template <>
struct BitsOf<4> {
  using type = uint32_t;
};
template <>
struct BitsOf<8> {
  using type = uint2;
};
template <>
struct BitsOf<16> {
  using type = uint4;
};

// kCount numbers that lie side by side in memory.
template <class T, int kCount>
union Vector {
  typename BitsOf<kCount * sizeof(T)>::type bits;
  T numbers[kCount];
};

template <int kCount>
__device__ __forceinline__ void load_outputs(float* z, const float* shared) {
  constexpr int kOnce = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int i = 0; i < kCount; i += kOnce) {
    Vector<float, kOnce> vector;
    vector.bits = *reinterpret_cast<const decltype(vector.bits)*>(shared + i);
#pragma unroll
    for (int j = 0; j < kOnce; ++j) z[i + j] = vector.numbers[j];
  }
}

// A block's outputs z, before residual and activation, in shared memory: rows along y's contiguous dimension.
template <int kBlockChannels, int kBlockPixels, int kPadding>
struct OutputTile {
  float* values;
  const OutputPixel* pixels;
  bool pixel_major;
  int channels_inside, pixels_inside;  // how many of the tile's lie in y

  __device__ __forceinline__ int inner_size() const { return pixel_major ? kBlockPixels : kBlockChannels; }
  __device__ __forceinline__ int outer_size() const { return pixel_major ? kBlockChannels : kBlockPixels; }
  __device__ __forceinline__ int pitch() const { return inner_size() + kPadding; }
  __device__ __forceinline__ float& at(int channel, int pixel) const {
    const int channel_pitch = pixel_major ? kBlockPixels + kPadding : 1;
    const int pixel_pitch = pixel_major ? 1 : kBlockChannels + kPadding;
    return values[channel * channel_pitch + pixel * pixel_pitch];
  }
};

// The statistics of an output tile for training: the part of each channel over the tile's pixels that lie in y. Two
// threads a channel, every other four pixels each. `part` is [3][c_out] from the tile's first channel on.
template <int kBlockChannels, int kThreads, class Tile>
__device__ __forceinline__ void write_statistics(const Tile& tile, float* part, int64_t c_out, int thread) {
  static_assert(kThreads == 2 * kBlockChannels, "two threads a channel, in one warp");
  const int lane = thread % 32, channel = thread / 32 * 16 + lane % 16;
  // Lanes whose channels share their banks begin with different ones of four pixels.
  const int rotation = tile.pixel_major ? lane / 8 : 0;
  const auto add_up = [&](auto term) {
    float sums[4] = {};
#pragma unroll 1
    for (int first = lane / 16 * 4; first < tile.pixels_inside; first += 8) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pixel = first + (i + rotation) % 4;
        if (pixel < tile.pixels_inside) sums[i] += term(tile.at(channel, pixel));
      }
    }
    const float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return sum + shuffle_xor(sum, 16);
  };
  const auto count = static_cast<float>(tile.pixels_inside);
  const float mean = divide_fast(add_up([](float value) { return value; }), count);
  const float m2 = add_up([mean](float value) { return (value - mean) * (value - mean); });
  if (channel >= tile.channels_inside || lane >= 16) return;
  store_global(part + channel, count);
  store_global(part + c_out + channel, mean);
  store_global(part + 2 * c_out + channel, m2);
}

// Residual, activation, rounding and store, by kThreads threads in vectors of kVector numbers; a thread has a group of
// vectors, 16 bytes of y, in hand at a time, and the next group's residual on its way. `y` and `residual` point at the
// tile's first channel; without a residual the latter is null.
template <class T, int kVector, int kThreads, class Tile>
class TileStore {
  static constexpr int kNumbers = 16 / sizeof(T), kGroup = kNumbers / kVector;

 public:
  __device__ __forceinline__ TileStore(const Tile& tile, const Problem& problem, T* y, const T* residual, float slope,
                                       int thread)
      : tile_(tile), problem_(problem), y_(y), residual_(residual), slope_(slope) {
    const int threads_inner = tile.inner_size() / kVector;
    inner_ = thread % threads_inner * kVector;
    first_outer_ = thread / threads_inner;
    outer_step_ = kThreads / threads_inner;
  }

  __device__ __forceinline__ void run() {
    Vector<T, kVector> residual[kGroup] = {};
    load_residual(residual, first_outer_);
#pragma unroll 1
    for (int outer = first_outer_; outer < tile_.outer_size(); outer += kGroup * outer_step_) {
      float z[kNumbers], r[kNumbers];
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) r[i] = to_float(residual[i / kVector].numbers[i % kVector]);
      load_residual(residual, outer + kGroup * outer_step_);
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        load_outputs<kVector>(z + i * kVector, tile_.values + (outer + i * outer_step_) * tile_.pitch() + inner_);
      finish(z, r);
      store(z, outer);
    }
  }

 private:
  struct Place {
    int channel, pixel;
    bool inside;
  };

  __device__ __forceinline__ Place place(int outer) const {
    const int channel = tile_.pixel_major ? outer : inner_, pixel = tile_.pixel_major ? inner_ : outer;
    return {channel, pixel, channel < tile_.channels_inside && pixel < tile_.pixels_inside};
  }

  __device__ __forceinline__ void load_residual(Vector<T, kVector> (&residual)[kGroup], int outer) const {
    if (!residual_) return;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Place at = place(outer + i * outer_step_);
      if (!at.inside) continue;
      const T* source = residual_ + tile_.pixels[at.pixel].residual + at.channel * problem_.residual_strides.channel;
      residual[i].bits = load_global(reinterpret_cast<const decltype(residual[i].bits)*>(source));
    }
  }

  // The choices are made once for all numbers.
  __device__ __forceinline__ void finish(float (&z)[kNumbers], const float (&residual)[kNumbers]) const {
    if (problem_.residual == Residual::kAddAct) add(z, residual);
    with_activation(problem_.activation, [&](auto activation) {
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) z[i] = activate<decltype(activation)::value>(z[i], slope_);
    });
    if (problem_.residual == Residual::kActAdd) add(z, residual);
  }

  static __device__ __forceinline__ void add(float (&z)[kNumbers], const float (&residual)[kNumbers]) {
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) z[i] += residual[i];
  }

  __device__ __forceinline__ void store(const float (&z)[kNumbers], int outer) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Place at = place(outer + i * outer_step_);
      Vector<T, kVector> vector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) vector.numbers[j] = from_float<T>(z[i * kVector + j]);
      T* target = y_ + tile_.pixels[at.pixel].y + at.channel * problem_.y.channel;
      if (at.inside) store_global(reinterpret_cast<decltype(vector.bits)*>(target), vector.bits);
    }
  }

  const Tile& tile_;
  const Problem& problem_;
  T* y_;
  const T* residual_;
  float slope_;
  int inner_, first_outer_, outer_step_;
};

// Stores vectors of `vector_bytes`, which divide every address in y and in the residual and never cross an edge.
template <class T, int kThreads, class Tile>
__device__ __forceinline__ void store_tile(const Tile& tile, const Problem& problem, const Operands& operands,
                                           int64_t first_channel, int vector_bytes, int thread) {
  T* y = static_cast<T*>(operands.y) + first_channel * problem.y.channel;
  const T* residual = nullptr;
  if (problem.residual != Residual::kNone)
    residual = static_cast<const T*>(operands.residual) + first_channel * problem.residual_strides.channel;
  const float slope = operands.negative_slope;
  switch (vector_bytes) {
    case 16:
      return TileStore<T, 16 / sizeof(T), kThreads, Tile>(tile, problem, y, residual, slope, thread).run();
    case 8:
      return TileStore<T, 8 / sizeof(T), kThreads, Tile>(tile, problem, y, residual, slope, thread).run();
    case 4:
      if (sizeof(T) < 4)
        return TileStore<T, 4 / sizeof(T), kThreads, Tile>(tile, problem, y, residual, slope, thread).run();
      [[fallthrough]];
    default:
      return TileStore<T, 1, kThreads, Tile>(tile, problem, y, residual, slope, thread).run();
  }
}

}  // namespace pointfuse
