// The convolution unit for every GPU from sm_80 on and for every layout: an implicit GEMM on mma.sync and cp.async.
//
//   y[channel, pixel] = act(scale[channel] * sum over k of weight[channel, k] * x[pixel, k] + shift[channel])
//
// A block computes kBlockChannels x kBlockPixels outputs. k runs over steps of one tap and kBlockK input channels,
// whose operands pass through a ring of `stages` buffers in shared memory: while a step is multiplied, those after it
// are on their way. Both operands lie there as rows of 128 bytes, k-contiguous, so that the way an operand lies in
// memory matters to its loader alone, and the way y does to the epilogue alone.
//
// With split-K the kernel runs twice: each block of the first launch leaves its accumulators in the workspace, each of
// the second adds those of its tile in order and goes on as if it had multiplied.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "run.h"
#include "schedule.h"
#include "tile_sm80.h"

namespace pointfuse::sm80 {

constexpr int kChunkBytes = 16;
constexpr int kRowChunks = kRowBytes / kChunkBytes;

// ---- Rows: where the operands' rows begin in memory, as of the first tap and channel, and whether a tap of theirs
// lies there at all; what does not is zero.

template <class T>
struct WeightRows {
  const T* first;  // the block's first channel
  Strides strides;
  int32_t count;  // how many of the block's channels exist

  __device__ __forceinline__ const T* start(int row) const { return first + row * strides.outer; }
  __device__ __forceinline__ bool inside(int row, int, int) const { return row < count; }
};

// A pixel of the output as x knows it: the position of tap (0, 0), which may lie in the padding.
struct PixelRow {
  int64_t offset;
  int32_t h, w;
};
static_assert(sizeof(PixelRow) == kPixelEntryBytes && sizeof(OutputPixel) == kPixelEntryBytes, "they share memory");

__device__ __forceinline__ PixelRow pixel_row(const Problem& problem, int64_t p) {
  // Above every plane, whatever the tap.
  if (p >= problem.pixels()) return {0, INT32_MIN, 0};
  const Pixel pixel = decode_pixel(problem, p);
  const InputPixel input = input_pixel(problem, pixel, 0, 0);
  return {element_offset(problem.x, pixel.n, 0, input.h, input.w), input.h, input.w};
}

template <class T>
struct PixelRows {
  const T* x;
  const PixelRow* rows;  // in shared memory
  Strides strides;
  uint32_t height, width;

  __device__ __forceinline__ const T* start(int row) const { return x + rows[row].offset; }
  __device__ __forceinline__ bool inside(int row, int tap_h, int tap_w) const {
    const auto h = static_cast<uint32_t>(rows[row].h + tap_h), w = static_cast<uint32_t>(rows[row].w + tap_w);
    return h < height && w < width;
  }
};

// ---- Loaders: load() brings a step's channels, from `channel` on, `offset` elements from where the rows begin, into a
// tile. The step is one of the tap last given to set_tap().

// 16 bytes at a time, of rows that are contiguous along channels and of whole chunks.
template <class T, int kRows, int kThreads, class Rows>
class VectorLoader {
  static constexpr int kRowStep = kThreads / kRowChunks, kCopies = kRows / kRowStep;
  static constexpr int kChunk = kChunkBytes / sizeof(T);

 public:
  __device__ __forceinline__ VectorLoader(const Rows& rows, int c_in, int, bool)
      : rows_(rows), c_in_(c_in), row_(thread_index() / kRowChunks), chunk_(thread_index() % kRowChunks) {}

  __device__ __forceinline__ void set_tap(int tap_h, int tap_w) {
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) inside_ |= uint32_t{rows_.inside(row_ + i * kRowStep, tap_h, tap_w)} << i;
  }

