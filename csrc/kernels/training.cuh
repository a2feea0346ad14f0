// The kernels of training.h: normalise, sums, gradients. One shape serves both layouts: threads walk over vectors that
// belong to channels of their own, whose numbers they keep in registers. Every sum has one order: no atomics.
#pragma once

#include "epilogue.cuh"
#include "training.h"

namespace pointfuse::training {

// ---- Parts

// A channel's elements so far: how many, their mean, the sum of their squared distances from it.
struct Moments {
  static constexpr int kFields = 3;
  float elements = 0.0f, mean = 0.0f, m2 = 0.0f;

  // T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample
  // variances", 1979.
  __device__ __forceinline__ void merge(const Moments& other) {
    const float total = elements + other.elements, apart = other.mean - mean;
    // Without branches, so that the loads of parts to come go ahead. The square may overflow where it counts nothing.
    const float share = elements == 0.0f ? 1.0f : divide_fast(other.elements, total);
    const bool both = elements != 0.0f && other.elements != 0.0f;
    m2 += other.m2 + (both ? apart * apart * (elements * share) : 0.0f);
    mean += apart * share;
    elements = total;
  }

  static __device__ __forceinline__ Moments load(const float* fields, int64_t channels) {
    return {load_global(fields), load_global(fields + channels), load_global(fields + 2 * channels)};
  }
  __device__ __forceinline__ void store(float* fields, int64_t channels) const {
    store_global(fields, elements);
    store_global(fields + channels, mean);
    store_global(fields + 2 * channels, m2);
  }
};

struct DzSums {
  static constexpr int kFields = 2;
  float dz = 0.0f, dzx = 0.0f;

  __device__ __forceinline__ void merge(const DzSums& other) {
    dz += other.dz;
    dzx += other.dzx;
  }

  static __device__ __forceinline__ DzSums load(const float* fields, int64_t channels) {
    return {load_global(fields), load_global(fields + channels)};
  }
  __device__ __forceinline__ void store(float* fields, int64_t channels) const {
    store_global(fields, dz);
    store_global(fields + channels, dzx);
  }
};

// The merged parts of channel first_channel + thread, in threads below `width`, a power of two; every thread of the
// block comes here. `scratch` holds a Part a thread. The order depends on the sizes alone: ranges of parts, each in the
// order of their index, then neighbouring ranges.
template <class Part, int kBlockThreads>
__device__ __forceinline__ Part merge_parts(const Parts& parts, int64_t channels, int64_t first_channel, int width,
                                            Part* scratch) {
  constexpr int kAhead = 4;  // parts whose loads are under way at once
  const int thread = thread_index(), range = thread / width;
  const int64_t channel = first_channel + thread % width;
  int ranges = kBlockThreads / width;
  while (ranges > parts.count) ranges /= 2;
  Part merged;
  if (range < ranges && channel < channels) {
    const int share = (parts.count - 1) / ranges + 1, first = range * share;
    const int end = first + share < parts.count ? first + share : parts.count;
    const float* fields = parts.values + int64_t(first) * Part::kFields * channels + channel;
    const int64_t next = Part::kFields * channels;
#pragma unroll 1
    for (int i = first; i < end; i += kAhead, fields += kAhead * next) {
      Part ahead[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i + j < end) ahead[j] = Part::load(fields + j * next, channels);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) merged.merge(ahead[j]);
    }
  }
  for (int step = 1; step < ranges; step *= 2) {
    scratch[thread] = merged;
    block_sync();
    if (range % (2 * step) == 0 && range + step < ranges) merged.merge(scratch[thread + step * width]);
    block_sync();
  }
  return merged;
}

constexpr int kMergeThreads = 512, kMergeWidth = 8;

