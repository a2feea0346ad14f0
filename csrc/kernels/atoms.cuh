// The hardware in one file: threads, memory, copies, barriers and matrix operations, each a thin function over CuTe's
// wrapper of the instruction, so that kernels read as algorithms. Everything else in this directory is plain C++.
//
// With POINTFUSE_HOST_CUDA the same names come from tests/host_cuda, which emulates them on the host. What is inline
// PTX here has no wrapper in CuTe's arch headers or in CUDA. Operations of sm_90 trap on older chips.
#pragma once

#include <cstdint>

#include "params.h"

namespace pointfuse {

// An mbarrier in shared memory.
struct Barrier {
  uint64_t state;
};

struct LaunchConfig {
  int64_t grid;      // blocks
  int threads;       // of a block
  int shared_bytes;  // of a block, dynamic
  int cluster;       // blocks that run together and see each other's shared memory; 1 for none
  bool dependent;    // may start before the kernel ahead of it in the stream has ended: see grid_dependency_wait
  bool cooperative = false;  // all blocks run at once: see grid_barrier
};

}  // namespace pointfuse

#if defined(POINTFUSE_HOST_CUDA)

#include "host_cuda.h"

#else

// wgmma with n = 176 and the like.
#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <map>
#include <tuple>
#include <utility>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define POINTFUSE_SM90(statement) statement
#else
#define POINTFUSE_SM90(statement) __trap()
#endif

namespace pointfuse {

using TensorMap = CUtensorMap;

// Threads.

__device__ __forceinline__ int thread_index() { return int(threadIdx.x); }
// The shuffle tells the compiler that the whole warp has one value.
__device__ __forceinline__ int warp_index() { return __shfl_sync(~0u, int(threadIdx.x) / 32, 0); }
__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % 32; }

__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// Waits until `threads` threads, in whole warps, have come to barrier `id` (1 to 15) by named_sync or named_arrive.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(~0u, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// True in one lane of a converged warp, always the same one.
__device__ __forceinline__ bool elect_one() { return cute::elect_one_sync(); }

// Keeps the compiler from moving memory accesses across, which the wrappers of the barriers do not say.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

// Numbers.

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(half_t value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float to_float(bfloat16_t value) { return float_of_bits(uint32_t(value.bits) << 16); }

// Round to nearest even; beyond half's range to infinity.
template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ bfloat16_t from_float<bfloat16_t>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<half_t>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | uint32_t(__half_as_ushort(pair.y)) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack2<bfloat16_t>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | uint32_t(__bfloat16_as_ushort(pair.y)) << 16;
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  return {to_float(T{uint16_t(packed)}), to_float(T{uint16_t(packed >> 16)})};
}

// Rounds to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ float exp_fast(float value) { return expf(value); }
// Within 2 ulp, inline where `/` is a call; zero for finite a where |b| > 2^126.
__device__ __forceinline__ float divide_fast(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ float sqrt_rn(float value) { return __fsqrt_rn(value); }
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// Memory.

// The block's dynamic shared memory, aligned to the 1024 bytes after which the 128-byte swizzle repeats.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(1024) char pointfuse_shared_memory[];
  return pointfuse_shared_memory;
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return cute::cast_smem_ptr_to_uint(pointer); }

template <class V>
__device__ __forceinline__ V load_global(const V* pointer) {
  return *pointer;
}
template <class V>
__device__ __forceinline__ void store_global(V* pointer, V value) {
  *pointer = value;
}

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// Of memory that nobody writes while the kernel runs.
template <class V>
__device__ __forceinline__ V load_constant(const V* pointer) {
  const auto word = __ldg(reinterpret_cast<const typename Word<sizeof(V)>::Type*>(pointer));
  V value;
  memcpy(&value, &word, sizeof(V));
  return value;
}