  __device__ __forceinline__ void load(char* tile, int channel, int64_t offset) const {
    static_assert(kRowStep % 8 == 0, "all rows of a thread have the same swizzle");
    const uint32_t inside = channel + chunk_ * kChunk < c_in_ ? inside_ : 0;
    char* target = tile + swizzled_offset(row_, chunk_ * kChunkBytes);
    const T* source[kCopies];  // all before the first copy, which the compiler moves no load across
#pragma unroll
    for (int i = 0; i < kCopies; ++i) source[i] = rows_.start(row_ + i * kRowStep) + (offset + chunk_ * kChunk);
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async<kChunkBytes>(target + i * kRowStep * kRowBytes, source[i], inside >> i & 1 ? kChunkBytes : 0);
  }

 private:
  Rows rows_;
  uint32_t inside_;
  int c_in_, row_, chunk_;
};

// Any strides, any alignment: 16-byte chunks in pieces of `vector` bytes, each contiguous along channels;
// half-precision numbers one by one through registers. Neighbouring threads take neighbouring chunks of a row, or with
// `along_rows` neighbouring rows: whichever is contiguous in memory.
template <class T, int kRows, int kThreads, class Rows>
class GeneralLoader {
  static constexpr int kChunks = kRows * kRowChunks / kThreads;
  static constexpr int kChunk = kChunkBytes / sizeof(T);
  // Chunks that gather() has on their way at once: all, as far as registers allow.
  static constexpr int kBatch = kChunks < 4 ? kChunks : 4;
  static_assert(kChunks % kBatch == 0 && kThreads % kRows == 0, "every thread has as many chunks");

 public:
  __device__ __forceinline__ GeneralLoader(const Rows& rows, int c_in, int vector, bool along_rows)
      : rows_(rows), c_in_(c_in), vector_(vector) {
    const int thread = thread_index();
    row_ = along_rows ? thread % kRows : thread / kRowChunks;
    row_step_ = along_rows ? 0 : kThreads / kRowChunks;
    chunk_ = along_rows ? thread / kRows : thread % kRowChunks;
    chunk_step_ = along_rows ? kThreads / kRows : 0;
    // Threads whose rows share their banks begin with different pieces.
    rotation_ = along_rows ? row_ / 8 : row_;
  }

  __device__ __forceinline__ void set_tap(int tap_h, int tap_w) { tap_h_ = tap_h, tap_w_ = tap_w; }

  __device__ __forceinline__ void load(char* tile, int channel, int64_t offset) const {
    switch (vector_) {
      case 16:
        return copy<16>(tile, channel, offset);
      case 8:
        return copy<8>(tile, channel, offset);
      case 4:
        return copy<4>(tile, channel, offset);
      default:
        if constexpr (sizeof(T) == 2) return gather(tile, channel, offset);
    }
  }