// The second bound leaves the registers that loads under way need.
template <class Part>
__global__ void __launch_bounds__(kMergeThreads, 1) merge(Parts parts, int64_t channels, float* merged) {
  grid_dependency_wait();
  grid_dependency_launch();
  const int64_t first_channel = int64_t(blockIdx.x) * kMergeWidth, channel = first_channel + thread_index();
  auto* scratch = reinterpret_cast<Part*>(shared_memory());
  const Part part = merge_parts<Part, kMergeThreads>(parts, channels, first_channel, kMergeWidth, scratch);
  if (thread_index() < kMergeWidth && channel < channels) part.store(merged + channel, channels);
}

// ---- A thread's vectors

// Vectors that a thread has in hand, as storage.
template <class T, int kVector, int kGroup>
struct Group {
  Vector<T, kVector> vectors[kGroup] = {};

  __device__ __forceinline__ void load(const void* tensor, const int64_t (&places)[kGroup]) {
    using Bits = decltype(vectors[0].bits);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (places[i] >= 0)
        vectors[i].bits = load_global(reinterpret_cast<const Bits*>(static_cast<const T*>(tensor) + places[i]));
  }
  __device__ __forceinline__ void store(void* tensor, const int64_t (&places)[kGroup]) const {
    using Bits = decltype(vectors[0].bits);
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (places[i] >= 0) store_global(reinterpret_cast<Bits*>(static_cast<T*>(tensor) + places[i]), vectors[i].bits);
  }
  __device__ __forceinline__ float get(int i, int j) const { return to_float(vectors[i].numbers[j]); }
  __device__ __forceinline__ void set(int i, int j, float value) { vectors[i].numbers[j] = from_float<T>(value); }
};

// Where a thread's vectors lie, as the cut has it; T is the tensors' dtype.
template <class T, int kVector, bool kChannelsLast>
class Walk {
 public:
  static constexpr int kChannels = kChannelsLast ? kVector : 1;  // of a thread
  static constexpr int kGroup = group_of(kVector, sizeof(T));
  using Numbers = Group<T, kVector, kGroup>;

  __device__ __forceinline__ Walk(const Pass& pass, const Cut& cut)
      : cut_(cut), pitch_(pass.channels * pass.inner), row_(pass.inner) {
    const int tile = int(blockIdx.x) % cut.tiles, rows = kThreads / cut.columns;
    slice_ = int(blockIdx.x) / cut.tiles;
    first_channel_ = int64_t(tile) * width();
    const int64_t channel = first_channel_ + first_own();
    length_ = channel < pass.channels ? cut.length : 0;
    position_ = int64_t(slice_) * rows + thread_index() / cut.columns;
    inner_ = kChannelsLast ? 0 : int(position_ % cut.row_length);
    const int64_t outer = kChannelsLast ? position_ : position_ / cut.row_length;
    place_ = outer * pitch_ + channel * row_ + inner_ * kVector;
    step_ = cut.step_outer * pitch_ + int64_t(cut.step_inner) * kVector;
  }

  // Of the block's channels: the first, how many there are room for, and of those this thread's first.
  __device__ __forceinline__ int64_t first_channel() const { return first_channel_; }
  __device__ __forceinline__ int width() const { return cut_.columns * kChannels; }
  __device__ __forceinline__ int first_own() const { return thread_index() % cut_.columns * kChannels; }
  __device__ __forceinline__ int slice() const { return slice_; }

  __device__ __forceinline__ bool done() const { return position_ >= length_; }

  // The next vectors, in elements from the tensor's start; negative where there is none.
  __device__ __forceinline__ void next(int64_t (&places)[kGroup]) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      places[i] = done() ? -1 : place_;
      position_ += int64_t(cut_.slices) * (kThreads / cut_.columns);
      place_ += step_;
      if (kChannelsLast) continue;
      inner_ += cut_.step_inner;
      if (inner_ >= cut_.row_length) inner_ -= cut_.row_length, place_ += pitch_ - row_;
    }
  }

 private:
  const Cut& cut_;
  int64_t pitch_, row_, first_channel_, length_, position_, place_, step_;
  int slice_, inner_;
};

// ---- A block's channels

// The numbers of a block's channels in shared memory, fields of `width` side by side, on their way to the threads.
struct Shelf {
  static constexpr int kFields = 5, kWidth = 64;
  float* values;
  int width;

