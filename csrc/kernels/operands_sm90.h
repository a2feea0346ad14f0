// What conv_sm90.cuh asks of its operands: the conditions under which tensor maps can describe them.
#pragma once

#include "params.h"
#include "tile_sm90.h"

namespace pointfuse::sm90 {

// The sizes of one of x, y and residual.
struct Extent {
  int64_t batch, channels, height, width;
};

inline Extent x_extent(const Problem& p) { return {p.batch, p.c_in, p.height, p.width}; }
inline Extent y_extent(const Problem& p) { return {p.batch, p.c_out, p.out_height(), p.out_width()}; }

// Elements from a pixel to the next over the whole batch, if they are equally spaced; else 0. Dimensions of size 1 may
// have any stride.
inline int64_t flat_pitch(const Strides& s, const Extent& e) {
  int64_t pitch = 0, span = 1;
  const int64_t sizes[] = {e.width, e.height, e.batch}, strides[] = {s.width, s.height, s.outer};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 1) continue;
    if (pitch == 0) pitch = strides[i];
    if (pitch <= 0 || strides[i] != pitch * span) return 0;
    span *= sizes[i];
  }
  return pitch == 0 ? e.channels : pitch;  // a single pixel has no neighbour
}

// The same within a plane, for planes that are contiguous along their pixels.
inline bool contiguous_planes(const Strides& s, const Extent& e) {
  return (e.width == 1 || s.width == 1) && (e.height == 1 || s.height == e.width);
}

// x lies as [batch, channel, pixel] (NCHW) and not as [batch, pixel, channel] (channels_last).
inline bool pixel_major(const Problem& p) { return p.c_in > 1 && p.x.channel != 1; }

inline bool is_plain_1x1(const Problem& p) {
  return p.taps() == 1 && p.stride_h == 1 && p.stride_w == 1 && p.padding_h == 0 && p.padding_w == 0;
}

// x can be read as rows of channels, one to a pixel; otherwise TMA finds the pixels itself (im2col).
inline bool flat_x(const Problem& p) { return is_plain_1x1(p) && flat_pitch(p.x, x_extent(p)) > 0; }