 private:
  template <int kBytes>
  __device__ __forceinline__ void copy(char* tile, int channel, int64_t offset) const {
    constexpr int kPieces = kChunkBytes / kBytes, kPiece = kBytes / sizeof(T);
#pragma unroll 1
    for (int i = 0; i < kChunks; ++i) {
      const int row = row_ + i * row_step_, chunk = chunk_ + i * chunk_step_;
      const T* source = rows_.start(row) + offset + chunk * kChunk * rows_.strides.channel;
      const int left = rows_.inside(row, tap_h_, tap_w_) ? c_in_ - channel - chunk * kChunk : 0;
      char* target = tile + swizzled_offset(row, chunk * kChunkBytes);
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int first = (j + rotation_) % kPieces * kPiece;
        const int inside = left - first < kPiece ? left - first : kPiece;
        copy_async<kBytes>(target + first * sizeof(T), source + first * rows_.strides.channel,
                           inside > 0 ? inside * int{sizeof(T)} : 0);
      }
    }
  }

  static __device__ __forceinline__ uint32_t load_bits(const T* number) {
    return load_global(reinterpret_cast<const uint16_t*>(number));
  }

  __device__ __forceinline__ void gather(char* tile, int channel, int64_t offset) const {
#pragma unroll 1
    for (int begin = 0; begin < kChunks; begin += kBatch) {
      uint32_t numbers[kBatch][kChunk];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = row_ + (begin + i) * row_step_, chunk = chunk_ + (begin + i) * chunk_step_;
        const T* source = rows_.start(row) + offset + chunk * kChunk * rows_.strides.channel;
        const int inside = rows_.inside(row, tap_h_, tap_w_) ? c_in_ - channel - chunk * kChunk : 0;
        if (inside >= kChunk) {  // nearly always, and half the instructions
#pragma unroll
          for (int e = 0; e < kChunk; ++e, source += rows_.strides.channel) numbers[i][e] = load_bits(source);
        } else {
#pragma unroll
          for (int e = 0; e < kChunk; ++e, source += rows_.strides.channel)
            numbers[i][e] = e < inside ? load_bits(source) : 0;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int row = row_ + (begin + i) * row_step_, chunk = chunk_ + (begin + i) * chunk_step_;
        const uint32_t (&n)[kChunk] = numbers[i];
        *reinterpret_cast<uint4*>(tile + swizzled_offset(row, chunk * kChunkBytes)) =
            make_uint4(n[0] | n[1] << 16, n[2] | n[3] << 16, n[4] | n[5] << 16, n[6] | n[7] << 16);
      }
    }
  }

  Rows rows_;
  int c_in_, vector_;
  int row_, row_step_, chunk_, chunk_step_, rotation_;
  int tap_h_, tap_w_;
};

// ---- Warps: a warp's part of the block tile. A thread holds kChannels x kPixels of it; sum(i, j) belongs to
// channel(i) and pixel(j) of the block. step() multiplies one step's tiles, given by their offsets in shared memory.

template <class T>
struct HalfProducts {
  using Number = T;
  static __device__ __forceinline__ void round(uint32_t&) {}
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x16<T>(d, a, b);
  }
};

struct Tf32Products {
  using Number = float;
  static __device__ __forceinline__ void round(uint32_t& bits) { bits = to_tf32(float_of_bits(bits)); }
  static __device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_16x8x8_tf32(d, a, b);
  }
};

// Tensor cores. Half precision and TF32 differ in the instruction alone: to both, k is slices of 32 bytes, and ldmatrix
// deals out 32-bit words.
template <class Products, int kTile>
class TensorWarp {
  static constexpr Tile kBlock = kTiles[kTile];
  static constexpr int kTilesM = kBlock.warp_channels() / 16, kTilesN = kBlock.warp_pixels() / 8;
  static constexpr int kSliceBytes = 32, kSlices = kRowBytes / kSliceBytes;

 public:
  using Number = typename Products::Number;
  static constexpr int kChannels = 2 * kTilesM, kPixels = 2 * kTilesN;

  __device__ __forceinline__ TensorWarp() {
    const int warp = warp_index(), lane = lane_index();
    const int channel = warp / kBlock.warps_pixels * kBlock.warp_channels();
    const int pixel = warp % kBlock.warps_pixels * kBlock.warp_pixels();
    // The row and chunk whose address this lane gives to ldmatrix: of A 16 rows and two chunks, of B two times 8 rows
    // and two chunks.
    weight_offset_ = swizzled_offset(channel + lane % 16, lane / 16 * kChunkBytes);
    x_offset_ = swizzled_offset(pixel + lane / 16 * 8 + lane % 8, lane / 8 % 2 * kChunkBytes);
  }

