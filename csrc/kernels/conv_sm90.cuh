// The convolution unit on sm_90: y = act(scale * conv(x, weight) + shift + residual), an implicit GEMM
//
//   D[channels, pixels] = sum over k steps of weight[channels, step] x[pixels, step]^T,   k step = (tap, c_in block)
//
// by persistent blocks. A producer thread streams the operand tiles through a ring of shared memory by TMA, tile after
// tile, so that loads go on during epilogues; each consumer warpgroup multiplies 64 channels by all pixels of the tile
// (wgmma), keeps fp32 sums in registers and finishes them. With split-K the blocks of a cluster share a tile: each sums
// a range of k steps, and each finishes a slice of the pixels from all blocks' sums, read through distributed shared
// memory in rank order.
//
// x comes as rows of channels, one to a pixel (channels_last: by TMA's im2col mode unless a pixel is simply a row), or
// as planes (NCHW, kPixelMajor; 1x1 alone), and then the tiles of pixels stay inside a plane.
#pragma once

#include <utility>

#include "atoms.cuh"
#include "epilogue.cuh"
#include "schedule.h"
#include "tile_sm90.h"

namespace pointfuse::sm90 {

struct Arguments {
  TensorMap weight;       // (c_in, tap, c_out)
  TensorMap x;            // (c_in, pixel), or im2col (c_in, w, h, n), or kPixelMajor (pixel, c_in, n)
  TensorMap y, residual;  // (c_out, pixel), or kPixelMajor (pixel, c_out, n)
  Problem problem;
  Plan plan;
  Operands operands;
  // Divisions that the host does once.
  int32_t steps;
  int64_t tiles, tile_stride;
  bool im2col;
  int64_t plane_pixels;             // in a plane of the tile scheduler: an image, or the whole batch
  int64_t y_pitch, residual_pitch;  // elements from pixel to pixel where they do not move by TMA
};

// A stage of the ring, and the parity of the turn that it is in.
struct RingPosition {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

// One block's work; a view of its arguments and its shared memory.
template <class T, int kTileIndex, bool kPixelMajor>
struct ConvBlock {
  static constexpr Tile kTile = kTiles[kTileIndex];
  static constexpr int kBlockChannels = kTile.block_channels;
  static constexpr int kBlockPixels = kTile.block_pixels;
  static constexpr int kBlockK = kRowBytes / sizeof(T);
  static constexpr int kStages = kTile.stages;
  static constexpr int kConsumers = kTile.consumers();
  static constexpr int kWeightBytes = kBlockChannels * kRowBytes;
  // Of a pixel-major x tile: blocks of 64 pixels by kBlockK channels, a row to a channel.
  static constexpr int kPlaneBlockPixels = kRowBytes / sizeof(T);
  static constexpr int kPlaneBlockBytes = kBlockK * kRowBytes;
  // The output leaves in chunks of pixels.
  static constexpr int kChunkPixels = kTile.store_pixels * 2 / static_cast<int>(sizeof(T));
  static constexpr int kChunks = kBlockPixels / kChunkPixels;
  static constexpr int kBuffers = kTile.store_buffers;
  static constexpr int kSums = kBlockPixels / 2;       // of a thread
  static constexpr int kChunkSums = kChunkPixels / 2;  // of a thread
  // A chunk in a buffer: slabs of 128-byte rows.
  static constexpr int kSlabElements = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kSlabs = kPixelMajor ? 1 : kWarpgroupChannels / kSlabElements;
  static constexpr int kSlabBytes = kTile.store_buffer_bytes() / kSlabs;
  // Registers a thread after the warpgroups have traded: together what the launch bounds give.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 216;
  // Prefetching more of the weight than a block soon reads only takes bandwidth from its neighbours.
  static constexpr int kPrefetchedSteps = 16;

  static_assert(kBlockPixels % kChunkPixels == 0 && kChunks % kBuffers == 0, "buffers are used in turn");
  static_assert(!kPixelMajor || kChunkPixels == kSlabElements, "a row of a plane's chunk fills a row of shared memory");

