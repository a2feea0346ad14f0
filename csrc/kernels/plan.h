// From a problem and a device to a plan: which kernel, which tile, how K is split, and what it should cost.
//
// Pure and deterministic; plain data in and out, on the host. What a plan means to a block stands in schedule.h, what
// it should cost in cost.h.
#pragma once

#include <climits>
#include <cstdint>
#include <limits>

#include "cost.h"
#include "device.h"
#include "operands_sm90.h"
#include "schedule.h"
#include "tile_sm80.h"
#include "tile_sm90.h"

namespace pointfuse {

// The plan for one choice of kernel, tile and split_k. Where there is none, its kernel is kNone and its refusal says
// why.
Plan make_plan(const Problem& problem, const Device& device, Kernel kernel, int32_t tile, int32_t split_k);

// The plan with the least predicted time over all kernels, tiles and splits that take the problem; of equals the first.
Plan select_plan(const Problem& problem, const Device& device);

// How many parts the statistics of a channel come in: Operands::parts' first size.
inline int64_t statistics_parts(const Plan& plan, const Problem&) { return plan.pixel_tiles; }

// Why one launch cannot do a training forward by this plan; null if it can: all blocks are resident at once, a tile
// each, so that they can wait for one another's statistics with their sums in registers.
inline const char* cooperative_refusal(const Problem& problem, const Plan& plan, const Device& device) {
  if (!problem.statistics) return "there are no statistics to wait for";
  if (plan.kernel != Kernel::kSm90) return "only the sm_90 kernel keeps a tile in registers";
  if (plan.x_pixel_major || !plan.tensor_store) return "y is not channels_last with pixels at multiples of 16 bytes";
  if (tiles(plan) > cost::resident_blocks(plan, device)) return "the tiles are more than the device holds at once";
  return nullptr;
}

// The splits of K that select_plan tries.
constexpr int32_t kSplits[] = {1, 2, 3, 4, 6, 8, 12, 16};

namespace planning {

constexpr int64_t kMaxSize = int64_t{1} << 30;  // of a dimension, so that positions in a padded plane are 32-bit
constexpr int32_t kMaxKernel = 1 << 15;

inline Plan refused(const char* reason) {
  Plan plan{};
  plan.refusal = reason;
  return plan;
}

// Whether the last element's distance from the first, in bytes, stays far below 2^63.
inline bool extent_fits(const Strides& s, int64_t outer, int64_t channels, int64_t height, int64_t width,
                        int32_t bytes) {
  const auto reach = [](int64_t size, int64_t stride) {
    return static_cast<double>(size - 1) * static_cast<double>(stride);
  };
  const double elements =
      reach(outer, s.outer) + reach(channels, s.channel) + reach(height, s.height) + reach(width, s.width);
  return elements * bytes < 0x1p62;
}

inline bool negative(const Strides& s) { return s.outer < 0 || s.channel < 0 || s.height < 0 || s.width < 0; }

inline const char* size_refusal(const Problem& p) {
  if (p.batch < 1 || p.c_in < 1 || p.height < 1 || p.width < 1 || p.c_out < 1) {
    return "every size must be at least 1: an empty tensor needs no kernel";
  }
  if (p.kernel_h < 1 || p.kernel_w < 1 || p.kernel_h > kMaxKernel || p.kernel_w > kMaxKernel) {
    return "the kernel's sizes must be from 1 to 2^15";
  }
  if (p.stride_h < 1 || p.stride_w < 1) return "strides must be at least 1";
  if (p.padding_h < 0 || p.padding_w < 0) return "padding must be at least 0";
  if (p.c_in > kMaxSize || p.c_out > kMaxSize || p.padding_h > kMaxSize / 4 || p.padding_w > kMaxSize / 4 ||
      p.height > kMaxSize - 2 * p.padding_h || p.width > kMaxSize - 2 * p.padding_w) {
    return "channels and the padded plane's sides must be at most 2^30, padding at most 2^28";
  }
  if (p.height + 2 * p.padding_h < p.kernel_h || p.width + 2 * p.padding_w < p.kernel_w) {
    return "the kernel must not be larger than the padded plane";
  }
  return nullptr;
}

inline const char* problem_refusal(const Problem& p) {
  if (const char* reason = size_refusal(p)) return reason;
  const auto planes = static_cast<double>(p.out_height()) * static_cast<double>(p.out_width());
  if (static_cast<double>(p.batch) * planes >= 0x1p62) return "the output must have less than 2^62 pixels";
  const int32_t bytes = element_bytes(p.dtype);
  const bool residual = p.residual != Residual::kNone;
  if (negative(p.x) || negative(p.weight) || negative(p.y) || (residual && negative(p.residual_strides))) {
    return "no tensor may have a negative stride";
  }
  if (!extent_fits(p.x, p.batch, p.c_in, p.height, p.width, bytes) ||
      !extent_fits(p.weight, p.c_out, p.c_in, p.kernel_h, p.kernel_w, bytes) ||
      !extent_fits(p.y, p.batch, p.c_out, p.out_height(), p.out_width(), bytes) ||
      (residual && !extent_fits(p.residual_strides, p.batch, p.c_out, p.out_height(), p.out_width(), bytes))) {
    return "every tensor must span less than 2^62 bytes";
  }
  if (p.statistics && (p.batch_norm || residual || p.activation != Activation::kIdentity)) {
    return "statistics are of the convolution with its bias alone";
  }
  if (p.x_alignment < bytes || p.weight_alignment < bytes || p.y_alignment < bytes ||
      (residual && p.residual_alignment < bytes)) {
    return "every address must be a multiple of an element's size";
  }
  return nullptr;
}

// Vectors: how many bytes a copy may move at once. All its addresses have to be multiples of that, so the tensor's
// address and the strides of all dimensions that it does not run along; those of size 1 have no say.

struct Dimension {
  int64_t size, stride;
};

inline int32_t dividing(int32_t vector, int32_t bytes, Dimension dimension) {
  if (dimension.size == 1) return vector;
  while (vector > bytes && dimension.stride * bytes % vector != 0) vector /= 2;
  return vector;
}

// Along a contiguous dimension; `others` are the rest.
template <class... Dimensions>
int32_t vector_along(int32_t alignment, int32_t bytes, Dimensions... others) {
  int32_t vector = alignment < 16 ? alignment : 16;
  ((vector = dividing(vector, bytes, others)), ...);
  return vector;
}

// Along contiguous channels of rows that lie in `rows`. Their number need not be a multiple: a copy is cut off at a
// row's end.
template <class... Dimensions>
int32_t copy_vector(int32_t alignment, int32_t bytes, Dimension channel, Dimensions... rows) {
  return channel.size > 1 && channel.stride != 1 ? bytes : vector_along(alignment, bytes, rows...);
}

// The address of a row that does not exist is formed too, though nothing is read there: a dimension of size 1 with
// padding counts, and so does the weight's c_out, which a tile may pass.
inline int32_t x_vector(const Problem& p) {
  return copy_vector(p.x_alignment, element_bytes(p.dtype), {p.c_in, p.x.channel}, Dimension{p.batch, p.x.outer},
                     Dimension{p.height + p.padding_h, p.x.height}, Dimension{p.width + p.padding_w, p.x.width});
}

inline int32_t weight_vector(const Problem& p) {
  return copy_vector(p.weight_alignment, element_bytes(p.dtype), {p.c_in, p.weight.channel},
                     Dimension{p.c_out + 1, p.weight.outer}, Dimension{p.kernel_h, p.weight.height},
                     Dimension{p.kernel_w, p.weight.width});
}

// Whether neighbouring pixels, not channels, are neighbours in memory.
inline bool pixel_major(const Strides& s, int64_t channels, int64_t width) {
  if (channels == 1) return true;
  return s.channel != 1 && (width > 1 ? s.width : s.height) < s.channel;
}

// The vector of a store to y (or a load of the residual), along channels or pixels. It divides what it runs along too:
// there are no partial vectors.
inline int32_t output_vector(const Problem& p, const Strides& s, int32_t alignment, bool along_pixels) {
  const int32_t bytes = element_bytes(p.dtype);
  const Dimension outer{p.batch, s.outer}, channel{p.c_out, s.channel}, row{p.out_height(), s.height},
      column{p.out_width(), s.width};
  if (!along_pixels) {
    if (channel.size == 1 || channel.stride != 1) return bytes;
    return vector_along(alignment, bytes, outer, row, column, Dimension{2, channel.size});
  }
  if (column.size > 1 && column.stride != 1) return bytes;
  if (row.size == 1 || row.stride == column.size) {
    return vector_along(alignment, bytes, outer, channel, Dimension{2, row.size * column.size});
  }
  return vector_along(alignment, bytes, outer, channel, row, Dimension{2, column.size});
}

inline void plan_operands(Plan& plan, const Problem& p) {
  if (plan.kernel == Kernel::kSm90) {
    plan.x_pixel_major = plan.y_pixel_major = sm90::pixel_major(p);
    plan.tensor_store = sm90::tensor_epilogue(p);
    return;
  }
  const int32_t bytes = element_bytes(p.dtype);
  plan.x_vector = x_vector(p);
  plan.weight_vector = weight_vector(p);
  plan.vectorised = plan.x_vector == 16 && plan.weight_vector == 16;
  plan.x_pixel_major = plan.x_vector == bytes && pixel_major(p.x, p.c_in, p.width);
  plan.y_pixel_major = pixel_major(p.y, p.c_out, p.out_width());
  plan.y_vector = output_vector(p, p.y, p.y_alignment, plan.y_pixel_major);
  if (p.residual != Residual::kNone) {
    const int32_t vector = output_vector(p, p.residual_strides, p.residual_alignment, plan.y_pixel_major);
    plan.y_vector = plan.y_vector < vector ? plan.y_vector : vector;
  }
}

inline const char* sm80_refusal(const Device& device) {
  return device.architecture < 80 ? "the kernels need compute capability 8.0 or more" : nullptr;
}

inline const char* sm90_refusal(const Problem& p, const Device& device, int32_t tile, int32_t split_k) {
  if (device.architecture != 90) return "the sm_90 kernel needs compute capability 9.0";
  if (const char* reason = sm90::refusal(p)) return reason;
  if (p.statistics && split_k > 1) return "a cluster's blocks have no statistics of a whole tile of pixels";
  return sm90::tile_refusal(p, tile, split_k);
}

inline void take_tile(Plan& plan) {
  if (plan.kernel == Kernel::kSm90) {
    const sm90::Tile& tile = sm90::kTiles[plan.tile];
    plan.block_channels = tile.block_channels;
    plan.block_pixels = tile.block_pixels;
    plan.stages = tile.stages;
    plan.threads = tile.threads();
    plan.shared_bytes = tile.shared_bytes();
  } else {
    const sm80::Tile& tile = sm80::kTiles[plan.tile];
    plan.block_channels = tile.block_channels;
    plan.block_pixels = tile.block_pixels;
    plan.stages = tile.stages;
    plan.threads = tile.threads();
    plan.shared_bytes = sm80::shared_bytes(tile);
  }
}

}  // namespace planning

inline Plan make_plan(const Problem& p, const Device& device, Kernel kernel, int32_t tile, int32_t split_k) {
  using namespace planning;
  if (const char* reason = problem_refusal(p)) return refused(reason);
  if (kernel == Kernel::kNone) return refused("the kernel must be sm_80 or sm_90");
  const bool sm90 = kernel == Kernel::kSm90;
  if (tile < 0 || tile >= (sm90 ? sm90::kTileCount : sm80::kTileCount)) return refused("the kernel has no such tile");
  if (const char* reason = sm90 ? sm90_refusal(p, device, tile, split_k) : sm80_refusal(device)) return refused(reason);

  Plan plan{};
  plan.kernel = kernel;
  plan.tile = tile;
  plan.split_k = split_k;
  plan.cluster = sm90 ? split_k : 1;
  plan.block_k = 128 / element_bytes(p.dtype);
  take_tile(plan);
  plan_operands(plan, p);
  plan.planes = sm90 && plan.x_pixel_major ? p.batch : 1;

  if (p.taps() * ceil_div(p.c_in, plan.block_k) > INT_MAX) return refused("there must be less than 2^31 k steps");
  if (split_k < 1 || split_k > k_steps(p, plan.block_k)) return refused("split_k must be from 1 to the k steps");
  if (cost::occupancy(plan, device) == 0)
    return refused("the tile needs more shared memory or threads than a block has");
  const int64_t resident = cost::resident_blocks(plan, device);
  if (resident == 0) return refused("the cluster does not fit on the device");

  plan.channel_tiles = ceil_div(p.c_out, plan.block_channels);
  plan.pixel_tiles = plan.planes * ceil_div(p.pixels() / plan.planes, plan.block_pixels);
  if (static_cast<double>(plan.channel_tiles) * static_cast<double>(plan.pixel_tiles) * split_k >= 0x1p62) {
    return refused("there must be less than 2^62 tiles");
  }
  const int64_t blocks = tiles(plan) * split_k;
  plan.grid = sm90 && blocks > resident ? resident : blocks;
  if (plan.grid > INT_MAX) return refused("the grid must have less than 2^31 blocks");
  if (!sm90 && split_k > 1) plan.workspace_bytes = 4 * blocks * plan.block_channels * plan.block_pixels;
  plan.floor_us = static_cast<float>(cost::floor_us(p, device));
  plan.predicted_us = static_cast<float>(predict(p, device, plan).total_us());
  return plan;
}

inline Plan select_plan(const Problem& p, const Device& device) {
  Plan best = planning::refused("");
  best.predicted_us = std::numeric_limits<float>::infinity();
  const auto consider = [&](Kernel kernel, int32_t tile) {
    for (const int32_t split_k : kSplits) {
      const Plan plan = make_plan(p, device, kernel, tile, split_k);
      if (!plan.refusal && plan.predicted_us < best.predicted_us) best = plan;
    }
  };
  for (int32_t tile = 0; tile < sm90::kTileCount; ++tile) consider(Kernel::kSm90, tile);
  for (int32_t tile = 0; tile < sm80::kTileCount; ++tile) consider(Kernel::kSm80, tile);
  // What no plan takes, the universal kernel refuses too, and its reason is the general one.
  return best.refusal ? make_plan(p, device, Kernel::kSm80, 0, 1) : best;
}

}  // namespace pointfuse