  // While a fragment of A is multiplied the next is on its way, and B's of the next slice with it.
  __device__ __forceinline__ void step(int weight_tile, int x_tile) {
    const int weight = weight_tile + weight_offset_, x = x_tile + x_offset_;
    uint32_t a[2][4], b[2][kTilesN][2];
    load_a(a[0], weight, 0, 0);
    load_b(b[0], x, 0);
#pragma unroll
    for (int i = 0; i < kSlices * kTilesM; ++i) {
      const int slice = i / kTilesM, m = i % kTilesM, next = i + 1;
      if (next < kSlices * kTilesM) load_a(a[next % 2], weight, next / kTilesM, next % kTilesM);
      if (m == kTilesM - 1 && slice + 1 < kSlices) load_b(b[(slice + 1) % 2], x, slice + 1);
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) Products::multiply(sums_[m][n], a[i % 2], b[slice % 2][n]);
    }
  }

  static __device__ __forceinline__ int channel(int i) {
    return thread_index() / 32 / kBlock.warps_pixels * kBlock.warp_channels() + lane_index() / 4 + 8 * i;
  }
  static __device__ __forceinline__ int pixel(int j) {
    return thread_index() / 32 % kBlock.warps_pixels * kBlock.warp_pixels() + lane_index() % 4 * 2 + j / 2 * 8 + j % 2;
  }
  __device__ __forceinline__ float& sum(int i, int j) { return sums_[i / 2][j / 2][i % 2 * 2 + j % 2]; }

 private:
  // A slice's chunks differ from the first slice's in bits that the swizzle only exchanges.
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], int weight, int slice, int m) {
    load_matrix_x4(a, shared_memory() + (weight ^ (slice * kSliceBytes)) + m * 16 * kRowBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) Products::round(a[i]);
  }

  static __device__ __forceinline__ void load_b(uint32_t (&b)[kTilesN][2], int x, int slice) {
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t both[4];
      load_matrix_x4(both, shared_memory() + (x ^ (slice * kSliceBytes)) + n * 8 * kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Products::round(both[i]);
        b[n + i / 2][i % 2] = both[i];
      }
    }
  }

  float sums_[kTilesM][kTilesN][4] = {};
  int weight_offset_, x_offset_;
};

// fp32 without tensor cores. The lanes are 8 x 4, and a thread's rows 8 and 4 apart: the rows that a warp reads at once
// lie in different banks.
template <int kTile>
class FmaWarp {
  static constexpr Tile kBlock = kTiles[kTile];

 public:
  using Number = float;
  static constexpr int kChannels = kBlock.warp_channels() / 8, kPixels = kBlock.warp_pixels() / 4;

  __device__ __forceinline__ void step(int weight_tile, int x_tile) {
    const int weight = weight_tile + swizzled_offset(channel(0), 0), x = x_tile + swizzled_offset(pixel(0), 0);
    // Two numbers of k at once: with four the fragments do not fit beside 64 accumulators.
#pragma unroll 1
    for (int k = 0; k < kRowBytes; k += sizeof(float2)) {
      float2 a[kChannels];
#pragma unroll
      for (int i = 0; i < kChannels; ++i) a[i] = pair((weight ^ k) + i * 8 * kRowBytes);
#pragma unroll
      for (int j = 0; j < kPixels; ++j) {
        // Every other row is in the other half of the swizzle's period.
        const float2 b = pair((x ^ k ^ (j % 2 * 64)) + j * 4 * kRowBytes);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sums_[i][j] = fma(a[i].y, b.y, fma(a[i].x, b.x, sums_[i][j]));
      }
    }
  }

  static __device__ __forceinline__ int channel(int i) {
    return thread_index() / 32 / kBlock.warps_pixels * kBlock.warp_channels() + lane_index() / 4 + 8 * i;
  }
  static __device__ __forceinline__ int pixel(int j) {
    return thread_index() / 32 % kBlock.warps_pixels * kBlock.warp_pixels() + lane_index() % 4 + 4 * j;
  }
  __device__ __forceinline__ float& sum(int i, int j) { return sums_[i][j]; }

 private:
  static __device__ __forceinline__ float2 pair(int offset) {
    return *reinterpret_cast<const float2*>(shared_memory() + offset);
  }

  float sums_[kChannels][kPixels] = {};
};

// ---- The kernel

