// The plan of a launch, and what follows from it for one block: which part of the output it computes, over which k
// steps, from which inputs. Planner, kernels and tests share these functions.
#pragma once

#include "params.h"

namespace pointfuse {

enum class Kernel : int32_t { kNone, kSm80, kSm90 };

struct Plan {
  Kernel kernel;
  int32_t tile;  // index into sm80::kTiles or sm90::kTiles
  int32_t block_channels, block_pixels, block_k, stages, threads;
  // K steps (taps * ceil(c_in / block_k)) are cut into split_k ranges, each a block's. On sm_90 the split_k blocks of a
  // tile are one cluster and reduce through distributed shared memory (cluster == split_k); on sm_80 each writes its
  // tile's partial sums in fp32 to the workspace, and a second launch adds them.
  int32_t split_k, cluster;
  int64_t channel_tiles, pixel_tiles;
  // Pixel tiles run over the whole batch (planes == 1), or each stays inside one image (planes == batch).
  int64_t planes;
  int64_t grid;          // blocks, in one dimension; on sm_90 a multiple of cluster, persistent
  int32_t shared_bytes;  // dynamic
  int64_t workspace_bytes;
  // sm_80: bytes of a copy of x and of the weight along channels; both 16 is vectorised. Bytes of a store to y and of a
  // load of the residual. On sm_90 the operands' own conditions are in operands_sm90.h.
  int32_t x_vector, weight_vector, y_vector;
  bool vectorised;
  // Whether neighbouring pixels, not channels, are neighbours in memory (NCHW).
  bool x_pixel_major, y_pixel_major;
  bool tensor_store;  // sm_90: y leaves, and the residual comes, by TMA
  float predicted_us, floor_us;
  const char* refusal;  // why there is no plan (kernel == kNone); null otherwise
};

POINTFUSE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// K: a step is one tap and one block of block_k input channels; the blocks of a tap are neighbours.

POINTFUSE_HOST_DEVICE int32_t channel_blocks(const Problem& problem, int32_t block_k) {
  return static_cast<int32_t>(ceil_div(problem.c_in, block_k));
}

POINTFUSE_HOST_DEVICE int32_t k_steps(const Problem& problem, int32_t block_k) {
  return problem.taps() * channel_blocks(problem, block_k);
}

struct KStep {
  int32_t tap_h, tap_w;
  int32_t channel;  // the first of the step's block_k input channels
};

POINTFUSE_HOST_DEVICE KStep decode_k_step(const Problem& problem, int32_t block_k, int32_t step) {
  const int32_t blocks = channel_blocks(problem, block_k);
  const int32_t tap = step / blocks;
  const int32_t tap_h = tap / problem.kernel_w;
  return {tap_h, tap - tap_h * problem.kernel_w, (step - tap * blocks) * block_k};
}

struct Range {
  int32_t begin, end;
};

// The k steps of one split: contiguous, of lengths that differ by at most one, and none empty while split_k <= steps.
POINTFUSE_HOST_DEVICE Range split_range(int32_t steps, int32_t split_k, int32_t split) {
  const int32_t base = steps / split_k, longer = steps % split_k;
  const int32_t begin = split * base + (split < longer ? split : longer);
  return {begin, begin + base + (split < longer ? 1 : 0)};
}

// Tiles: block b starts with tile first_tile(b) and split split_of(b), and goes on by tile_stride while below
// tiles(). On sm_80 the grid has a block for every tile and split, so that it does so once.

POINTFUSE_HOST_DEVICE int64_t tiles(const Plan& plan) { return plan.channel_tiles * plan.pixel_tiles; }
POINTFUSE_HOST_DEVICE int64_t first_tile(const Plan& plan, int64_t block) { return block / plan.split_k; }
POINTFUSE_HOST_DEVICE int32_t split_of(const Plan& plan, int64_t block) {
  return static_cast<int32_t>(block % plan.split_k);
}
POINTFUSE_HOST_DEVICE int64_t tile_stride(const Plan& plan) { return plan.grid / plan.split_k; }

struct TileStart {
  int64_t channel;  // the tile's first output channel
  int64_t plane;
  int64_t pixel;  // its first pixel within the plane
};

POINTFUSE_HOST_DEVICE TileStart decode_tile(const Plan& plan, int64_t tile) {
  const int64_t pixel_tile = tile / plan.channel_tiles;
  const int64_t channel = (tile - pixel_tile * plan.channel_tiles) * plan.block_channels;
  if (plan.planes == 1) return {channel, 0, pixel_tile * plan.block_pixels};
  const int64_t plane_tiles = plan.pixel_tiles / plan.planes;
  const int64_t plane = pixel_tile / plane_tiles;
  return {channel, plane, (pixel_tile - plane * plane_tiles) * plan.block_pixels};
}

// Pixels: p = (n * out_height + h) * out_width + w.

struct Pixel {
  int64_t n;
  int32_t h, w;
};

POINTFUSE_HOST_DEVICE Pixel decode_pixel(const Problem& problem, int64_t p) {
  const int64_t out_height = problem.out_height(), out_width = problem.out_width();
  if (p <= INT32_MAX) {  // 64-bit division costs several times as much
    const auto p32 = static_cast<uint32_t>(p), width = static_cast<uint32_t>(out_width);
    const uint32_t row = p32 / width, n = row / static_cast<uint32_t>(out_height);
    return {static_cast<int64_t>(n), static_cast<int32_t>(row - n * static_cast<uint32_t>(out_height)),
            static_cast<int32_t>(p32 - row * width)};
  }
  const int64_t row = p / out_width, n = row / out_height;
  return {n, static_cast<int32_t>(row - n * out_height), static_cast<int32_t>(p - row * out_width)};
}

struct InputPixel {
  int32_t h, w;
  bool inside;  // else padding: zero
};

POINTFUSE_HOST_DEVICE InputPixel input_pixel(const Problem& problem, Pixel pixel, int32_t tap_h, int32_t tap_w) {
  const int32_t h = pixel.h * problem.stride_h - problem.padding_h + tap_h;
  const int32_t w = pixel.w * problem.stride_w - problem.padding_w + tap_w;
  return {h, w, h >= 0 && h < problem.height && w >= 0 && w < problem.width};
}

// Distance in elements from a tensor's first element.
POINTFUSE_HOST_DEVICE int64_t element_offset(const Strides& strides, int64_t n, int64_t channel, int64_t h, int64_t w) {
  return n * strides.outer + channel * strides.channel + h * strides.height + w * strides.width;
}

// The operand tiles in shared memory are rows of 128 bytes, a row to a channel or pixel; the 16-byte chunks of a row
// are permuted so that eight rows' equal chunks lie in different banks. It is TMA's SWIZZLE_128B.
POINTFUSE_HOST_DEVICE constexpr int32_t swizzled_offset(int32_t row, int32_t byte) {
  return row * 128 + (byte ^ ((row & 7) << 4));
}

}  // namespace pointfuse