  const Arguments& args;
  char* shared;
  int32_t split;  // which of the ranges of k steps
  Range steps;

  __device__ __forceinline__ explicit ConvBlock(const Arguments& arguments)
      : args(arguments),
        shared(shared_memory()),
        split(split_of(arguments.plan, blockIdx.x)),
        steps(split_range(arguments.steps, arguments.plan.split_k, split)) {}

  __device__ __forceinline__ const Problem& problem() const { return args.problem; }
  __device__ __forceinline__ const Plan& plan() const { return args.plan; }

  __device__ __forceinline__ char* weight_tile(int stage) const { return shared + stage * kTile.stage_bytes(); }
  __device__ __forceinline__ char* x_tile(int stage) const { return weight_tile(stage) + kWeightBytes; }
  __device__ __forceinline__ char* buffer(int consumer, int index) const {
    return shared + kTile.staging_offset() + (consumer * kBuffers + index) * kTile.store_buffer_bytes();
  }
  __device__ __forceinline__ float* partial_sums() const { return reinterpret_cast<float*>(shared); }
  __device__ __forceinline__ ScaleShift* norms() const {
    return reinterpret_cast<ScaleShift*>(shared + kTile.norm_offset());
  }
  __device__ __forceinline__ Barrier* barrier(int index) const {
    return reinterpret_cast<Barrier*>(shared + kTile.barriers_offset()) + index;
  }
  __device__ __forceinline__ Barrier* full(int stage) const { return barrier(stage); }
  __device__ __forceinline__ Barrier* empty(int stage) const { return barrier(kStages + stage); }
  __device__ __forceinline__ Barrier* residual_arrived(int consumer, int index) const {
    return barrier(2 * kStages + consumer * kBuffers + index);
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), 4 * kConsumers);  // warps
    }
    for (int i = 0; i < kConsumers * kBuffers; ++i) barrier_init(barrier(2 * kStages + i), 1);
    fence_barrier_init();
  }

  // The producer: one thread, so that every instruction before a copy is latency.

  // Where a tile begins in y and, for im2col, the input pixel that tap (0, 0) of its first output pixel reads.
  struct Source {
    TileStart start;
    Pixel corner;
  };

  __device__ __forceinline__ Source source_of(int64_t tile) const {
    const TileStart start = decode_tile(plan(), tile);
    if (kPixelMajor || !args.im2col) return {start, {}};
    const Pixel p = decode_pixel(problem(), start.pixel);
    const int32_t h = p.h * problem().stride_h - problem().padding_h;
    const int32_t w = p.w * problem().stride_w - problem().padding_w;
    return {start, {p.n, h, w}};
  }

  // decode_k_step's next, without its divisions.
  __device__ __forceinline__ void advance(KStep& k) const {
    k.channel += kBlockK;
    if (k.channel < problem().c_in) return;
    k.channel = 0;
    if (++k.tap_w < problem().kernel_w) return;
    k.tap_w = 0;
    ++k.tap_h;
  }

  __device__ __forceinline__ int tap(KStep k) const { return k.tap_h * problem().kernel_w + k.tap_w; }

  __device__ __forceinline__ void load_weight(RingPosition ring, TileStart start, KStep k) const {
    barrier_arrive_expect(full(ring.stage), kTile.stage_bytes());
    tensor_load_3d(weight_tile(ring.stage), &args.weight, full(ring.stage), k.channel, tap(k),
                   static_cast<int>(start.channel));
  }

  __device__ __forceinline__ void load_x(RingPosition ring, const Source& source, KStep k) const {
    char* target = x_tile(ring.stage);
    const int pixel = static_cast<int>(source.start.pixel);
    if constexpr (kPixelMajor) {
      for (int block = 0; block < kBlockPixels / kPlaneBlockPixels; ++block)
        tensor_load_3d(target + block * kPlaneBlockBytes, &args.x, full(ring.stage), pixel + block * kPlaneBlockPixels,
                       k.channel, static_cast<int>(source.start.plane));
    } else if (args.im2col) {
      tensor_load_im2col(target, &args.x, full(ring.stage), k.channel, source.corner.w, source.corner.h,
                         static_cast<int>(source.corner.n), k.tap_w, k.tap_h);
    } else {
      tensor_load_2d(target, &args.x, full(ring.stage), k.channel, pixel);
    }
  }

  // What may be done before the preceding kernel has ended: the weight comes nearer, and where nobody writes it, into
  // the ring. Returns how many stages wait for their x alone.
  __device__ __forceinline__ int load_ahead(TileStart start, KStep k) const {
    tensor_map_prefetch(&args.weight);
    tensor_map_prefetch(&args.x);
    if (plan().tensor_store) tensor_map_prefetch(&args.y);
    const int count = steps.end - steps.begin;
    const int ahead = !problem().constant_weight ? 0 : count < kStages ? count : kStages;
    RingPosition ring;
    for (int i = 0; i < ahead; ++i, advance(k), ring.advance(kStages)) load_weight(ring, start, k);
    for (int i = ahead; i < count && i < kPrefetchedSteps; ++i, advance(k))
      tensor_prefetch_l2_3d(&args.weight, k.channel, tap(k), static_cast<int>(start.channel));
    return ahead;
  }

  // `ahead` of the stages have their weight already.
  __device__ __forceinline__ void load_tile(RingPosition& ring, const Source& source, KStep k, int ahead) const {
    for (int32_t step = steps.begin; step < steps.end; ++step, advance(k), ring.advance(kStages)) {
      if (step - steps.begin >= ahead) {
        barrier_wait(empty(ring.stage), ring.parity ^ 1);
        load_weight(ring, source.start, k);
      }
      load_x(ring, source, k);
    }
  }

  __device__ __forceinline__ void produce() const {
    const bool leader = warp_index() == 0 && elect_one();
    const KStep first = decode_k_step(problem(), kBlockK, steps.begin);
    int64_t tile = first_tile(plan(), blockIdx.x);
    Source source = source_of(tile);
    int ahead = leader ? load_ahead(source.start, first) : 0;
    grid_dependency_wait();
    RingPosition ring;
    while (tile < args.tiles) {
      const int64_t next = tile + args.tile_stride;
      if (leader) {
        load_tile(ring, source, first, ahead);
        if (next >= args.tiles) grid_dependency_launch();
      }
      if (plan().split_k > 1) {  // the consumers' two: the partial sums lie over the ring
        warp_sync();
        cluster_sync();
        cluster_sync();
        fence_async_proxy();  // the blocks' reads of these sums come before what TMA writes there next
      }
      ahead = 0;
      tile = next;
      source = source_of(tile);
    }
  }

  // The consumers. A thread's place in its warpgroup: its sums 4j .. 4j+3 are those of channel() and pixels
  // 8j + pixel_pair(), + 1, then of channel() + 8 and the same pixels.
  struct Place {
    int consumer, warp, lane;

    __device__ __forceinline__ int thread() const { return warp * 32 + lane; }
    __device__ __forceinline__ int channel() const { return warp * 16 + lane / 4; }  // of the warpgroup's 64
    __device__ __forceinline__ int pixel_pair() const { return lane % 4 * 2; }
    // Of the warpgroup. Constant names: a variable one would reserve all sixteen barriers.
    __device__ __forceinline__ void sync() const { consumer == 0 ? named_sync(1, 128) : named_sync(2, 128); }
  };
  static constexpr int kConsumersBarrier = 3;

  __device__ __forceinline__ void multiply_stage(float (&sums)[kSums], int stage, int consumer, bool accumulate) const {
    constexpr int kGroupBytes = 8 * kRowBytes;  // eight rows
    constexpr int kDepthBytes = 32;             // of K, in one wgmma
    constexpr int kXStepBytes = kPixelMajor ? 2 * kGroupBytes : kDepthBytes;
    constexpr int kAddressUnit = 16;  // in a descriptor's lowest field
    const char* weight = weight_tile(stage) + consumer * kWarpgroupChannels * kRowBytes;
    const uint64_t a = matrix_descriptor(weight, kAddressUnit, kGroupBytes);
    const uint64_t b = matrix_descriptor(x_tile(stage), kPixelMajor ? kPlaneBlockBytes : kAddressUnit, kGroupBytes);
#pragma unroll
    for (int k = 0; k < kRowBytes / kDepthBytes; ++k)
      wgmma<T, kBlockPixels, kPixelMajor>(sums, a + k * kDepthBytes / kAddressUnit, b + k * kXStepBytes / kAddressUnit,
                                          accumulate || k > 0);
  }

  // A warp frees a stage once its share of the products that read the stage is complete.
  __device__ __forceinline__ void free_stage(int stage, Place place) const {
    if (place.lane == 0) barrier_arrive(empty(stage));
  }

  // The sums over the block's k steps. One stage's products are under way while the next stage's are issued.
  __device__ __forceinline__ void multiply(float (&sums)[kSums], RingPosition& ring, Place place) const {
    int previous = 0;
    for (int32_t step = steps.begin; step < steps.end; ++step, ring.advance(kStages)) {
      barrier_wait(full(ring.stage), ring.parity);
      fence_registers(sums);
      wgmma_fence();
      multiply_stage(sums, ring.stage, place.consumer, step > steps.begin);
      wgmma_commit();
      if (step > steps.begin) {
        wgmma_wait<1>();
        free_stage(previous, place);
      }
      previous = ring.stage;
    }
    wgmma_wait<0>();
    fence_registers(sums);
    free_stage(previous, place);
  }

  __device__ __forceinline__ void load_norms(TileStart start, Place place) const {
    if (place.thread() >= kWarpgroupChannels) return;
    const int index = place.consumer * kWarpgroupChannels + place.thread();
    const int64_t channel = start.channel + index;
    norms()[index] = channel < problem().c_out ? scale_shift(args.operands, channel) : ScaleShift{0.0f, 0.0f};
  }

  template <int kCount>
  __device__ __forceinline__ void activate_all(float (&z)[kCount]) const {
    const float slope = args.operands.negative_slope;
    with_activation(problem().activation, [&](auto tag) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) z[i] = activate<decltype(tag)::value>(z[i], slope);
    });
  }

  // The epilogue goes chunk by chunk through shared memory. Where a channel (of the warpgroup's 64) and pixel (of the
  // chunk) stand in a buffer.
  __device__ __forceinline__ static int chunk_offset(int channel, int pixel) {
    const int inner = kPixelMajor ? pixel : channel, row = kPixelMajor ? channel : pixel;
    return inner / kSlabElements * kSlabBytes +
           swizzled_offset(row, inner % kSlabElements * static_cast<int>(sizeof(T)));
  }

  // The row that a lane names to ldmatrix and stmatrix for 16 channels by 16 pixels of half precision.
  __device__ __forceinline__ static int matrix_row_offset(Place place, int pixel) {
    const int matrix = place.lane / 8, row = place.lane % 8;
    const int channel = place.warp * 16 + matrix % 2 * 8;
    pixel += matrix / 2 * 8;
    return kPixelMajor ? chunk_offset(channel + row, pixel) : chunk_offset(channel, pixel + row);
  }

  __device__ __forceinline__ void add_chunk(float (&z)[kChunkSums], const char* chunk, Place place) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kChunkSums; i += 8) {
        uint32_t pairs[4];
        const char* row = chunk + matrix_row_offset(place, i * 2);
        if constexpr (kPixelMajor) {
          load_matrix_x4(pairs, row);
        } else {
          load_matrix_x4_trans(pairs, row);
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float2 values = unpack2<T>(pairs[pair]);
          z[i + pair * 2] += values.x;
          z[i + pair * 2 + 1] += values.y;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunkSums; ++i) z[i] += *reinterpret_cast<const float*>(chunk + sum_offset(place, i));
    }
  }

  __device__ __forceinline__ void write_chunk(const float (&z)[kChunkSums], char* chunk, Place place) const {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kChunkSums; i += 8) {
        uint32_t pairs[4];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) pairs[pair] = pack2<T>(z[i + pair * 2], z[i + pair * 2 + 1]);
        char* row = chunk + matrix_row_offset(place, i * 2);
        if constexpr (kPixelMajor) {
          store_matrix_x4(row, pairs);
        } else {
          store_matrix_x4_trans(row, pairs);
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kChunkSums; ++i) *reinterpret_cast<float*>(chunk + sum_offset(place, i)) = z[i];
    }
  }

  __device__ __forceinline__ static int sum_offset(Place place, int i) {
    return chunk_offset(place.channel() + i % 4 / 2 * 8, i / 4 * 8 + place.pixel_pair() + i % 2);
  }

  // One thread moves a chunk between its buffer and global memory by TMA.
  __device__ __forceinline__ void load_residual(TileStart start, int chunk, Place place) const {
    char* target = buffer(place.consumer, chunk % kBuffers);
    Barrier* arrived = residual_arrived(place.consumer, chunk % kBuffers);
    const int channel = static_cast<int>(start.channel) + place.consumer * kWarpgroupChannels;
    const int pixel = static_cast<int>(start.pixel) + chunk * kChunkPixels;
    barrier_arrive_expect(arrived, kTile.store_buffer_bytes());
    if constexpr (kPixelMajor) {
      tensor_load_3d(target, &args.residual, arrived, pixel, channel, static_cast<int>(start.plane));
    } else {
      for (int slab = 0; slab < kSlabs; ++slab)
        tensor_load_2d(target + slab * kSlabBytes, &args.residual, arrived, channel + slab * kSlabElements, pixel);
    }
  }
  __device__ __forceinline__ void store_chunk(const TensorMap* map, TileStart start, int chunk, Place place) const {
    const char* source = buffer(place.consumer, chunk % kBuffers);
    const int channel = static_cast<int>(start.channel) + place.consumer * kWarpgroupChannels;
    const int pixel = static_cast<int>(start.pixel) + chunk * kChunkPixels;
    if constexpr (kPixelMajor) {
      tensor_store_3d(map, source, pixel, channel, static_cast<int>(start.plane));
    } else {
      for (int slab = 0; slab < kSlabs; ++slab)
        tensor_store_2d(map, source + slab * kSlabBytes, channel + slab * kSlabElements, pixel);
    }
    tensor_store_commit();
  }

  // The warpgroup moves a chunk element by element, neighbouring threads neighbouring channels.
  template <class Body>
  __device__ __forceinline__ void for_each_inside(TileStart start, int chunk, Place place, Body&& body) const {
    const int64_t first_channel = start.channel + place.consumer * kWarpgroupChannels;
    const int64_t first_pixel = start.pixel + chunk * kChunkPixels;
    const int channel = place.thread() % kWarpgroupChannels;
    if (first_channel + channel >= problem().c_out) return;
#pragma unroll 4
    for (int pixel = place.thread() / kWarpgroupChannels; pixel < kChunkPixels; pixel += 128 / kWarpgroupChannels) {
      if (first_pixel + pixel < args.plane_pixels)
        body(chunk_offset(channel, pixel), first_channel + channel, first_pixel + pixel);
    }
  }
  using Bits = typename BitsOf<sizeof(T)>::type;
  __device__ __forceinline__ void load_residual_plainly(TileStart start, int chunk, Place place) const {
    char* target = buffer(place.consumer, chunk % kBuffers);
    const Bits* residual = static_cast<const Bits*>(args.operands.residual);
    for_each_inside(start, chunk, place, [&](int offset, int64_t channel, int64_t pixel) {
      *reinterpret_cast<Bits*>(target + offset) = load_global(residual + pixel * args.residual_pitch + channel);
    });
  }
  __device__ __forceinline__ void store_chunk_plainly(TileStart start, int chunk, Place place) const {
    const char* source = buffer(place.consumer, chunk % kBuffers);
    Bits* y = static_cast<Bits*>(args.operands.y);
    for_each_inside(start, chunk, place, [&](int offset, int64_t channel, int64_t pixel) {
      store_global(y + pixel * args.y_pitch + channel, *reinterpret_cast<const Bits*>(source + offset));
    });
  }

  __device__ __forceinline__ bool residual_by_tensor() const {
    return problem().residual != Residual::kNone && plan().tensor_store && plan().split_k == 1;
  }

  // The residual of the tile's first chunks comes while the tile is multiplied.
  __device__ __forceinline__ void load_first_residuals(TileStart start, Place place) const {
    if (!residual_by_tensor() || place.thread() != 0) return;
    tensor_store_wait_read<0>();
    for (int chunk = 0; chunk < kBuffers; ++chunk) load_residual(start, chunk, place);
  }

  // Until the chunk's buffer can be written: it holds the residual, or nothing that is still read.
  __device__ __forceinline__ void acquire_buffer(TileStart start, int chunk, int residual_parity, Place place) const {
    if (residual_by_tensor()) return barrier_wait(residual_arrived(place.consumer, chunk % kBuffers), residual_parity);
    if (plan().tensor_store && place.thread() == 0) tensor_store_wait_read<kBuffers - 1>();
    place.sync();
    if (problem().residual == Residual::kNone || plan().tensor_store) return;
    load_residual_plainly(start, chunk, place);
    place.sync();
  }

  __device__ __forceinline__ void release_buffer(TileStart start, int chunk, Place place) const {
    if (!plan().tensor_store) {
      place.sync();
      return store_chunk_plainly(start, chunk, place);
    }
    fence_async_proxy();
    place.sync();
    if (place.thread() != 0) return;
    store_chunk(&args.y, start, chunk, place);
    if (residual_by_tensor() && chunk + kBuffers < kChunks) {
      tensor_store_wait_read<0>();
      load_residual(start, chunk + kBuffers, place);
    }
  }

  // The sums of pixels that do not lie in y, `inside` of the tile's do, become values of the thread's two channels.
  __device__ __forceinline__ static void set_outside(float (&sums)[kSums], int inside, float low, float high,
                                                     Place place) {
    if (inside == kBlockPixels) return;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      if (i / 4 * 8 + place.pixel_pair() + i % 2 >= inside) sums[i] = i % 4 < 2 ? low : high;
    }
  }

  // Over a channel's pixels, which four lanes share.
  __device__ __forceinline__ static float sum_of_quad(float value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
  }

  // The parts of the thread's two channels over the tile's pixels, from their sums and biases. No lane may leave early:
  // the compiler would no longer keep the main loop's addresses in uniform registers.
  __device__ __forceinline__ void write_statistics(float (&sums)[kSums], int64_t tile, TileStart start, float low_bias,
                                                   float high_bias, Place place) const {
    const int64_t left = args.plane_pixels - start.pixel;
    const int inside = static_cast<int>(left < kBlockPixels ? left : kBlockPixels);
    const auto count = static_cast<float>(inside);

    set_outside(sums, inside, 0.0f, 0.0f, place);
    float totals[4] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) totals[i % 4] += sums[i];
    const float low_mean = divide_fast(sum_of_quad(totals[0] + totals[1]), count);
    const float high_mean = divide_fast(sum_of_quad(totals[2] + totals[3]), count);

    set_outside(sums, inside, low_mean, high_mean, place);
    float squares[4] = {};
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float distance = sums[i] - (i % 4 < 2 ? low_mean : high_mean);
      squares[i % 4] = fma(distance, distance, squares[i % 4]);
    }
    const float low_m2 = sum_of_quad(squares[0] + squares[1]), high_m2 = sum_of_quad(squares[2] + squares[3]);

    // Of the four lanes one writes the counts, one the means, one the squares.
    const int row = place.lane % 4;
    const int64_t channel = start.channel + place.consumer * kWarpgroupChannels + place.channel();
    const int64_t pixel_tile = tile / plan().channel_tiles;
    float* part = args.operands.parts + (pixel_tile * 3 + row) * problem().c_out + channel;
    if (row < 3 && channel < problem().c_out)
      store_global(part, row == 0 ? count : row == 1 ? low_mean + low_bias : low_m2);
    if (row < 3 && channel + 8 < problem().c_out)
      store_global(part + 8, row == 0 ? count : row == 1 ? high_mean + high_bias : high_m2);
  }

  __device__ __forceinline__ void finish_tile(float (&sums)[kSums], int64_t tile, TileStart start, int& residual_parity,
                                              Place place) const {
    place.sync();  // the norms are there
    const ScaleShift* norm = norms() + place.consumer * kWarpgroupChannels + place.channel();
    const ScaleShift low = norm[0], high = norm[8];
    if (problem().statistics) write_statistics(sums, tile, start, low.shift, high.shift, place);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float z[kChunkSums];
#pragma unroll
      for (int i = 0; i < kChunkSums; ++i) {
        const ScaleShift channel = i % 4 < 2 ? low : high;
        z[i] = fma(sums[chunk * kChunkSums + i], channel.scale, channel.shift);
      }
      char* target = buffer(place.consumer, chunk % kBuffers);
      acquire_buffer(start, chunk, residual_parity, place);
      if (problem().residual == Residual::kAddAct) add_chunk(z, target, place);
      activate_all(z);
      if (problem().residual == Residual::kActAdd) add_chunk(z, target, place);
      write_chunk(z, target, place);
      release_buffer(start, chunk, place);
      if (chunk % kBuffers == kBuffers - 1) residual_parity ^= 1;
    }
  }

  // The epilogue with split-K: the cluster's blocks each finish a slice of the pixels.

  static constexpr int kVector = 16 / sizeof(T);  // numbers of y in 16 bytes

  __device__ __forceinline__ void write_partial_sums(const float (&sums)[kSums], Place place) const {
    const int channel = place.consumer * kWarpgroupChannels + place.channel();
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      partial_sums()[(i / 4 * 8 + place.pixel_pair() + i % 2) * kTile.partial_pitch() + channel + i % 4 / 2 * 8] =
          sums[i];
  }

  __device__ __forceinline__ void add_partial_sums(float (&z)[kVector], int channel, int pixel) const {
    const float4* own = reinterpret_cast<const float4*>(partial_sums() + pixel * kTile.partial_pitch() + channel);
    for (int rank = 0; rank < plan().split_k; ++rank) {
#pragma unroll
      for (int quad = 0; quad < kVector / 4; ++quad) {
        const float4 values = load_cluster(own + quad, rank);
        z[quad * 4] += values.x;
        z[quad * 4 + 1] += values.y;
        z[quad * 4 + 2] += values.z;
        z[quad * 4 + 3] += values.w;
      }
    }
  }

  // 16 bytes of a row of channels: at once, or only the first `count` numbers, one by one.
  using Row = Vector<T, kVector>;
  __device__ __forceinline__ static void load_row(Row& row, const T* source, bool whole, int64_t count) {
    if (whole) {
      row.bits = load_global(reinterpret_cast<const decltype(row.bits)*>(source));
      return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) row.numbers[i] = load_global(source + i);
    }
  }
  __device__ __forceinline__ static void store_row(const Row& row, T* target, bool whole, int64_t count) {
    if (whole) return store_global(reinterpret_cast<decltype(row.bits)*>(target), row.bits);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (i < count) store_global(target + i, row.numbers[i]);
    }
  }

  __device__ __forceinline__ static void add_row(float (&z)[kVector], const Row& row) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] += to_float(row.numbers[i]);
  }

  __device__ __forceinline__ void finish_row(float (&z)[kVector], const ScaleShift* norm, int64_t channel,
                                             int64_t pixel) const {
    const int64_t left = problem().c_out - channel;
    const bool whole = plan().tensor_store && left >= kVector;
    Row row{};
    if (problem().residual != Residual::kNone) {
      const T* residual = static_cast<const T*>(args.operands.residual);
      load_row(row, residual + pixel * args.residual_pitch + channel, whole, left);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) z[i] = fma(z[i], norm[i].scale, norm[i].shift);
    if (problem().residual == Residual::kAddAct) add_row(z, row);
    activate_all(z);
    if (problem().residual == Residual::kActAdd) add_row(z, row);
#pragma unroll
    for (int i = 0; i < kVector; ++i) row.numbers[i] = from_float<T>(z[i]);
    store_row(row, static_cast<T*>(args.operands.y) + pixel * args.y_pitch + channel, whole, left);
  }

  __device__ __forceinline__ void finish_slice(TileStart start, Place place) const {
    constexpr int kVectors = kBlockChannels / kVector;  // in a pixel
    const int slice_pixels = kBlockPixels / plan().split_k;
    const int thread = place.consumer * 128 + place.thread();
    for (int i = thread; i < slice_pixels * kVectors; i += kConsumers * 128) {
      const int channel = i % kVectors * kVector, pixel = split * slice_pixels + i / kVectors;
      if (start.channel + channel >= problem().c_out || start.pixel + pixel >= args.plane_pixels) continue;
      float z[kVector] = {};
      add_partial_sums(z, channel, pixel);
      finish_row(z, norms() + channel, start.channel + channel, start.pixel + pixel);
    }
  }

  __device__ __forceinline__ void reduce_tile(const float (&sums)[kSums], TileStart start, Place place) const {
    named_sync(kConsumersBarrier, kConsumers * 128);  // every warp has read its operands: the ring is free
    write_partial_sums(sums, place);
    fence_async_proxy();  // TMA writes there next
    cluster_sync();
    finish_slice(start, place);
    warp_sync();  // the lanes of a warp may have different numbers of rows
    cluster_sync();
  }

  __device__ __forceinline__ void consume() const {
    const int warp = warp_index();
    const Place place{warp / 4 - 1, warp % 4, lane_index()};
    int64_t tile = first_tile(plan(), blockIdx.x);
    TileStart start = decode_tile(plan(), tile);
    grid_dependency_wait();
    RingPosition ring;
    int residual_parity = 0;
    while (tile < args.tiles) {
      float sums[kSums];
      load_norms(start, place);
      load_first_residuals(start, place);
      multiply(sums, ring, place);
      if (plan().split_k > 1) {
        reduce_tile(sums, start, place);
      } else {
        finish_tile(sums, tile, start, residual_parity, place);
      }
      tile += args.tile_stride;
      start = decode_tile(plan(), tile);
    }
    if (place.thread() == 0) tensor_store_wait<0>();
  }
};