// Bytes from valid_bytes on become zero; CuTe's zero-filling copies take all bytes or none. Copies of 16 bytes stay out
// of L1, since each thread's part of an operand is read once a block.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const uint32_t address = shared_address(shared);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kBytes),
                 "r"(valid_bytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() { cute::cp_async_fence(); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  cute::cp_async_wait<kPending>();
  compiler_fence();
}

// Matrices.

__device__ __forceinline__ const cute::uint128_t& matrix_row(const void* row) {
  return *static_cast<const cute::uint128_t*>(row);
}
__device__ __forceinline__ cute::uint128_t& matrix_row(void* row) { return *static_cast<cute::uint128_t*>(row); }

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  cute::SM75_U32x4_LDSM_N::copy(matrix_row(row), r[0], r[1], r[2], r[3]);
}
__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  cute::SM75_U32x2_LDSM_N::copy(matrix_row(row), r[0], r[1]);
}
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
  cute::SM75_U16x8_LDSM_T::copy(matrix_row(row), r[0], r[1], r[2], r[3]);
}
__device__ __forceinline__ void load_matrix_x2_trans(uint32_t (&r)[2], const void* row) {
  cute::SM75_U16x4_LDSM_T::copy(matrix_row(row), r[0], r[1]);
}

__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
  cute::SM90_U32x4_STSM_N::copy(r[0], r[1], r[2], r[3], matrix_row(row));
  compiler_fence();
}
__device__ __forceinline__ void store_matrix_x2(void* row, const uint32_t (&r)[2]) {
  cute::SM90_U32x2_STSM_N::copy(r[0], r[1], matrix_row(row));
  compiler_fence();
}
__device__ __forceinline__ void store_matrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  cute::SM90_U16x8_STSM_T::copy(r[0], r[1], r[2], r[3], matrix_row(row));
  compiler_fence();
}
__device__ __forceinline__ void store_matrix_x2_trans(void* row, const uint32_t (&r)[2]) {
  cute::SM90_U16x4_STSM_T::copy(r[0], r[1], matrix_row(row));
  compiler_fence();
}

template <class T>
struct Mma16x8x16;
template <>
struct Mma16x8x16<half_t> : cute::SM80_16x8x16_F32F16F16F32_TN {};
template <>
struct Mma16x8x16<bfloat16_t> : cute::SM80_16x8x16_F32BF16BF16F32_TN {};

// D += A * B; A is 16 by 16, B is 16 by 8.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Mma16x8x16<T>::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2], d[3]);
}

// The same for A of 16 by 8 and B of 8 by 8; the low 13 bits of the operands are ignored.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  cute::SM80_16x8x8_F32TF32TF32F32_TN::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[0], b[1], d[0], d[1], d[2],
                                           d[3]);
}

// mbarriers (sm_90).

__device__ __forceinline__ void barrier_init(Barrier* barrier, int arrivals) {
  cute::initialize_barrier(barrier->state, arrivals);
}
// Makes initialised barriers known to TMA and to the cluster; threads still need a barrier of their own.
__device__ __forceinline__ void fence_barrier_init() {
  POINTFUSE_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  compiler_fence();
  cute::arrive_barrier(barrier->state);
}
// Arrives, and makes the phase wait for so many bytes of TMA loads.
__device__ __forceinline__ void barrier_arrive_expect(Barrier* barrier, int bytes) {
  compiler_fence();
  cute::set_barrier_transaction_bytes(barrier->state, uint32_t(bytes));
}
// Arrives at the barrier that lies at this address in the shared memory of the cluster's block `rank`.
__device__ __forceinline__ void barrier_arrive_cluster(Barrier* barrier, int rank) {
  const uint32_t remote = cute::set_block_rank(shared_address(barrier), uint32_t(rank));
  POINTFUSE_SM90(asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory"));
}
// Waits while the phase of this parity is under way.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, int parity) {
  cute::wait_barrier(barrier->state, parity);
  compiler_fence();
}

// TMA (sm_90).

constexpr auto kNormalEviction = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