  __device__ __forceinline__ void put(int field, float value) const { values[field * width + thread_index()] = value; }

  template <int kChannels>
  __device__ __forceinline__ void take(int field, int first, float (&own)[kChannels]) const {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) own[i] = values[field * width + first + i];
  }
};

constexpr int kWarps = kThreads / 32;
// A part a thread, or in `sums` two sums a warp and channel; then the shelf.
constexpr int kScratchFloats = std::max(kThreads * Moments::kFields, kWarps * 2 * Shelf::kWidth);
constexpr int kSharedBytes = (kScratchFloats + Shelf::kFields * Shelf::kWidth) * int(sizeof(float));

__device__ __forceinline__ float* scratch_memory() { return reinterpret_cast<float*>(shared_memory()); }
__device__ __forceinline__ Shelf shelf_of(int width) { return {scratch_memory() + kScratchFloats, width}; }

__device__ __forceinline__ float channel_or(const Channels<const void*>& channels, int64_t channel, float otherwise) {
  return channels.values ? load_channel(channels.values, channels.dtype, channel) : otherwise;
}

// z = (y - mean) * scale + beta, with scale = rstd * gamma, for a thread's channels.
template <int kChannels>
struct Norm {
  static constexpr int kFields = 3;
  float mean[kChannels], scale[kChannels], beta[kChannels];

  static __device__ __forceinline__ void put(const Shelf& shelf, const Pass& pass, int64_t channel, float mean,
                                             float rstd) {
    shelf.put(0, mean);
    shelf.put(1, rstd * channel_or(pass.gamma, channel, 1.0f));
    shelf.put(2, channel_or(pass.beta, channel, 0.0f));
  }
  __device__ __forceinline__ void take(const Shelf& shelf, int first) {
    shelf.take(0, first, mean);
    shelf.take(1, first, scale);
    shelf.take(2, first, beta);
  }
};

// grad_out times the activation's derivative at z. The comparisons are PyTorch's, for NaN too.
template <Activation kActivation>
__device__ __forceinline__ float backward_of(float z, float grad, float slope) {
  switch (kActivation) {
    case Activation::kLeakyRelu:
      return z > 0.0f ? grad : grad * slope;
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : grad;
    case Activation::kRelu6:
      return z <= 0.0f || z >= 6.0f ? 0.0f : grad;
    case Activation::kSilu: {
      const float s = divide_fast(1.0f, 1.0f + exp_fast(-z));
      return grad * s * (1.0f + z * (1.0f - s));
    }
    default:
      return grad;
  }
}

// ---- Normalise

// A running statistic takes a step towards the batch's.
__device__ __forceinline__ void move_towards(const Channels<void*>& running, int64_t channel, float value,
                                             float momentum) {
  if (!running.values) return;
  const float moved = load_channel(running.values, running.dtype, channel) * (1.0f - momentum) + momentum * value;
  switch (running.dtype) {
    case DType::kFloat16:
      return store_global(static_cast<half_t*>(running.values) + channel, from_float<half_t>(moved));
    case DType::kBFloat16:
      return store_global(static_cast<bfloat16_t*>(running.values) + channel, from_float<bfloat16_t>(moved));
    default:
      return store_global(static_cast<float*>(running.values) + channel, moved);
  }
}

template <class T, int kVector, bool kChannelsLast>
struct NormaliseKernel {
  static constexpr int kResident = kResidentForward;
  using Vectors = Walk<T, kVector, kChannelsLast>;

  static __device__ __forceinline__ void run(const Normalise& op, const Cut& cut) {
    Vectors walk(op.pass, cut);
    grid_dependency_wait();
    const Norm<Vectors::kChannels> norm = norms(op, walk);
    grid_dependency_launch();
    with_activation(op.pass.activation, [&](auto activation) { write<decltype(activation)::value>(op, norm, walk); });
  }

