// A training forward in one launch, on sm_90: conv_sm90.cuh's blocks, all resident at once with a tile each, leave y
// and the parts of their statistics, wait for one another, and go on from the sums in their registers to the output.
#pragma once

#include "conv_sm90.cuh"
#include "training.cuh"

namespace pointfuse::sm90 {

struct ForwardArguments {
  Arguments conv;  // its problem has the unit's activation and residual
  TensorMap out;
  Forward forward;
};

template <class T, int kTileIndex>
struct ForwardBlock : ConvBlock<T, kTileIndex, false> {
  using Base = ConvBlock<T, kTileIndex, false>;
  using Place = typename Base::Place;
  using Moments = training::Moments;
  static constexpr int kBlockChannels = Base::kBlockChannels;
  static constexpr int kConsumerThreads = Base::kConsumers * 128;
  static constexpr int kRanges = kConsumerThreads / kBlockChannels;  // that a channel's parts are merged in
  static_assert(kRanges == 2, "two threads a channel");

  const TensorMap& out;
  const Forward& forward;

  __device__ __forceinline__ explicit ForwardBlock(const ForwardArguments& arguments)
      : Base(arguments.conv), out(arguments.out), forward(arguments.forward) {}

  __device__ __forceinline__ static void sync_consumers() { named_sync(Base::kConsumersBarrier, kConsumerThreads); }

  // What the kernel needs of a channel after the blocks have met. Over the ring, which nothing uses any more.
  struct Norm {
    float mean, scale, beta;
  };
  __device__ __forceinline__ Moments* halves() const { return reinterpret_cast<Moments*>(this->shared); }
  __device__ __forceinline__ Norm* channel_norms() const {
    return reinterpret_cast<Norm*>(halves() + kConsumerThreads);
  }
  static_assert(kConsumerThreads * sizeof(Moments) + kBlockChannels * sizeof(Norm) <= Base::kTile.ring_bytes(), "");

  // fill(z, chunk, buffer) makes a chunk's numbers, with the residual in the buffer if there is one.
  template <class Fill>
  __device__ __forceinline__ void store_chunks(const TensorMap* map, TileStart start, bool residual, Place place,
                                               Fill&& fill) const {
#pragma unroll
    for (int chunk = 0; chunk < Base::kChunks; ++chunk) {
      char* target = this->buffer(place.consumer, chunk % Base::kBuffers);
      if (residual) {
        barrier_wait(this->residual_arrived(place.consumer, chunk % Base::kBuffers), chunk / Base::kBuffers % 2);
      } else {
        if (place.thread() == 0) tensor_store_wait_read<Base::kBuffers - 1>();
        place.sync();
      }
      float z[Base::kChunkSums];
      fill(z, chunk, target);
      this->write_chunk(z, target, place);
      fence_async_proxy();
      place.sync();
      if (place.thread() != 0) continue;
      this->store_chunk(map, start, chunk, place);
      if (residual && chunk + Base::kBuffers < Base::kChunks) {
        tensor_store_wait_read<0>();
        this->load_residual(start, chunk + Base::kBuffers, place);
      }
    }
  }

  __device__ __forceinline__ void store_y(const float (&sums)[Base::kSums], TileStart start, Place place) const {
    store_chunks(&this->args.y, start, false, place, [&](auto& z, int chunk, char*) {
#pragma unroll
      for (int i = 0; i < Base::kChunkSums; ++i) z[i] = sums[chunk * Base::kChunkSums + i];
    });
  }

  // Each block merges the parts of its own channels: two ranges of them, each in the order of its index.
  __device__ __forceinline__ void merge_parts(TileStart start, Place place) const {
    const int thread = place.consumer * 128 + place.thread(), range = thread / kBlockChannels;
    const int64_t channel = start.channel + thread % kBlockChannels, channels = this->problem().c_out;
    const int parts = static_cast<int>(this->plan().pixel_tiles);
    Moments merged;
    if (channel < channels) {
      const int first = parts * range / kRanges, end = parts * (range + 1) / kRanges;
      const float* fields = this->args.operands.parts + int64_t{first} * Moments::kFields * channels + channel;
#pragma unroll 8
      for (int i = first; i < end; ++i, fields += Moments::kFields * channels)
        merged.merge(Moments::load(fields, channels));
    }
    halves()[thread] = merged;
    sync_consumers();
    if (range == 0 && channel < channels) {
      merged.merge(halves()[thread + kBlockChannels]);
      finish_statistics(merged, thread, channel, start.pixel == 0);
    }
    sync_consumers();
  }

