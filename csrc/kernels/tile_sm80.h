// The block tiles of conv_sm80.cuh and the shared memory each needs.
#pragma once

#include "params.h"

namespace pointfuse::sm80 {

// One k step of a tile is a row of 128 bytes per channel and per pixel: 64 half-precision or 32 fp32 numbers.
constexpr int kRowBytes = 128;
// Of each pixel of a tile: where it lies in x, later in y and in the residual.
constexpr int kPixelEntryBytes = 16;
// Of each channel of a tile: scale and shift.
constexpr int kChannelEntryBytes = 8;
// The rows of the fp32 output tile are longer by this many floats, so that a warp's accumulators fall on many banks.
constexpr int kOutputPadding = 4;

// A multiprocessor's registers, and what a thread of the general path needs of them.
constexpr int kRegisters = 65536;
constexpr int kGeneralRegisters = 168;

struct Tile {
  int block_channels, block_pixels;
  int warps_channels, warps_pixels;
  int stages;
  int blocks_per_multiprocessor;  // that the registers of the vectorised path suffice for

  POINTFUSE_HOST_DEVICE constexpr int threads() const { return 32 * warps_channels * warps_pixels; }
  POINTFUSE_HOST_DEVICE constexpr int resident_blocks(bool vectorised) const {
    const int general = kRegisters / (threads() * kGeneralRegisters);
    return vectorised || blocks_per_multiprocessor < general ? blocks_per_multiprocessor : general;
  }
  POINTFUSE_HOST_DEVICE constexpr int warp_channels() const { return block_channels / warps_channels; }
  POINTFUSE_HOST_DEVICE constexpr int warp_pixels() const { return block_pixels / warps_pixels; }
  POINTFUSE_HOST_DEVICE constexpr int weight_bytes() const { return block_channels * kRowBytes; }
  POINTFUSE_HOST_DEVICE constexpr int stage_bytes() const { return (block_channels + block_pixels) * kRowBytes; }
  POINTFUSE_HOST_DEVICE constexpr int pipeline_bytes() const { return stages * stage_bytes(); }
  // The outputs as fp32, whichever dimension is contiguous; they take the pipeline's place.
  POINTFUSE_HOST_DEVICE constexpr int output_bytes() const {
    const int smaller = block_channels < block_pixels ? block_channels : block_pixels;
    const int larger = block_channels + block_pixels - smaller;
    return 4 * larger * (smaller + kOutputPadding);
  }
};

constexpr Tile kTiles[] = {
    {128, 128, 2, 4, 3, 2},
    {64, 128, 2, 2, 3, 3},
    {64, 64, 2, 2, 4, 3},
    {64, 32, 2, 2, 4, 4},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

POINTFUSE_HOST_DEVICE constexpr int shared_bytes(const Tile& tile) {
  return tile.pipeline_bytes() + tile.block_pixels * kPixelEntryBytes + tile.block_channels * kChannelEntryBytes;
}

constexpr bool tiles_are_valid() {
  for (const Tile& tile : kTiles) {
    if (tile.output_bytes() > tile.pipeline_bytes() || tile.threads() < tile.block_channels ||
        tile.threads() < tile.block_pixels)
      return false;
  }
  return true;
}
static_assert(tiles_are_valid(), "the output tile fits into the pipeline's memory; a thread for every row");

}  // namespace pointfuse::sm80
