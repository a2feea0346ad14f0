// Tensor maps, and what box of global memory an access through one means.
#pragma once

#include <algorithm>

#include "cuda_words.h"
#include "machine.h"
#include "params.h"

namespace pointfuse {

struct alignas(64) TensorMap {
  static constexpr int kMaxRank = 5;

  const char* base;
  int rank, element_bytes;
  int64_t sizes[kMaxRank], byte_strides[kMaxRank];  // of a missing dimension: 1, 0
  int box[kMaxRank];                                // im2col: channels and pixels
  bool swizzled, im2col, round_to_tf32;
  int lower_corner[2], upper_corner[2], element_strides[2];  // w, h

  int64_t box_bytes() const {
    int64_t bytes = element_bytes;
    for (int extent : box) bytes *= extent;
    return bytes;
  }
};

namespace host {

using host_cuda::fail;
using host_cuda::format;

// What cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col demand of both kinds of map. Empty if all is well.
inline std::string check_tensor(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.base) % 16) return "the base address is not a multiple of 16";
  for (int i = 0; i < map.rank; ++i) {
    if (map.sizes[i] < 1 || map.sizes[i] > int64_t(1) << 32) return format("size %lld", (long long)map.sizes[i]);
    if (i && (map.byte_strides[i] % 16 || map.byte_strides[i] < 0 || map.byte_strides[i] >= int64_t(1) << 40))
      return format("a stride of %lld bytes", (long long)map.byte_strides[i]);
  }
  const int inner_bytes = map.box[0] * map.element_bytes;
  if (inner_bytes % 16) return format("a box with rows of %d bytes", inner_bytes);
  if (map.swizzled && inner_bytes > 128) return format("a box with rows of %d bytes, swizzled by 128", inner_bytes);
  return "";
}

inline TensorMap empty_map(DType dtype, int rank, const void* base, const int64_t* sizes, const int64_t* byte_strides,
                           bool round_to_tf32) {
  TensorMap map{};
  map.base = static_cast<const char*>(base);
  map.rank = rank;
  map.element_bytes = element_bytes(dtype);
  map.round_to_tf32 = round_to_tf32 && dtype == DType::kFloat32;
  std::fill_n(map.sizes, TensorMap::kMaxRank, 1);
  std::fill_n(map.box, TensorMap::kMaxRank, 1);
  std::copy_n(sizes, rank, map.sizes);
  map.byte_strides[0] = map.element_bytes;
  std::copy_n(byte_strides, rank - 1, map.byte_strides + 1);
  return map;
}

constexpr int kChunkBytes = 16;

// 16 bytes of a box: where in the box they lie, and which of them come from where. The others are out of bounds.
struct Chunk {
  int64_t offset;
  const char* global;
  int begin, end;
};

// The 128-byte swizzle: bits 4 to 6 of a shared address are flipped by bits 7 to 9.
inline int64_t place(int64_t offset, bool swizzled) { return swizzled ? offset ^ (offset >> 7 & 7) << 4 : offset; }

inline void check_chunks(const std::vector<Chunk>& chunks, const char* name) {
  for (const Chunk& chunk : chunks)
    if (chunk.end > chunk.begin) host_cuda::check_global(chunk.global + chunk.begin, chunk.end - chunk.begin, 1, name);
}

// One row of a box: `count` elements from coordinates `at` on along dimension 0.
inline void add_row(std::vector<Chunk>& chunks, const TensorMap& map, const std::array<int64_t, 5>& at, int count) {
  bool inside = true;
  const char* row = map.base;
  for (int i = 0; i < TensorMap::kMaxRank; ++i) {
    inside = inside && (i == 0 || (at[i] >= 0 && at[i] < map.sizes[i]));
    row += at[i] * map.byte_strides[i];
  }
  const int64_t low = -at[0] * map.element_bytes, high = (map.sizes[0] - at[0]) * map.element_bytes;
  for (int64_t byte = 0; byte < int64_t(count) * map.element_bytes; byte += kChunkBytes) {
    const int64_t begin = std::clamp<int64_t>(low - byte, 0, kChunkBytes);
    const int64_t end = std::clamp<int64_t>(high - byte, 0, kChunkBytes);
    chunks.push_back({int64_t(chunks.size()) * kChunkBytes, row + byte, int(begin), inside ? int(end) : 0});
  }
}