 private:
  static __device__ __forceinline__ Norm<Vectors::kChannels> norms(const Normalise& op, const Vectors& walk) {
    const Shelf shelf = shelf_of(walk.width());
    Moments moments;
    if (op.parts.values)
      moments = merge_parts<Moments, kThreads>(op.parts, op.pass.channels, walk.first_channel(), walk.width(),
                                               reinterpret_cast<Moments*>(scratch_memory()));
    const int64_t channel = walk.first_channel() + thread_index();
    if (thread_index() < walk.width() && channel < op.pass.channels) {
      float mean, rstd;
      if (op.parts.values) {
        mean = moments.mean;
        rstd = 1.0f / sqrt_rn(moments.m2 / moments.elements + op.eps);
        if (walk.slice() == 0) keep(op, channel, moments, rstd);
      } else {
        mean = load_global(op.pass.mean + channel), rstd = load_global(op.pass.rstd + channel);
      }
      Norm<1>::put(shelf, op.pass, channel, mean, rstd);
    }
    block_sync();
    Norm<Vectors::kChannels> norm;
    norm.take(shelf, walk.first_own());
    return norm;
  }

  static __device__ __forceinline__ void keep(const Normalise& op, int64_t channel, const Moments& moments,
                                              float rstd) {
    store_global(op.mean + channel, moments.mean);
    store_global(op.rstd + channel, rstd);
    move_towards(op.running_mean, channel, moments.mean, op.momentum);
    move_towards(op.running_var, channel, moments.m2 / (moments.elements - 1.0f), op.momentum);
  }

  template <Activation kActivation>
  static __device__ __forceinline__ void write(const Normalise& op, const Norm<Vectors::kChannels>& norm,
                                               Vectors& walk) {
    const Pass& pass = op.pass;
    const bool add_before = pass.residual && pass.residual_order == Residual::kAddAct;
    const bool add_after = pass.residual && pass.residual_order == Residual::kActAdd;
    while (!walk.done()) {
      int64_t places[Vectors::kGroup];
      walk.next(places);
      typename Vectors::Numbers y, residual, out;
      y.load(pass.y, places);
      if (pass.residual) residual.load(pass.residual, places);
#pragma unroll
      for (int i = 0; i < Vectors::kGroup; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int c = j % Vectors::kChannels;
          float z = fma(y.get(i, j) - norm.mean[c], norm.scale[c], norm.beta[c]);
          if (add_before) z += residual.get(i, j);
          z = activate<kActivation>(z, pass.negative_slope);
          if (add_after) z += residual.get(i, j);
          out.set(i, j, z);
        }
      }
      out.store(op.out, places);
    }
  }
};

// ---- Backward

// dz of a thread's vectors, from y, grad_out and where it was added before the activation the residual.
template <class T, int kVector, bool kChannelsLast>
struct Upstream {
  using Vectors = Walk<T, kVector, kChannelsLast>;
  typename Vectors::Numbers y, grad, residual;

  __device__ __forceinline__ void load(const Pass& pass, const void* grad_out,
                                       const int64_t (&places)[Vectors::kGroup]) {
    y.load(pass.y, places);
    grad.load(grad_out, places);
    if (pass.residual) residual.load(pass.residual, places);
  }

  template <Activation kActivation>
  __device__ __forceinline__ float dz(const Pass& pass, const Norm<Vectors::kChannels>& norm, int i, int j) const {
    const int c = j % Vectors::kChannels;
    float z = fma(centred(norm, i, j), norm.scale[c], norm.beta[c]);
    if (pass.residual) z += residual.get(i, j);
    return backward_of<kActivation>(z, grad.get(i, j), pass.negative_slope);
  }

  __device__ __forceinline__ float centred(const Norm<Vectors::kChannels>& norm, int i, int j) const {
    return y.get(i, j) - norm.mean[j % Vectors::kChannels];
  }
};

template <class T, int kVector, bool kChannelsLast>
struct SumsKernel {
  static constexpr int kResident = kResidentBackward;
  using Vectors = Walk<T, kVector, kChannelsLast>;
  static constexpr int kChannels = Vectors::kChannels;