template <class Warp, int kTile, bool kVectorised>
class Block {
  using T = typename Warp::Number;
  static constexpr Tile kBlock = kTiles[kTile];
  static constexpr int kThreads = kBlock.threads(), kStages = kBlock.stages;
  static constexpr int kBlockK = kRowBytes / sizeof(T);
  template <int kRows, class Rows>
  using Loader =
      std::conditional_t<kVectorised, VectorLoader<T, kRows, kThreads, Rows>, GeneralLoader<T, kRows, kThreads, Rows>>;

 public:
  __device__ __forceinline__ Block(const Plan& plan, const Problem& problem, const Operands& operands, int64_t tile)
      : plan_(plan), problem_(problem), operands_(operands) {
    const TileStart start = decode_tile(plan, tile);
    first_channel_ = static_cast<int32_t>(start.channel);
    pixel_tile_ = static_cast<int32_t>(start.pixel / kBlock.block_pixels);
  }

  __device__ __forceinline__ void compute_pixel_rows() const {
    if (thread_index() < kBlock.block_pixels)
      pixel_rows()[thread_index()] = pixel_row(problem_, first_pixel() + thread_index());
    block_sync();
  }

  // The sum over one split's steps, in warp's accumulators.
  __device__ __forceinline__ void multiply(Warp& warp, int32_t split) {
    Range steps{0, k_steps(problem_, kBlockK)};
    if (plan_.split_k > 1) steps = split_range(steps.end, plan_.split_k, split);
    const int c_in = static_cast<int>(problem_.c_in);
    const WeightRows<T> channels{static_cast<const T*>(operands_.weight) + first_channel_ * problem_.weight.outer,
                                 problem_.weight, channels_inside()};
    const PixelRows<T> pixels{static_cast<const T*>(operands_.x), pixel_rows(), problem_.x,
                              static_cast<uint32_t>(problem_.height), static_cast<uint32_t>(problem_.width)};
    Loader<kBlock.block_channels, WeightRows<T>> weight(channels, c_in, plan_.weight_vector, false);
    Loader<kBlock.block_pixels, PixelRows<T>> x(pixels, c_in, plan_.x_vector, plan_.x_pixel_major);

    KStep next{};
    if (steps.begin > 0) next = decode_k_step(problem_, kBlockK, steps.begin);
    int64_t weight_offset = element_offset(problem_.weight, 0, next.channel, next.tap_h, next.tap_w);
    int64_t x_offset = element_offset(problem_.x, 0, next.channel, next.tap_h, next.tap_w);
    weight.set_tap(next.tap_h, next.tap_w);
    x.set_tap(next.tap_h, next.tap_w);
    const auto load = [&](int stage) {
      weight.load(shared_memory() + weight_tile(stage), next.channel, weight_offset);
      x.load(shared_memory() + x_tile(stage), next.channel, x_offset);
      next.channel += kBlockK;
      weight_offset += kBlockK * problem_.weight.channel;
      x_offset += kBlockK * problem_.x.channel;
      if (next.channel >= c_in) {
        const bool wraps = next.tap_w + 1 == problem_.kernel_w;
        next = {next.tap_h + wraps, wraps ? 0 : next.tap_w + 1, 0};
        weight_offset = element_offset(problem_.weight, 0, 0, next.tap_h, next.tap_w);
        x_offset = element_offset(problem_.x, 0, 0, next.tap_h, next.tap_w);
        weight.set_tap(next.tap_h, next.tap_w);
        x.set_tap(next.tap_h, next.tap_w);
      }
    };

    const int count = steps.end - steps.begin;
    int stage = 0;  // the next to load; the one after it is the next to multiply
#pragma unroll 1
    for (int step = 1 - kStages; step < count; ++step) {
      if (step == 0 && plan_.split_k == 1) compute_norms();  // in the shadow of the first copies
      if (step >= 0) {
        copy_async_wait<kStages - 2>();
        block_sync();  // everyone's copies of this step are there, and everyone is done with the step before
      }
      if (step + kStages - 1 < count) load(stage);
      copy_async_commit();  // also where there was nothing to load, so that a wait counts steps
      stage = stage == kStages - 1 ? 0 : stage + 1;
      if (step >= 0) warp.step(weight_tile(stage), x_tile(stage));
    }
  }