inline std::vector<Chunk> tile_chunks(const char* name, const TensorMap& map, std::vector<int64_t> corner) {
  if (map.im2col || int(corner.size()) != map.rank) fail(format("%s: the map has another kind or rank", name));
  corner.resize(TensorMap::kMaxRank, 0);
  std::vector<Chunk> chunks;
  for (int i4 = 0; i4 < map.box[4]; ++i4)
    for (int i3 = 0; i3 < map.box[3]; ++i3)
      for (int i2 = 0; i2 < map.box[2]; ++i2)
        for (int i1 = 0; i1 < map.box[1]; ++i1)
          add_row(chunks, map, {corner[0], corner[1] + i1, corner[2] + i2, corner[3] + i3, corner[4] + i4}, map.box[0]);
  return chunks;
}

// From (w, h, n) on, base pixels run along w, then h, then n through the bounding box, which reaches from the lower
// corner to the plane's end plus the upper corner; what is read lies at the offset from each.
inline std::vector<Chunk> im2col_chunks(const char* name, const TensorMap& map, int c, int64_t w, int64_t h, int64_t n,
                                        int offset_w, int offset_h) {
  if (!map.im2col) fail(format("%s: the map is not made for im2col", name));
  if (offset_w < 0 || offset_w > 255 || offset_h < 0 || offset_h > 255)
    fail(format("%s: an offset of (%d, %d)", name, offset_w, offset_h));
  const int64_t last_w = map.sizes[1] - 1 + map.upper_corner[0], last_h = map.sizes[2] - 1 + map.upper_corner[1];
  if (w < map.lower_corner[0] || w > last_w || h < map.lower_corner[1] || h > last_h)
    fail(format("%s: (w %lld, h %lld) lies outside the bounding box", name, (long long)w, (long long)h));
  std::vector<Chunk> chunks;
  for (int pixel = 0; pixel < map.box[1]; ++pixel) {
    add_row(chunks, map, {c, w + offset_w, h + offset_h, n, 0}, map.box[0]);
    w += map.element_strides[0];
    if (w <= last_w) continue;
    w = map.lower_corner[0];
    h += map.element_strides[1];
    if (h <= last_h) continue;
    h = map.lower_corner[1];
    ++n;
  }
  return chunks;
}

}  // namespace host

inline cudaError_t make_tensor_map(TensorMap* map, DType dtype, int rank, const void* base, const int64_t* sizes,
                                   const int64_t* byte_strides, const int32_t* box, bool swizzle_128b,
                                   bool round_to_tf32 = false) {
  if (rank < 1 || rank > TensorMap::kMaxRank) return host::refuse(cudaErrorInvalidValue, "make_tensor_map: rank");
  *map = host::empty_map(dtype, rank, base, sizes, byte_strides, round_to_tf32);
  map->swizzled = swizzle_128b;
  std::copy_n(box, rank, map->box);
  std::string wrong = host::check_tensor(*map);
  for (int i = 0; i < rank; ++i)
    if (box[i] < 1 || box[i] > 256) wrong = host_cuda::format("a box of %d along dimension %d", box[i], i);
  return wrong.empty() ? cudaSuccess : host::refuse(cudaErrorInvalidValue, "make_tensor_map: " + wrong);
}

inline cudaError_t make_tensor_map_im2col(TensorMap* map, DType dtype, const void* base, const int64_t sizes[4],
                                          const int64_t byte_strides[3], const int32_t lower_corner[2],
                                          const int32_t upper_corner[2], int channels_per_pixel, int pixels_per_column,
                                          const int32_t element_strides[2], bool round_to_tf32 = false) {
  *map = host::empty_map(dtype, 4, base, sizes, byte_strides, round_to_tf32);
  map->swizzled = map->im2col = true;
  map->box[0] = channels_per_pixel;
  map->box[1] = pixels_per_column;
  std::string wrong = host::check_tensor(*map);
  if (channels_per_pixel < 1 || channels_per_pixel > 256) wrong = "channels per pixel";
  if (pixels_per_column < 1 || pixels_per_column > 1024) wrong = "pixels per column";
  for (int i = 0; i < 2; ++i) {
    const int lower = map->lower_corner[i] = lower_corner[i], upper = map->upper_corner[i] = upper_corner[i];
    map->element_strides[i] = element_strides[i];
    if (lower < -128 || lower > 127 || upper < -128 || upper > 127) wrong = "a corner beyond [-128, 127]";
    if (sizes[1 + i] + upper - lower < 1) wrong = "an empty bounding box";
    if (element_strides[i] < 1 || element_strides[i] > 8) wrong = "an element stride beyond [1, 8]";
  }
  return wrong.empty() ? cudaSuccess : host::refuse(cudaErrorInvalidValue, "make_tensor_map_im2col: " + wrong);
}

}  // namespace pointfuse