  static __device__ __forceinline__ void run(const Sums& op, const Cut& cut) {
    Vectors walk(op.pass, cut);
    grid_dependency_wait();
    grid_dependency_launch();
    const Norm<kChannels> norm = norms(op.pass, walk);
    float sums[2 * kChannels] = {};
    with_activation(op.pass.activation,
                    [&](auto activation) { add_up<decltype(activation)::value>(op, norm, walk, sums); });
    leave(op, cut, walk, sums);
  }

 private:
  static __device__ __forceinline__ Norm<kChannels> norms(const Pass& pass, const Vectors& walk) {
    const Shelf shelf = shelf_of(walk.width());
    const int64_t channel = walk.first_channel() + thread_index();
    if (thread_index() < walk.width() && channel < pass.channels)
      Norm<1>::put(shelf, pass, channel, load_global(pass.mean + channel), load_global(pass.rstd + channel));
    block_sync();
    Norm<kChannels> norm;
    norm.take(shelf, walk.first_own());
    return norm;
  }

  // Sums of dz and of dz * (y - mean), for each channel.
  template <Activation kActivation>
  static __device__ __forceinline__ void add_up(const Sums& op, const Norm<kChannels>& norm, Vectors& walk,
                                                float (&sums)[2 * kChannels]) {
    while (!walk.done()) {
      int64_t places[Vectors::kGroup];
      walk.next(places);
      Upstream<T, kVector, kChannelsLast> upstream;
      upstream.load(op.pass, op.grad_out, places);
#pragma unroll
      for (int i = 0; i < Vectors::kGroup; ++i) {
        if (places[i] < 0) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int c = j % kChannels;
          const float dz = upstream.template dz<kActivation>(op.pass, norm, i, j);
          sums[c] += dz;
          sums[kChannels + c] = fma(dz, upstream.centred(norm, i, j), sums[kChannels + c]);
        }
      }
    }
  }

  // Adds up over the lanes of one column, then over the warps.
  static __device__ __forceinline__ void leave(const Sums& op, const Cut& cut, const Vectors& walk,
                                               float (&sums)[2 * kChannels]) {
    const int width = walk.width(), thread = thread_index();
    for (int mask = 16; mask >= cut.columns; mask /= 2) {
#pragma unroll
      for (int i = 0; i < 2 * kChannels; ++i) sums[i] += shuffle_xor(sums[i], mask);
    }
    float* scratch = scratch_memory();
    if (lane_index() < cut.columns) {
#pragma unroll
      for (int i = 0; i < 2 * kChannels; ++i)
        scratch[(warp_index() * 2 + i / kChannels) * width + walk.first_own() + i % kChannels] = sums[i];
    }
    block_sync();
    const int64_t channel = walk.first_channel() + thread % width;
    const int field = thread / width;
    if (field >= 2 || channel >= op.pass.channels) return;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += scratch[(warp * 2 + field) * width + thread % width];
    if (field == 1) sum *= load_global(op.pass.rstd + channel);
    store_global(op.parts + (int64_t(walk.slice()) * 2 + field) * op.pass.channels + channel, sum);
  }
};

template <class T, int kVector, bool kChannelsLast>
struct GradientsKernel {
  static constexpr int kResident = kResidentBackward;
  using Vectors = Walk<T, kVector, kChannelsLast>;
  static constexpr int kChannels = Vectors::kChannels;

  static __device__ __forceinline__ void run(const Gradients& op, const Cut& cut) {
    Vectors walk(op.pass, cut);
    grid_dependency_wait();
    const Centre centre = centres(op, walk);
    grid_dependency_launch();
    with_activation(op.pass.activation, [&](auto activation) { write<decltype(activation)::value>(op, centre, walk); });
  }

 private:
  // dy = scale * (dz - mean_dz - (y - mean) * tilt), with tilt = rstd * sum_dzx / N.
  struct Centre {
    Norm<kChannels> norm;
    float mean_dz[kChannels], tilt[kChannels];
  };