  // Where write_outputs() finds them, after a barrier.
  __device__ __forceinline__ void compute_norms() const {
    if (thread_index() < channels_inside())
      norms()[thread_index()] = scale_shift(operands_, first_channel_ + thread_index());
  }

  // Accumulators in the workspace: [block of the first launch][accumulator of a thread][thread].
  __device__ __forceinline__ void leave_partial_sums(Warp& warp, int64_t block) const {
    float* target = partial_sums(block);
#pragma unroll
    for (int i = 0; i < Warp::kChannels; ++i) {
#pragma unroll
      for (int j = 0; j < Warp::kPixels; ++j) store_global(target + (i * Warp::kPixels + j) * kThreads, warp.sum(i, j));
    }
  }

  __device__ __forceinline__ void add_partial_sums(Warp& warp, int64_t tile) const {
    for (int split = 0; split < plan_.split_k; ++split) {
      const float* source = partial_sums(tile * plan_.split_k + split);
#pragma unroll
      for (int i = 0; i < Warp::kChannels; ++i) {
#pragma unroll
        for (int j = 0; j < Warp::kPixels; ++j)
          warp.sum(i, j) += load_global(source + (i * Warp::kPixels + j) * kThreads);
      }
    }
  }

  template <bool kStatistics>
  __device__ __forceinline__ void write_outputs(Warp& warp) {
    const int thread = thread_index();
    const int64_t pixels_left = problem_.pixels() - first_pixel();
    OutputTile<kBlock.block_channels, kBlock.block_pixels, kOutputPadding> outputs;
    outputs.values = reinterpret_cast<float*>(shared_memory());
    outputs.pixels = output_pixels();
    outputs.pixel_major = plan_.y_pixel_major;
    outputs.channels_inside = channels_inside();
    outputs.pixels_inside = static_cast<int>(pixels_left < kBlock.block_pixels ? pixels_left : kBlock.block_pixels);

    if (thread < outputs.pixels_inside) output_pixels()[thread] = output_pixel(problem_, first_pixel() + thread);
    block_sync();  // everyone is done with the pipeline's memory
#pragma unroll
    for (int i = 0; i < Warp::kChannels; ++i) {
      const int channel = warp.channel(i);
      const ScaleShift norm = norms()[channel];
#pragma unroll
      for (int j = 0; j < Warp::kPixels; ++j)
        outputs.at(channel, warp.pixel(j)) = fma(warp.sum(i, j), norm.scale, norm.shift);
    }
    block_sync();
    if constexpr (kStatistics) {
      float* part = operands_.parts + int64_t{pixel_tile_} * 3 * problem_.c_out + first_channel_;
      write_statistics<kBlock.block_channels, kThreads>(outputs, part, problem_.c_out, thread);
    }
    store_tile<T, kThreads>(outputs, problem_, operands_, first_channel_, plan_.y_vector, thread);
  }

 private:
  __device__ __forceinline__ int64_t first_pixel() const { return int64_t{pixel_tile_} * kBlock.block_pixels; }

  __device__ __forceinline__ int channels_inside() const {
    const int64_t left = problem_.c_out - first_channel_;
    return static_cast<int>(left < kBlock.block_channels ? left : kBlock.block_channels);
  }

  __device__ __forceinline__ float* partial_sums(int64_t block) const {
    constexpr int kTileSums = kBlock.block_channels * kBlock.block_pixels;
    return static_cast<float*>(operands_.workspace) + block * kTileSums + thread_index();
  }

