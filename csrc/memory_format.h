// PyTorch's rule for the memory format of a convolution's output: channels_last if the input or the weight is.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace pointfuse {

// Whether PyTorch takes a tensor [outer, channels, height, width] for channels_last, from its strides: each dimension,
// innermost first, must step over the one before. Where both formats fit (one channel, or planes of one pixel) it is
// contiguous.
inline bool is_channels_last(const int64_t* sizes, const int64_t* strides) {
  if (strides[1] == 0) return false;
  int64_t least = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    if (d == 0 && least == strides[1]) return false;
    least = strides[d];
    if (sizes[d] > 1) least *= sizes[d];
  }
  return true;
}

inline void dense_strides(const int64_t* sizes, bool channels_last, int64_t* strides) {
  const int64_t channels = sizes[1], height = sizes[2], width = sizes[3];
  strides[0] = channels * height * width;
  strides[1] = channels_last ? 1 : height * width;
  strides[2] = channels_last ? width * channels : width;
  strides[3] = channels_last ? channels : 1;
}

}  // namespace pointfuse