  __device__ __forceinline__ void finish_statistics(const Moments& moments, int index, int64_t channel,
                                                    bool keep) const {
    const float rstd = 1.0f / sqrt_rn(moments.m2 / moments.elements + forward.eps);
    const float gamma = forward.gamma ? load_channel(forward.gamma, forward.gamma_dtype, channel) : 1.0f;
    const float beta = forward.beta ? load_channel(forward.beta, forward.beta_dtype, channel) : 0.0f;
    channel_norms()[index] = {moments.mean, rstd * gamma, beta};
    if (!keep) return;
    store_global(forward.mean + channel, moments.mean);
    store_global(forward.rstd + channel, rstd);
    training::move_towards({forward.running_mean, forward.running_mean_dtype}, channel, moments.mean, forward.momentum);
    training::move_towards({forward.running_var, forward.running_var_dtype}, channel,
                           moments.m2 / (moments.elements - 1.0f), forward.momentum);
  }

  __device__ __forceinline__ void store_out(const float (&sums)[Base::kSums], TileStart start, Place place) const {
    const Norm* norm = channel_norms() + place.consumer * kWarpgroupChannels + place.channel();
    const Norm low = norm[0], high = norm[8];
    const Residual order = this->problem().residual;
    store_chunks(&out, start, order != Residual::kNone, place, [&](auto& z, int chunk, char* residual) {
#pragma unroll
      for (int i = 0; i < Base::kChunkSums; ++i) {
        const Norm channel = i % 4 < 2 ? low : high;
        z[i] = fma(sums[chunk * Base::kChunkSums + i] - channel.mean, channel.scale, channel.beta);
      }
      if (order == Residual::kAddAct) this->add_chunk(z, residual, place);
      this->activate_all(z);
      if (order == Residual::kActAdd) this->add_chunk(z, residual, place);
    });
  }

  __device__ __forceinline__ void consume() const {
    const int warp = warp_index();
    const Place place{warp / 4 - 1, warp % 4, lane_index()};
    const int64_t tile = blockIdx.x;
    const TileStart start = decode_tile(this->plan(), tile);
    RingPosition ring;
    float sums[Base::kSums];
    this->load_norms(start, place);
    this->multiply(sums, ring, place);
    place.sync();  // the biases are there
    const ScaleShift* bias = this->norms() + place.consumer * kWarpgroupChannels + place.channel();
    const float low_bias = bias[0].shift, high_bias = bias[8].shift;
    this->write_statistics(sums, tile, start, low_bias, high_bias, place);
    // From here on y, as it is read back by those who have it from memory.
#pragma unroll
    for (int i = 0; i < Base::kSums; ++i)
      sums[i] = to_float(from_float<T>(sums[i] + (i % 4 < 2 ? low_bias : high_bias)));
    store_y(sums, start, place);
    this->load_first_residuals(start, place);

    sync_consumers();
    if (place.consumer == 0 && place.thread() == 0)
      grid_barrier(forward.arrived, static_cast<uint32_t>(this->plan().grid));
    sync_consumers();
    merge_parts(start, place);
    store_out(sums, start, place);
    if (place.thread() == 0) tensor_store_wait<0>();
  }
};

template <class T, int kTileIndex>
__global__ void __launch_bounds__(kTiles[kTileIndex].threads(), kTiles[kTileIndex].blocks_per_multiprocessor)
    forward(const __grid_constant__ ForwardArguments args) {
  using Block = ForwardBlock<T, kTileIndex>;
  const Block block(args);
  if (thread_index() == 0) block.init_barriers();
  block_sync();
  if (warp_index() < 4) {
    registers_decrease<Block::kProducerRegisters>();
    block.produce();
  } else {
    registers_increase<Block::kConsumerRegisters>();
    block.consume();
  }
}

template <class T, int kTileIndex = 0>
cudaError_t launch_forward(const ForwardArguments& args, cudaStream_t stream) {
  if constexpr (kTileIndex < kTileCount) {
    const Plan& plan = args.conv.plan;
    if (plan.tile != kTileIndex) return launch_forward<T, kTileIndex + 1>(args, stream);
    constexpr Tile kTile = kTiles[kTileIndex];
    const LaunchConfig config{plan.grid, kTile.threads(), kTile.shared_bytes(), 1, false, true};
    return launch(config, stream, forward<T, kTileIndex>, args);
  } else {
    return cudaErrorInvalidValue;
  }
}

}  // namespace pointfuse::sm90
