// The block tiles of conv_sm90.cuh and the shared memory each needs.
#pragma once

#include "params.h"

namespace pointfuse::sm90 {

// One k step of a tile is a row of 128 bytes per channel and per pixel, swizzled by 128 bytes.
constexpr int kRowBytes = 128;
// Channels stand on the M side of wgmma, 64 to a consumer warpgroup; pixels on its N side.
constexpr int kWarpgroupChannels = 64;

struct Tile {
  int block_channels, block_pixels;
  int stages;
  // The output leaves through `store_buffers` buffers per consumer, each of 64 channels by store_pixels pixels in half
  // precision (half as many in fp32).
  int store_pixels, store_buffers;
  // The tile is sized for this many blocks on a multiprocessor.
  int blocks_per_multiprocessor;

  POINTFUSE_HOST_DEVICE constexpr int consumers() const { return block_channels / kWarpgroupChannels; }
  POINTFUSE_HOST_DEVICE constexpr int threads() const { return 128 * (1 + consumers()); }
  POINTFUSE_HOST_DEVICE constexpr int stage_bytes() const { return (block_channels + block_pixels) * kRowBytes; }
  POINTFUSE_HOST_DEVICE constexpr int ring_bytes() const { return stages * stage_bytes(); }
  POINTFUSE_HOST_DEVICE constexpr int store_buffer_bytes() const { return store_pixels * kRowBytes; }
  POINTFUSE_HOST_DEVICE constexpr int staging_bytes() const {
    return consumers() * store_buffers * store_buffer_bytes();
  }
  // Scale and shift of each channel.
  POINTFUSE_HOST_DEVICE constexpr int norm_bytes() const { return block_channels * 8; }
  POINTFUSE_HOST_DEVICE constexpr int barriers() const { return 2 * stages + consumers() * store_buffers; }

  // Where each part begins; the first two need 1024-byte alignment.
  POINTFUSE_HOST_DEVICE constexpr int staging_offset() const { return ring_bytes(); }
  POINTFUSE_HOST_DEVICE constexpr int norm_offset() const { return staging_offset() + staging_bytes(); }
  POINTFUSE_HOST_DEVICE constexpr int barriers_offset() const { return norm_offset() + norm_bytes(); }
  POINTFUSE_HOST_DEVICE constexpr int shared_bytes() const { return barriers_offset() + barriers() * 8; }

  // With split-K the fp32 partial sums lie over the ring: a row of channels for each pixel. The padding spreads the
  // rows that a warp writes at once over the banks.
  POINTFUSE_HOST_DEVICE constexpr int partial_pitch() const { return block_channels + 4; }
  POINTFUSE_HOST_DEVICE constexpr int partial_bytes() const { return block_pixels * partial_pitch() * 4; }
};

constexpr Tile kTiles[] = {
    {128, 256, 4, 64, 2, 1}, {128, 192, 5, 48, 2, 1}, {128, 128, 6, 64, 2, 1},  // throughput
    {64, 192, 3, 48, 2, 2},  {64, 128, 4, 64, 2, 2},  {64, 96, 5, 48, 2, 2},    // latency, and few channels
    {64, 64, 6, 64, 1, 2},   {64, 32, 8, 32, 1, 2},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

namespace detail {

// Of a multiprocessor's 228 KB a block may have 227, and the system takes 1 KB for each block.
constexpr bool fits(const Tile& tile) {
  return tile.blocks_per_multiprocessor * (tile.shared_bytes() + 1024) <= 228 * 1024 &&
         tile.partial_bytes() <= tile.ring_bytes() && tile.store_buffer_bytes() % 1024 == 0;
}
constexpr bool all_fit() {
  for (const Tile& tile : kTiles) {
    if (!fits(tile)) return false;
  }
  return true;
}
static_assert(all_fit(), "a tile exceeds the shared memory");

}  // namespace detail

}  // namespace pointfuse::sm90