  // Offsets in shared memory.
  static __device__ __forceinline__ int weight_tile(int stage) { return stage * kBlock.stage_bytes(); }
  static __device__ __forceinline__ int x_tile(int stage) { return weight_tile(stage) + kBlock.weight_bytes(); }
  __device__ __forceinline__ char* pixel_entries() const { return shared_memory() + kBlock.pipeline_bytes(); }
  __device__ __forceinline__ PixelRow* pixel_rows() const { return reinterpret_cast<PixelRow*>(pixel_entries()); }
  __device__ __forceinline__ OutputPixel* output_pixels() const {
    return reinterpret_cast<OutputPixel*>(pixel_entries());
  }
  __device__ __forceinline__ ScaleShift* norms() const {
    return reinterpret_cast<ScaleShift*>(pixel_entries() + kBlock.block_pixels * kPixelEntryBytes);
  }

  const Plan& plan_;
  const Problem& problem_;
  const Operands& operands_;
  int32_t first_channel_;
  int32_t pixel_tile_;  // half the registers of its first pixel
};

// Statistics are kernels of their own: a branch costs the others 4 registers a thread, and up to 42.
template <class Warp, int kTile, bool kVectorised, bool kStatistics>
__global__ void __launch_bounds__(kTiles[kTile].threads(), kTiles[kTile].resident_blocks(kVectorised))
    conv(const __grid_constant__ Plan plan, const __grid_constant__ Problem problem,
         const __grid_constant__ Operands operands, bool add_partial_sums) {
  // A division is some 100 cycles, so none where nothing is split.
  const bool split = plan.split_k > 1;
  const int64_t tile = split && !add_partial_sums ? first_tile(plan, blockIdx.x) : blockIdx.x;
  Warp warp;
  Block<Warp, kTile, kVectorised> block(plan, problem, operands, tile);
  if (add_partial_sums) {
    grid_dependency_wait();
    block.compute_norms();
    block.add_partial_sums(warp, tile);
  } else {
    block.compute_pixel_rows();
    grid_dependency_wait();
    block.multiply(warp, split ? split_of(plan, blockIdx.x) : 0);
  }
  grid_dependency_launch();
  if (split && !add_partial_sums) return block.leave_partial_sums(warp, blockIdx.x);
  block.template write_outputs<kStatistics>(warp);
}

// ---- Launches

template <class Warp, int kTile, bool kVectorised, bool kStatistics>
cudaError_t launch_tile(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  constexpr Tile kBlock = kTiles[kTile];
  LaunchConfig config{plan.grid, kBlock.threads(), shared_bytes(kBlock), 1, true};
  const auto kernel = conv<Warp, kTile, kVectorised, kStatistics>;
  const cudaError_t error = launch(config, stream, kernel, plan, problem, operands, false);
  if (error != cudaSuccess || plan.split_k == 1) return error;
  config.grid = tiles(plan);
  return launch(config, stream, kernel, plan, problem, operands, true);
}

template <template <int> class Warp, int kTile = 0>
cudaError_t dispatch(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  if constexpr (kTile < kTileCount) {
    if (plan.tile != kTile) return dispatch<Warp, kTile + 1>(plan, problem, operands, stream);
    // A copy that may end inside its 16 bytes costs 5 instructions more, so the vectorised path has none.
    const bool whole_chunks = problem.c_in * element_bytes(problem.dtype) % kChunkBytes == 0;
    const bool vectorised = plan.vectorised && whole_chunks;
    if (problem.statistics)
      return vectorised ? launch_tile<Warp<kTile>, kTile, true, true>(plan, problem, operands, stream)
                        : launch_tile<Warp<kTile>, kTile, false, true>(plan, problem, operands, stream);
    return vectorised ? launch_tile<Warp<kTile>, kTile, true, false>(plan, problem, operands, stream)
                      : launch_tile<Warp<kTile>, kTile, false, false>(plan, problem, operands, stream);
  } else {
    return cudaErrorInvalidValue;
  }
}

// One a file, conv_sm80_*.cu.
using Run = cudaError_t(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream);
Run run_fp16, run_bf16, run_tf32, run_fp32;

}  // namespace pointfuse::sm80
