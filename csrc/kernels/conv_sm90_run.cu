// The entry to conv_sm90.cuh: makes the tensor maps that a launch needs, or finds them, and picks the dtype's file.
#include <algorithm>
#include <array>
#include <mutex>
#include <unordered_map>

#include "forward_sm90.cuh"
#include "operands_sm90.h"
#include "run.h"

namespace pointfuse::sm90 {

extern template cudaError_t launch_conv<half_t>(const Arguments&, cudaStream_t);
extern template cudaError_t launch_conv<bfloat16_t>(const Arguments&, cudaStream_t);
extern template cudaError_t launch_conv<float>(const Arguments&, cudaStream_t);
extern template cudaError_t launch_forward<half_t>(const ForwardArguments&, cudaStream_t);
extern template cudaError_t launch_forward<bfloat16_t>(const ForwardArguments&, cudaStream_t);
extern template cudaError_t launch_forward<float>(const ForwardArguments&, cudaStream_t);

namespace {

struct TensorMaps {
  TensorMap weight, x, y, residual;
};

// A tensor for a map, the contiguous dimension first; `strides`, in elements, are of the others.
template <int kRank>
struct Shape {
  int64_t sizes[kRank], strides[kRank - 1];

  // Of a dimension of size 1 the stride may be anything; the map gets one that encloses the dimension below.
  std::array<int64_t, kRank - 1> byte_strides(DType dtype) const {
    constexpr int64_t kUnit = 16;
    std::array<int64_t, kRank - 1> result;
    int64_t below = element_bytes(dtype);
    for (int i = 0; i < kRank - 1; ++i) {
      const int64_t enclosing = (below * sizes[i] + kUnit - 1) / kUnit * kUnit;
      below = result[i] = sizes[i + 1] == 1 ? enclosing : strides[i] * element_bytes(dtype);
    }
    return result;
  }
};

// What a tensor is to the tensor cores: a factor, rounded to TF32 if it is fp32, or not theirs.
enum class Role : bool { kFactor, kOther };

// A box's rows are 128 bytes.
template <int kRank>
cudaError_t make_map(TensorMap* map, DType dtype, Role role, const void* base, const Shape<kRank>& shape,
                     const std::array<int32_t, kRank - 1>& outer_box) {
  int32_t box[kRank] = {kRowBytes / element_bytes(dtype)};
  std::copy(outer_box.begin(), outer_box.end(), box + 1);
  return make_tensor_map(map, dtype, kRank, base, shape.sizes, shape.byte_strides(dtype).data(), box, true,
                         role == Role::kFactor);
}

cudaError_t make_weight_map(TensorMap* map, const Problem& p, const void* weight, const Tile& tile) {
  const int64_t tap_stride = p.kernel_w > 1 ? p.weight.width : p.weight.height;
  const Shape<3> shape{{p.c_in, p.taps(), p.c_out}, {tap_stride, p.weight.outer}};
  return make_map<3>(map, p.dtype, Role::kFactor, weight, shape, {1, tile.block_channels});
}

// [pixel][channel]
cudaError_t make_flat_map(TensorMap* map, const Problem& p, Role role, const void* base, const Strides& s,
                          const Extent& e, int32_t box_pixels) {
  const Shape<2> shape{{e.channels, e.batch * e.height * e.width}, {flat_pitch(s, e)}};
  return make_map<2>(map, p.dtype, role, base, shape, {box_pixels});
}

// [n][channel][pixel]
cudaError_t make_plane_map(TensorMap* map, const Problem& p, Role role, const void* base, const Strides& s,
                           const Extent& e, int32_t box_channels) {
  const Shape<3> shape{{e.height * e.width, e.channels, e.batch}, {s.channel, s.outer}};
  return make_map<3>(map, p.dtype, role, base, shape, {box_channels, 1});
}

cudaError_t make_im2col_map(TensorMap* map, const Problem& p, const void* x, const Tile& tile) {
  const Shape<4> shape{{p.c_in, p.width, p.height, p.batch}, {p.x.width, p.x.height, p.x.outer}};
  const int32_t lower[] = {-p.padding_w, -p.padding_h};
  const int32_t upper[] = {p.padding_w - p.kernel_w + 1, p.padding_h - p.kernel_h + 1};
  const int32_t steps[] = {p.stride_w, p.stride_h};
  return make_tensor_map_im2col(map, p.dtype, x, shape.sizes, shape.byte_strides(p.dtype).data(), lower, upper,
                                kRowBytes / element_bytes(p.dtype), tile.block_pixels, steps, true);
}

cudaError_t make_output_map(TensorMap* map, const Plan& plan, const Problem& p, const void* base, const Strides& s) {
  if (plan.x_pixel_major) return make_plane_map(map, p, Role::kOther, base, s, y_extent(p), kWarpgroupChannels);
  const int32_t pixels = kTiles[plan.tile].store_pixels * 2 / element_bytes(p.dtype);
  return make_flat_map(map, p, Role::kOther, base, s, y_extent(p), pixels);
}

cudaError_t make_maps(TensorMaps* maps, const Plan& plan, const Problem& p, const Operands& operands) {
  const Tile& tile = kTiles[plan.tile];
  if (const cudaError_t error = make_weight_map(&maps->weight, p, operands.weight, tile)) return error;
  const cudaError_t error =
      plan.x_pixel_major
          ? make_plane_map(&maps->x, p, Role::kFactor, operands.x, p.x, x_extent(p), kRowBytes / element_bytes(p.dtype))
      : flat_x(p) ? make_flat_map(&maps->x, p, Role::kFactor, operands.x, p.x, x_extent(p), tile.block_pixels)
                  : make_im2col_map(&maps->x, p, operands.x, tile);
  if (error || !plan.tensor_store) return error;
  if (const cudaError_t error = make_output_map(&maps->y, plan, p, operands.y, p.y)) return error;
  if (p.residual == Residual::kNone) return cudaSuccess;
  return make_output_map(&maps->residual, plan, p, operands.residual, p.residual_strides);
}

// Everything that the maps depend on.
using Key = std::array<int64_t, 36>;

void append(Key& key, size_t& length, std::initializer_list<int64_t> values) {
  for (const int64_t value : values) key.at(length++) = value;
}

Key make_key(const Plan& plan, const Problem& p, const Operands& operands) {
  Key key{};
  size_t length = 0;
  append(key, length, {plan.tile, plan.x_pixel_major, plan.tensor_store, int64_t(p.dtype), int64_t(p.residual)});
  append(key, length, {p.batch, p.c_in, p.height, p.width, p.c_out, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w});
  append(key, length, {p.padding_h, p.padding_w});
  for (const Strides& s : {p.x, p.weight, p.y, p.residual_strides})
    append(key, length, {s.outer, s.channel, s.height, s.width});
  for (const void* base : {operands.x, operands.weight, static_cast<const void*>(operands.y), operands.residual})
    append(key, length, {reinterpret_cast<int64_t>(base)});
  return key;
}

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0;
    for (const int64_t value : key) hash = (hash ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15 + (hash >> 29);
    return hash;
  }
};

// Encoding a map takes the driver about as long as a launch; a frozen model's maps are all found here. Addresses come
// and go, so that the number of maps is bounded by forgetting them all.
cudaError_t find_maps(TensorMaps* maps, const Plan& plan, const Problem& p, const Operands& operands) {
  constexpr size_t kCapacity = 4096;
  static std::mutex mutex;
  static std::unordered_map<Key, TensorMaps, KeyHash> known;

  const Key key = make_key(plan, p, operands);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) {
    *maps = found->second;
    return cudaSuccess;
  }
  if (const cudaError_t error = make_maps(maps, plan, p, operands)) return error;
  if (known.size() >= kCapacity) known.clear();
  known.emplace(key, *maps);
  return cudaSuccess;
}

}  // namespace