  static __device__ __forceinline__ Centre centres(const Gradients& op, const Vectors& walk) {
    const Shelf shelf = shelf_of(walk.width());
    DzSums sums;
    if (op.parts.values)
      sums = merge_parts<DzSums, kThreads>(op.parts, op.pass.channels, walk.first_channel(), walk.width(),
                                           reinterpret_cast<DzSums*>(scratch_memory()));
    const int64_t channel = walk.first_channel() + thread_index();
    if (thread_index() < walk.width() && channel < op.pass.channels) {
      const float rstd = load_global(op.pass.rstd + channel);
      Norm<1>::put(shelf, op.pass, channel, load_global(op.pass.mean + channel), rstd);
      shelf.put(3, sums.dz / op.elements);
      shelf.put(4, rstd * (sums.dzx / op.elements));
      if (op.parts.values && walk.slice() == 0) {
        store_global(op.d_beta + channel, sums.dz);
        store_global(op.d_gamma + channel, sums.dzx);
      }
    }
    block_sync();
    Centre centre;
    centre.norm.take(shelf, walk.first_own());
    shelf.take(3, walk.first_own(), centre.mean_dz);
    shelf.take(4, walk.first_own(), centre.tilt);
    return centre;
  }

  template <Activation kActivation>
  static __device__ __forceinline__ void write(const Gradients& op, const Centre& centre, Vectors& walk) {
    const bool batch_statistics = op.parts.values;
    while (!walk.done()) {
      int64_t places[Vectors::kGroup];
      walk.next(places);
      Upstream<T, kVector, kChannelsLast> upstream;
      upstream.load(op.pass, op.grad_out, places);
      typename Vectors::Numbers dy, d_residual;
#pragma unroll
      for (int i = 0; i < Vectors::kGroup; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const int c = j % kChannels;
          const float dz = upstream.template dz<kActivation>(op.pass, centre.norm, i, j);
          d_residual.set(i, j, dz);
          float centred = dz;
          // Not by zeros: an infinite y would make them NaN.
          if (batch_statistics)
            centred = fma(-upstream.centred(centre.norm, i, j), centre.tilt[c], dz - centre.mean_dz[c]);
          dy.set(i, j, centre.norm.scale[c] * centred);
        }
      }
      dy.store(op.dy, places);
      if (op.d_residual) d_residual.store(op.d_residual, places);
    }
  }
};

// ---- Launches

template <class Kernel, class Operation>
__global__ void __launch_bounds__(kThreads, Kernel::kResident)
    pass_over(const __grid_constant__ Operation operation, const __grid_constant__ Cut cut) {
  Kernel::run(operation, cut);
}

template <class Kernel, class Operation>
cudaError_t launch_pass(const Operation& operation, const Cut& cut, cudaStream_t stream) {
  const LaunchConfig config{int64_t{cut.tiles} * cut.slices, kThreads, kSharedBytes, 1, true};
  return launch(config, stream, pass_over<Kernel, Operation>, operation, cut);
}

// The kernel for the operation's layout and the widest vectors that it allows.
template <class T, template <class, int, bool> class Kernel, class Operation>
cudaError_t dispatch(const Operation& operation, int32_t multiprocessors, cudaStream_t stream) {
  constexpr int kFull = 16 / sizeof(T), kHalf = sizeof(T) == 2 ? 4 : 1;
  const Cut cut = make_cut(operation.pass, multiprocessors, Kernel<T, 1, false>::kResident);
  if (operation.pass.inner == 1) {
    if (cut.vector == kFull) return launch_pass<Kernel<T, kFull, true>>(operation, cut, stream);
    return launch_pass<Kernel<T, 1, true>>(operation, cut, stream);
  }
  if (cut.vector == kFull) return launch_pass<Kernel<T, kFull, false>>(operation, cut, stream);
  if (cut.vector == kHalf) return launch_pass<Kernel<T, kHalf, false>>(operation, cut, stream);
  return launch_pass<Kernel<T, 1, false>>(operation, cut, stream);
}

}  // namespace pointfuse::training
