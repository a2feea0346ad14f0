// What a plan should cost, in microseconds:
//
//   launch + fill + max(arithmetic, chip, memory) + epilogue + reduction
//
// with nothing in the caches and kernels queued back to back. It serves to compare plans of a problem, so each term is
// as simple as the comparison allows; the constants are round figures, each with its source.
#pragma once

#include "device.h"
#include "schedule.h"
#include "tile_sm80.h"
#include "tile_sm90.h"

namespace pointfuse {

struct Cost {
  double launch_us;      // from the end of the kernel before to the first load
  double fill_us;        // the first load's latency
  double arithmetic_us;  // the busiest multiprocessor's k steps
  double chip_us;        // loads of all tiles from L2
  double memory_us;      // every tensor once from or to device memory
  double epilogue_us;    // what is not hidden behind a main loop
  double reduction_us;   // of a split K

  double total_us() const {
    const double busy = arithmetic_us > chip_us ? arithmetic_us : chip_us;
    return launch_us + fill_us + (busy > memory_us ? busy : memory_us) + epilogue_us + reduction_us;
  }
};

namespace cost {

// Large products reach 81% of an H100's datasheet rate in cuBLAS, plain copies 90% of its bandwidth. The strict fp32
// main loop waits for shared memory about as often as it multiplies.
constexpr double kSustainedRate = 0.81, kSustainedStrictRate = 0.6, kSustainedBandwidth = 0.9;
// Bytes per clock and multiprocessor: from L2 when all ask (products in 128x256 tiles take 31 at 610 TFLOP/s on an
// H100), from L2 when one asks, from shared memory, and from another block's shared memory.
constexpr double kL2Bytes = 32.0, kL2BytesAlone = 64.0, kSharedBytes = 128.0, kClusterBytes = 40.0;
// From a request to device memory to the data's arrival.
constexpr double kLatencyUs = 0.6;
// Between kernels that do nothing: with programmatic dependent launch, for which both kernels are compiled on 9.0, and
// without.
constexpr double kDependentLaunchUs = 1.0, kLaunchUs = 2.0;
// Of an epilogue: what does not depend on the tile, and clocks for each output of a thread.
constexpr double kEpilogueUs = 0.4, kOutputClocks = 16.0;
// The barriers of a cluster's reduction.
constexpr double kClusterUs = 1.0;
// Clocks of a k step in which a lone block's tensor cores wait: on sm_80 for the block's barrier and the first
// operands; on sm_90 a producer runs ahead.
constexpr double kStepClocksSm80 = 200.0, kStepClocksSm90 = 40.0;
// Clocks for 32 threads' copies of an element or a short vector: address, bounds, load, store.
constexpr double kShortCopyClocks = 4.0;
// A graphics processing cluster, within which a cluster of blocks has to lie, has at most so many multiprocessors.
constexpr int32_t kMultiprocessorsPerGpc = 18;

constexpr double larger(double a, double b) { return a > b ? a : b; }

// The share of the tensor cores that mma.sync can use: on Hopper 63% (Luo et al., arXiv 2501.12084, 2025), on
// data-centre Blackwell, whose rate only tcgen05 reaches, a quarter (assumed).
constexpr double mma_sync_share(const Device& device) {
  return device.architecture / 10 == 9 ? 0.63 : device.architecture / 10 == 10 ? 0.25 : 1.0;
}

inline double launch_us(const Device& device) { return device.architecture == 90 ? kDependentLaunchUs : kLaunchUs; }

// TFLOP/s for the problem's dtype. Strict fp32 is the faster of plain arithmetic and three TF32 products for one.
inline double peak_tflops(const Problem& p, const Device& device) {
  if (p.dtype != DType::kFloat32) return device.half_tflops;
  if (p.tf32) return device.tf32_tflops;
  return larger(device.tf32_tflops / 3, device.fp32_tflops);
}

// What the kernel reaches of it in a main loop. Strict fp32 is plain arithmetic, in the sm_80 kernel.
inline double kernel_tflops(const Problem& p, const Device& device, Kernel kernel) {
  if (p.dtype == DType::kFloat32 && !p.tf32) return kSustainedStrictRate * device.fp32_tflops;
  return kSustainedRate * peak_tflops(p, device) * (kernel == Kernel::kSm90 ? 1.0 : mma_sync_share(device));
}

inline double flops(const Problem& p) {
  return 2.0 * static_cast<double>(p.pixels()) * static_cast<double>(p.c_out) * static_cast<double>(p.c_in) * p.taps();
}

// Rows (or columns) of the input that some output needs.
inline double touched(int64_t size, int64_t out, int32_t kernel, int32_t stride) {
  const int64_t span = stride < kernel ? (out - 1) * stride + kernel : out * kernel;
  return static_cast<double>(span < size ? span : size);
}

inline double weight_bytes(const Problem& p) {
  return static_cast<double>(p.c_out) * static_cast<double>(p.c_in) * p.taps() * element_bytes(p.dtype);
}

// Every tensor once.
inline double tensor_bytes(const Problem& p) {
  const double x = static_cast<double>(p.batch) * static_cast<double>(p.c_in) *
                   touched(p.height, p.out_height(), p.kernel_h, p.stride_h) *
                   touched(p.width, p.out_width(), p.kernel_w, p.stride_w);
  const double y = static_cast<double>(p.pixels()) * static_cast<double>(p.c_out);
  return (x + y * (p.residual == Residual::kNone ? 1 : 2)) * element_bytes(p.dtype) + weight_bytes(p);
}

// No kernel can be faster: the arithmetic at the datasheet's rate, or every tensor once at the datasheet's bandwidth.
inline double floor_us(const Problem& p, const Device& device) {
  const double arithmetic = flops(p) / peak_tflops(p, device) * 1e-6;
  const double memory = tensor_bytes(p) / device.memory_gb_s * 1e-3;
  return arithmetic > memory ? arithmetic : memory;
}

// Registers of a thread: what the kernels' launch bounds allow.
inline int32_t registers_per_thread(const Plan& plan) {
  const int32_t blocks = plan.kernel == Kernel::kSm90 ? sm90::kTiles[plan.tile].blocks_per_multiprocessor
                                                      : sm80::kTiles[plan.tile].resident_blocks(plan.vectorised);
  const auto registers = static_cast<int32_t>(kRegistersPerMultiprocessor / (plan.threads * blocks) / 8 * 8);
  return registers < 255 ? registers : 255;
}

// Blocks that a multiprocessor holds at once; 0 if not even one.
inline int32_t occupancy(const Plan& plan, const Device& device) {
  if (plan.threads > 1024 || plan.shared_bytes > device.shared_bytes_per_block) return 0;
  int64_t blocks = device.shared_bytes_per_multiprocessor / (plan.shared_bytes + kReservedSharedBytes);
  const int64_t by_registers = kRegistersPerMultiprocessor / (registers_per_thread(plan) * plan.threads);
  if (blocks > by_registers) blocks = by_registers;
  const int32_t by_threads = threads_per_multiprocessor(device) / plan.threads;
  if (blocks > by_threads) blocks = by_threads;
  const int32_t limit = blocks_per_multiprocessor(device);
  return static_cast<int32_t>(blocks < limit ? blocks : limit);
}

// Blocks that the device holds at once, in whole clusters.
inline int64_t resident_blocks(const Plan& plan, const Device& device) {
  const int64_t per_multiprocessor = occupancy(plan, device);
  if (plan.cluster == 1) return device.multiprocessors * per_multiprocessor;
  const int64_t gpcs = ceil_div(device.multiprocessors, kMultiprocessorsPerGpc);
  return gpcs * (device.multiprocessors / gpcs * per_multiprocessor / plan.cluster) * plan.cluster;
}

// Clocks in which shared memory delivers and takes a k step's operands. Each warp (sm_80) or warpgroup (sm_90) reads
// its own rows of both operands; the copy writes each row once.
inline double shared_clocks(const Plan& plan) {
  int32_t rows = plan.block_channels + plan.block_pixels;
  if (plan.kernel == Kernel::kSm90) {
    rows += plan.block_channels + sm90::kTiles[plan.tile].consumers() * plan.block_pixels;
  } else {
    const sm80::Tile& tile = sm80::kTiles[plan.tile];
    rows += plan.block_channels * tile.warps_pixels + plan.block_pixels * tile.warps_channels;
  }
  return rows * 128 / kSharedBytes;
}

// Clocks in which a k step's operands pass through the load units where 16-byte copies are not allowed.
inline double copy_clocks(const Problem& p, const Plan& plan) {
  if (plan.kernel == Kernel::kSm90) return 0.0;
  const double row = static_cast<double>(p.c_in < plan.block_k ? p.c_in : plan.block_k) * element_bytes(p.dtype);
  const double copies = (plan.weight_vector == 16 ? 0.0 : plan.block_channels * row / plan.weight_vector) +
                        (plan.x_vector == 16 ? 0.0 : plan.block_pixels * row / plan.x_vector);
  return copies / 32 * kShortCopyClocks;
}

// Clocks of a k step on a multiprocessor that always has another one to work on.
inline double step_clocks(const Problem& p, const Device& device, const Plan& plan) {
  const double flops = 2.0 * plan.block_channels * plan.block_pixels * plan.block_k;
  const double flops_per_clock =
      kernel_tflops(p, device, plan.kernel) * 1e3 / (device.multiprocessors * device.clock_ghz);
  return larger(larger(flops / flops_per_clock, shared_clocks(plan)), copy_clocks(p, plan));
}

}  // namespace cost

inline Cost predict(const Problem& p, const Device& device, const Plan& plan) {
  using namespace cost;
  const bool sm90 = plan.kernel == Kernel::kSm90;
  const double clocks_per_us = device.clock_ghz * 1e3;
  const int64_t blocks = tiles(plan) * plan.split_k;
  const int64_t resident = resident_blocks(plan, device);
  const int64_t per_multiprocessor = occupancy(plan, device);
  const int64_t multiprocessors = resident / per_multiprocessor;

  // The busiest multiprocessor works on `items` blocks' worth of tiles in `rounds`, sharing its tensor cores.
  const int64_t rounds = ceil_div(blocks, resident);
  const int64_t items = ceil_div(blocks, multiprocessors);
  const double steps = static_cast<double>(ceil_div(k_steps(p, plan.block_k), plan.split_k));

  const double step = step_clocks(p, device, plan);
  // A lone block waits at each step; and it cannot run faster than its stages' loads come back.
  const double lone_step =
      larger(step + (sm90 ? kStepClocksSm90 : kStepClocksSm80), kLatencyUs * clocks_per_us / (plan.stages - 1));

  const double tile_bytes = steps * (plan.block_channels + plan.block_pixels) * 128;
  const double l2_gb_s = kL2Bytes * device.multiprocessors * device.clock_ghz;
  const double weights = weight_bytes(p);
  // Weights that do not stay in L2 come again in every round.
  const double again = weights > 0.75 * static_cast<double>(device.l2_bytes) ? (rounds - 1) * weights : 0.0;

  const double outputs = static_cast<double>(plan.block_channels) * plan.block_pixels;
  // A cluster's blocks finish a share of the tile each.
  const double finishing = static_cast<double>(sm90 ? plan.threads - 128 : plan.threads) * plan.cluster;
  const double epilogue = outputs / finishing * kOutputClocks / clocks_per_us;
  const double partial_bytes = 4.0 * outputs;

  Cost result{};
  result.launch_us = launch_us(device);
  result.fill_us = kLatencyUs;
  result.arithmetic_us = larger(items * steps * step, rounds * steps * lone_step) / clocks_per_us;
  result.chip_us = larger(blocks * tile_bytes / l2_gb_s * 1e-3, items * tile_bytes / kL2BytesAlone / clocks_per_us);
  result.memory_us = (tensor_bytes(p) + again) / (device.memory_gb_s * kSustainedBandwidth) * 1e-3;
  // Two blocks on a multiprocessor hide each other's epilogues, but not the last.
  result.epilogue_us = kEpilogueUs + epilogue * (per_multiprocessor > 1 ? 1 : rounds);
  if (plan.split_k > 1) {
    result.reduction_us = sm90 ? rounds * (kClusterUs + partial_bytes / kClusterBytes / clocks_per_us)
                               : result.launch_us + kEpilogueUs + 2.0 * blocks * partial_bytes / l2_gb_s * 1e-3;
  }
  return result;
}

}  // namespace pointfuse