namespace {

cudaError_t make_arguments(Arguments* result, const Plan& plan, const Problem& problem, const Operands& operands) {
  TensorMaps maps{};
  if (const cudaError_t error = find_maps(&maps, plan, problem, operands)) return error;
  Arguments& args = *result;
  args.weight = maps.weight;
  args.x = maps.x;
  args.y = maps.y;
  args.residual = maps.residual;
  args.problem = problem;
  args.plan = plan;
  args.operands = operands;
  args.steps = k_steps(problem, plan.block_k);
  args.tiles = tiles(plan);
  args.tile_stride = tile_stride(plan);
  args.im2col = !plan.x_pixel_major && !flat_x(problem);
  args.plane_pixels = problem.pixels() / plan.planes;
  args.y_pitch = flat_pitch(problem.y, y_extent(problem));
  args.residual_pitch = flat_pitch(problem.residual_strides, y_extent(problem));
  return cudaSuccess;
}

}  // namespace

cudaError_t run(const Plan& plan, const Problem& problem, const Operands& operands, cudaStream_t stream) {
  Arguments args{};
  if (const cudaError_t error = make_arguments(&args, plan, problem, operands)) return error;
  switch (problem.dtype) {
    case DType::kFloat16:
      return launch_conv<half_t>(args, stream);
    case DType::kBFloat16:
      return launch_conv<bfloat16_t>(args, stream);
    default:
      return launch_conv<float>(args, stream);
  }
}

cudaError_t run_forward(const Plan& plan, const Problem& problem, const Operands& operands, const Forward& forward,
                        cudaStream_t stream) {
  Problem unit = problem;
  unit.activation = forward.activation;
  unit.residual = forward.residual ? forward.residual_order : Residual::kNone;
  unit.residual_strides = problem.y;
  Operands with_out = operands;
  with_out.residual = forward.residual;
  with_out.negative_slope = forward.negative_slope;
  ForwardArguments args{};
  args.forward = forward;
  if (const cudaError_t error = make_arguments(&args.conv, plan, unit, with_out)) return error;
  with_out.y = forward.out;
  TensorMaps maps{};
  if (const cudaError_t error = find_maps(&maps, plan, unit, with_out)) return error;
  args.out = maps.y;
  switch (problem.dtype) {
    case DType::kFloat16:
      return launch_forward<half_t>(args, stream);
    case DType::kBFloat16:
      return launch_forward<bfloat16_t>(args, stream);
    default:
      return launch_forward<float>(args, stream);
  }
}

}  // namespace pointfuse::sm90