// One thread issues a load; the box's bytes, those out of bounds as zeros, arrive at the barrier.
__device__ __forceinline__ void tensor_load_2d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1) {
  cute::SM90_TMA_LOAD_2D::copy(map, &barrier->state, kNormalEviction, shared, c0, c1);
}
__device__ __forceinline__ void tensor_load_3d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1,
                                               int c2) {
  cute::SM90_TMA_LOAD_3D::copy(map, &barrier->state, kNormalEviction, shared, c0, c1, c2);
}
__device__ __forceinline__ void tensor_load_4d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1,
                                               int c2, int c3) {
  cute::SM90_TMA_LOAD_4D::copy(map, &barrier->state, kNormalEviction, shared, c0, c1, c2, c3);
}
// From base pixel (w, h, n) on, along w, h and n through the map's bounding box, each pixel moved by the offset.
__device__ __forceinline__ void tensor_load_im2col(void* shared, const TensorMap* map, Barrier* barrier, int c, int w,
                                                   int h, int n, int offset_w, int offset_h) {
  cute::SM90_TMA_LOAD_IM2COL_4D::copy(map, &barrier->state, shared, c, w, h, n, uint16_t(offset_w), uint16_t(offset_h));
}

__device__ __forceinline__ void tensor_prefetch_l2_2d(const TensorMap* map, int c0, int c1) {
  cute::SM90_TMA_LOAD_2D::PREFETCH::copy(map, c0, c1);
}
__device__ __forceinline__ void tensor_prefetch_l2_3d(const TensorMap* map, int c0, int c1, int c2) {
  cute::SM90_TMA_LOAD_3D::PREFETCH::copy(map, c0, c1, c2);
}
__device__ __forceinline__ void tensor_map_prefetch(const TensorMap* map) { cute::prefetch_tma_descriptor(map); }

// Makes this thread's writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  compiler_fence();
  cute::tma_store_fence();
  compiler_fence();
}

// What lies out of bounds is not stored.
__device__ __forceinline__ void tensor_store_2d(const TensorMap* map, const void* shared, int c0, int c1) {
  cute::SM90_TMA_STORE_2D::copy(map, shared, c0, c1);
}
__device__ __forceinline__ void tensor_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2) {
  cute::SM90_TMA_STORE_3D::copy(map, shared, c0, c1, c2);
}
__device__ __forceinline__ void tensor_store_commit() { cute::tma_store_arrive(); }
// Until all but the last kPending groups of this thread have read shared memory.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait_read() {
  cute::tma_store_wait<kPending>();
}
// Until all but the last kPending groups of this thread have been written.
template <int kPending>
__device__ __forceinline__ void tensor_store_wait() {
  POINTFUSE_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory"));
}

// wgmma (sm_90a).

// An operand with the 128-byte swizzle, aligned to 1024 bytes (steps of 32 bytes along K may be added). K-major: 8 rows
// of 128 bytes, the next 8 at stride_bytes. Pixel-major: 8 rows of K of 64 pixels, the next 8 at stride_bytes, the next
// 64 pixels at leading_bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return kSwizzle128 | uint64_t(uint32_t(stride_bytes) >> 4 & 0x3fff) << 32 |
         uint64_t(uint32_t(leading_bytes) >> 4 & 0x3fff) << 16 | (shared_address(shared) >> 4 & 0x3fff);
}

__device__ __forceinline__ void wgmma_fence() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void wgmma_commit() { cute::warpgroup_commit_batch(); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  cute::warpgroup_wait<kPending>();
}

// Keeps the compiler from moving accesses to accumulators across.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(d[i]);
}

template <class T, int kPixels, bool kPixelMajorB>
struct Wgmma;

#define POINTFUSE_WGMMA(n)                                                                                           \
  template <bool kPixelMajorB>                                                                                       \
  struct Wgmma<half_t, n, kPixelMajorB>                                                                              \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<                                                              \
            cute::SM90::GMMA::Major::K, kPixelMajorB ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K> {}; \
  template <bool kPixelMajorB>                                                                                       \
  struct Wgmma<bfloat16_t, n, kPixelMajorB>                                                                          \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<                                                            \
            cute::SM90::GMMA::Major::K, kPixelMajorB ? cute::SM90::GMMA::Major::MN : cute::SM90::GMMA::Major::K> {}; \
  template <>                                                                                                        \
  struct Wgmma<float, n, false> : cute::SM90::GMMA::MMA_64x##n##x8_F32TF32TF32_SS_TN<> {};