namespace detail {

// TMA's strides: multiples of 16 bytes, positive and below 2^40.
inline bool is_pitch(int64_t size, int64_t stride, int64_t bytes) {
  return size == 1 || (stride > 0 && stride * bytes % 16 == 0 && stride * bytes < (int64_t{1} << 40));
}

inline bool pitches(const Strides& s, const Extent& e, int64_t bytes, bool channels_are_rows) {
  return is_pitch(e.batch, s.outer, bytes) &&
         (channels_are_rows ? is_pitch(e.channels, s.channel, bytes)
                            : is_pitch(e.height, s.height, bytes) && is_pitch(e.width, s.width, bytes));
}

inline bool is_corner(int64_t offset) { return offset >= -128 && offset <= 127; }

// y or residual: rows of channels.
inline bool is_flat(const Strides& s, const Extent& e) {
  return (e.channels == 1 || s.channel == 1) && flat_pitch(s, e) > 0;
}

inline bool stores_tensor(const Strides& s, const Extent& e, int64_t bytes, int32_t alignment) {
  return alignment >= 16 && is_flat(s, e) && flat_pitch(s, e) * bytes % 16 == 0;
}

inline bool stores_planes(const Strides& s, const Extent& e, int64_t bytes, int32_t alignment) {
  return alignment >= 16 && contiguous_planes(s, e) && pitches(s, e, bytes, true);
}

inline const char* weight_refusal(const Problem& p) {
  const int64_t bytes = element_bytes(p.dtype);
  if (p.weight_alignment < 16) return "the weight's address is not a multiple of 16 bytes";
  if (p.c_in > 1 && p.weight.channel != 1) return "the weight is not contiguous along c_in";
  if (p.kernel_h > 1 && p.kernel_w > 1 && p.weight.height != p.kernel_w * p.weight.width)
    return "the weight's taps are not equally spaced";
  if (!is_pitch(p.kernel_h, p.weight.height, bytes) || !is_pitch(p.kernel_w, p.weight.width, bytes) ||
      !is_pitch(p.c_out, p.weight.outer, bytes))
    return "the weight's strides are not multiples of 16 bytes";
  return nullptr;
}

inline const char* im2col_refusal(const Problem& p) {
  if (p.stride_h > 8 || p.stride_w > 8) return "TMA's im2col strides are at most 8";
  if (p.kernel_h > 128 || p.kernel_w > 128 || !is_corner(-p.padding_h) || !is_corner(-p.padding_w) ||
      !is_corner(p.padding_h - p.kernel_h + 1) || !is_corner(p.padding_w - p.kernel_w + 1))
    return "TMA's im2col corners are 8-bit";
  return nullptr;
}

inline const char* pixel_major_refusal(const Problem& p) {
  const int64_t bytes = element_bytes(p.dtype);
  if (p.dtype == DType::kFloat32) return "TF32 has no pixel-major operand";
  if (!is_plain_1x1(p)) return "NCHW is for 1x1, stride 1, no padding";
  if (!stores_planes(p.x, x_extent(p), bytes, p.x_alignment)) return "x's planes are not multiples of 16 bytes";
  if (!stores_planes(p.y, y_extent(p), bytes, p.y_alignment)) return "y is not NCHW with planes of 16-byte multiples";
  if (p.residual != Residual::kNone && !stores_planes(p.residual_strides, y_extent(p), bytes, p.residual_alignment))
    return "residual is not NCHW with planes of 16-byte multiples";
  return nullptr;
}

inline const char* channel_major_refusal(const Problem& p) {
  if (p.x_alignment < 16) return "x's address is not a multiple of 16 bytes";
  if (!pitches(p.x, x_extent(p), element_bytes(p.dtype), false)) return "x's strides are not multiples of 16 bytes";
  if (!is_flat(p.y, y_extent(p))) return "y is not channels_last with equally spaced pixels";
  if (p.residual != Residual::kNone && !is_flat(p.residual_strides, y_extent(p)))
    return "residual is not channels_last with equally spaced pixels";
  return flat_x(p) ? nullptr : im2col_refusal(p);
}

}  // namespace detail

// Why the kernel cannot take the problem, whatever the tile; null if it can.
inline const char* refusal(const Problem& p) {
  constexpr int64_t kLimit = INT32_MAX - 1024;  // TMA's coordinates are 32-bit, and a tile may begin before the end
  if (p.dtype == DType::kFloat32 && !p.tf32) return "the sm_90 kernel has no strict fp32";
  if (p.pixels() > kLimit || p.batch * p.height * p.width > kLimit || p.c_in > kLimit || p.c_out > kLimit)
    return "a dimension passes 2^31";
  if (const char* reason = detail::weight_refusal(p)) return reason;
  return pixel_major(p) ? detail::pixel_major_refusal(p) : detail::channel_major_refusal(p);
}

// Why a tile cannot take a problem that the kernel can.
inline const char* tile_refusal(const Problem& p, int tile, int split_k) {
  if (tile < 0 || tile >= kTileCount) return "there is no such tile";
  if (split_k != 1 && split_k != 2 && split_k != 4 && split_k != 8) return "a cluster has 1, 2, 4 or 8 blocks";
  if (!pixel_major(p)) return nullptr;
  if (split_k != 1) return "NCHW is not split along k";
  return kTiles[tile].store_pixels == 64 ? nullptr : "the tile is not built for NCHW";
}

// Whether y, and residual where there is one, can move by TMA; otherwise element by element.
inline bool tensor_epilogue(const Problem& p) {
  if (pixel_major(p)) return true;  // or refused
  const int64_t bytes = element_bytes(p.dtype);
  return detail::stores_tensor(p.y, y_extent(p), bytes, p.y_alignment) &&
         (p.residual == Residual::kNone ||
          detail::stores_tensor(p.residual_strides, y_extent(p), bytes, p.residual_alignment));
}

}  // namespace pointfuse::sm90