template <class T, int kTileIndex, bool kPixelMajor>
__global__ void __launch_bounds__(kTiles[kTileIndex].threads(), kTiles[kTileIndex].blocks_per_multiprocessor)
    conv(const __grid_constant__ Arguments args) {
  using Block = ConvBlock<T, kTileIndex, kPixelMajor>;
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

template <class T, int kTileIndex, bool kPixelMajor>
cudaError_t launch_tile(const Arguments& args, cudaStream_t stream) {
  const Plan& plan = args.plan;
  const LaunchConfig config{plan.grid, kTiles[kTileIndex].threads(), kTiles[kTileIndex].shared_bytes(), plan.cluster,
                            true};
  return launch(config, stream, conv<T, kTileIndex, kPixelMajor>, args);
}

// Which tiles are built for planes: see tile_refusal.
template <class T>
constexpr bool has_planes(int tile) {
  return sizeof(T) == 2 && kTiles[tile].store_pixels == 64;
}

template <class T, int... kIndices>
cudaError_t launch_indexed(const Arguments& args, cudaStream_t stream, std::integer_sequence<int, kIndices...>) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto try_tile = [&](auto index) {
    constexpr int kIndex = decltype(index)::value;
    if (args.plan.tile != kIndex) return;
    if (!args.plan.x_pixel_major) {
      error = launch_tile<T, kIndex, false>(args, stream);
    } else if constexpr (has_planes<T>(kIndex)) {
      error = launch_tile<T, kIndex, true>(args, stream);
    }
  };
  (try_tile(std::integral_constant<int, kIndices>{}), ...);
  return error;
}

// Instantiated in conv_sm90_*.cu, one dtype each; T = float is TF32.
template <class T>
cudaError_t launch_conv(const Arguments& args, cudaStream_t stream) {
  return launch_indexed<T>(args, stream, std::make_integer_sequence<int, kTileCount>{});
}

}  // namespace pointfuse::sm90