POINTFUSE_WGMMA(16)
POINTFUSE_WGMMA(32)
POINTFUSE_WGMMA(48)
POINTFUSE_WGMMA(64)
POINTFUSE_WGMMA(80)
POINTFUSE_WGMMA(96)
POINTFUSE_WGMMA(112)
POINTFUSE_WGMMA(128)
POINTFUSE_WGMMA(144)
POINTFUSE_WGMMA(160)
POINTFUSE_WGMMA(176)
POINTFUSE_WGMMA(192)
POINTFUSE_WGMMA(208)
POINTFUSE_WGMMA(224)
POINTFUSE_WGMMA(240)
POINTFUSE_WGMMA(256)
#undef POINTFUSE_WGMMA

template <class Instruction, size_t... kIndex>
__device__ __forceinline__ void wgmma_unpacked(float* d, uint64_t a, uint64_t b, bool accumulate,
                                               std::index_sequence<kIndex...>) {
  Instruction::fma(a, b, d[kIndex]..., accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

// D (+)= A * B for a warpgroup; A is 64 by 32 bytes of K, B is 32 bytes of K by kPixels; float stands for TF32. The
// operands and d belong to the operation until wgmma_wait.
template <class T, int kPixels, bool kPixelMajorB>
__device__ __forceinline__ void wgmma(float (&d)[kPixels / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                                      bool accumulate) {
  wgmma_unpacked<Wgmma<T, kPixels, kPixelMajorB> >(d, a_descriptor, b_descriptor, accumulate,
                                                   std::make_index_sequence<kPixels / 2>{});
}

// Clusters, launches, registers (sm_90).

__device__ __forceinline__ int cluster_rank() { return int(cute::block_rank_in_cluster()); }
__device__ __forceinline__ int cluster_size() { return int(cute::cluster_shape().x); }
__device__ __forceinline__ void cluster_arrive() {
  compiler_fence();
  cute::cluster_arrive();
}
__device__ __forceinline__ void cluster_wait() {
  cute::cluster_wait();
  compiler_fence();
}
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// What block `rank` of the cluster holds at this address.
template <class V>
__device__ __forceinline__ V load_cluster(const V* own_shared_address, int rank) {
  V value = {};
  POINTFUSE_SM90(value = *static_cast<const V*>(__cluster_map_shared_rank(own_shared_address, unsigned(rank))));
  return value;
}

// Until the kernels that this one depends on have ended and their writes can be seen. Code for older chips has nothing
// to wait for: launch() starts it after them.
__device__ __forceinline__ void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
// Dependent kernels may start as soon as every block has called this or ended.
__device__ __forceinline__ void grid_dependency_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// One thread of each of `blocks` blocks comes here, each once; *arrived is 0 before. What the blocks' threads wrote
// before a barrier of the block with that thread, all blocks see after one. As in CUTLASS's GenericBarrier.
__device__ __forceinline__ void grid_barrier(uint32_t* arrived, uint32_t blocks) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
  uint32_t seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
  } while (seen < blocks);
}

template <int kRegisters>
__device__ __forceinline__ void registers_decrease() {
  POINTFUSE_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <int kRegisters>
__device__ __forceinline__ void registers_increase() {
  POINTFUSE_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

// Host: tensor maps and launches.

// The driver's function of this name: libcuda is not linked, so that the library loads on machines without it.
template <class Function>
Function* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Function*>(function) : nullptr;
}

// wgmma ignores the low 13 bits of a TF32 operand; with round_to_tf32 loads of fp32 round to nearest even before.
inline CUtensorMapDataType tensor_map_type(DType dtype, bool round_to_tf32) {
  switch (dtype) {
    case DType::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case DType::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    default:
      return round_to_tf32 ? CU_TENSOR_MAP_DATA_TYPE_TFLOAT32 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

// A tensor of `rank` dimensions, the contiguous one first; byte_strides are those of the others. A copy moves a box.
inline cudaError_t make_tensor_map(TensorMap* map, DType dtype, int rank, const void* base, const int64_t* sizes,
                                   const int64_t* byte_strides, const int32_t* box, bool swizzle_128b,
                                   bool round_to_tf32 = false) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!encode) return cudaErrorNotSupported;
  constexpr int kMaxRank = 5;
  if (rank < 1 || rank > kMaxRank) return cudaErrorInvalidValue;
  cuuint64_t global_sizes[kMaxRank], global_strides[kMaxRank];
  cuuint32_t box_sizes[kMaxRank], element_strides[kMaxRank];
  for (int i = 0; i < rank; ++i) {
    global_sizes[i] = cuuint64_t(sizes[i]);
    if (i) global_strides[i - 1] = cuuint64_t(byte_strides[i - 1]);
    box_sizes[i] = cuuint32_t(box[i]);
    element_strides[i] = 1;
  }
  const CUresult result =
      encode(map, tensor_map_type(dtype, round_to_tf32), cuuint32_t(rank), const_cast<void*>(base), global_sizes,
             global_strides, box_sizes, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle_128b ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// For tensor_load_im2col, swizzled by 128 bytes. Sizes and strides are of c, w, h, n, corners and element strides of w,
// h. The bounding box of base pixels reaches from the lower corner to the plane's last pixel plus the upper corner.
inline cudaError_t make_tensor_map_im2col(TensorMap* map, DType dtype, const void* base, const int64_t sizes[4],
                                          const int64_t byte_strides[3], const int32_t lower_corner[2],
                                          const int32_t upper_corner[2], int channels_per_pixel, int pixels_per_column,
                                          const int32_t element_strides[2], bool round_to_tf32 = false) {
  static const auto encode = driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t global_sizes[4], global_strides[3];
  for (int i = 0; i < 4; ++i) {
    global_sizes[i] = cuuint64_t(sizes[i]);
    if (i) global_strides[i - 1] = cuuint64_t(byte_strides[i - 1]);
  }
  const cuuint32_t strides[4] = {1, cuuint32_t(element_strides[0]), cuuint32_t(element_strides[1]), 1};
  const CUresult result =
      encode(map, tensor_map_type(dtype, round_to_tf32), 4, const_cast<void*>(base), global_sizes, global_strides,
             lower_corner, upper_corner, cuuint32_t(channels_per_pixel), cuuint32_t(pixels_per_column), strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Raises the kernel's limits and finds out whether its code, which may be made from PTX for an older chip, can be
// launched as dependent. Once for each thread, device, kernel and size, which keeps it out of a launch's time.
inline cudaError_t prepare_kernel(const void* kernel, const LaunchConfig& config, bool* can_depend) {
  constexpr int kPortableCluster = 8, kFirstToDepend = 90;
  thread_local std::map<std::tuple<int, const void*, int, int>, bool> prepared;
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::tuple<int, const void*, int, int> key{device, kernel, config.shared_bytes, config.cluster};
  if (const auto known = prepared.find(key); known != prepared.end()) {
    *can_depend = known->second;
    return cudaSuccess;
  }
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes))
    return error;
  if (config.cluster > kPortableCluster)
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
      return error;
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  prepared[key] = *can_depend = attributes.ptxVersion >= kFirstToDepend;
  return cudaSuccess;
}

template <class... Parameters, class... Args>
cudaError_t launch(const LaunchConfig& config, cudaStream_t stream, void (*kernel)(Parameters...), Args&&... args) {
  bool can_depend;
  if (const cudaError_t error = prepare_kernel(reinterpret_cast<const void*>(kernel), config, &can_depend))
    return error;
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(unsigned(config.grid));
  launch_config.blockDim = dim3(unsigned(config.threads));
  launch_config.dynamicSmemBytes = size_t(config.shared_bytes);
  launch_config.stream = stream;
  launch_config.attrs = attributes;
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(config.cluster), 1, 1};
  }
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.dependent && can_depend) {
    cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&launch_config, kernel, std::forward<Args>(args)...);
}

}  // namespace pointfuse

#endif
