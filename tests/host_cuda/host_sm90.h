// The atoms of sm_90: stmatrix, mbarriers, TMA, wgmma, clusters.
//
// Not modelled: whose writes a fence_async_proxy publishes (here every thread's of the block, there only the caller's),
// caches and prefetches, register counts, and that a dependent launch may start early (launches run one after another).
#pragma once

#include "host_sm80.h"
#include "host_tensor_map.h"

namespace pointfuse {

namespace host {

// stmatrix: the inverse of ldmatrix.
template <int kMatrices, bool kTrans>
void store_matrix(const char* name, void* row, const uint32_t* registers) {
  struct Lane {
    const uint32_t* registers;
    char* row;
  } own{registers, static_cast<char*>(row)};
  if (lane_index() < 8 * kMatrices) check_shared(*host_cuda::current().block, row, 16, 16, name);
  host_cuda::warp_collective(name, own, [](Lane** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      for (int lane = 0; lane < kWarp; ++lane)
        for (int e = 0; e < 2; ++e) {
          const uint16_t element = uint16_t(lanes[lane]->registers[matrix] >> 16 * e);
          const int i = lane / 4, j = lane % 4 * 2 + e;
          const int row = kTrans ? j : i, column = kTrans ? i : j;
          std::memcpy(lanes[8 * matrix + row]->row + 2 * column, &element, 2);
        }
  });
}

}  // namespace host

inline void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
  host::store_matrix<4, false>("store_matrix_x4", row, r);
}
inline void store_matrix_x2(void* row, const uint32_t (&r)[2]) {
  host::store_matrix<2, false>("store_matrix_x2", row, r);
}
inline void store_matrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  host::store_matrix<4, true>("store_matrix_x4_trans", row, r);
}
inline void store_matrix_x2_trans(void* row, const uint32_t (&r)[2]) {
  host::store_matrix<2, true>("store_matrix_x2_trans", row, r);
}

namespace host {

inline host_cuda::BarrierState& state(host_cuda::Block& block, Barrier* barrier, const char* name) {
  const auto found = block.barriers.find(barrier);
  if (found == block.barriers.end()) fail(format("%s: the barrier was not initialised", name));
  if (barrier->state != host_cuda::BarrierState::kInitialised) fail(format("%s: the barrier was overwritten", name));
  return found->second;
}

inline void complete_if_due(host_cuda::BarrierState& state) {
  if (state.missing || state.bytes) return;
  ++state.phase;
  state.missing = state.expected;
  host_cuda::machine().notify(state.event);
}

inline void arrive(host_cuda::Block& block, Barrier* barrier, int bytes, const char* name) {
  host_cuda::BarrierState& state = host::state(block, barrier, name);
  if (state.missing == 0) fail(format("%s: more than the %d arrivals of a phase", name, state.expected));
  state.bytes += bytes;
  --state.missing;
  complete_if_due(state);
}

inline host_cuda::Block& peer(int rank, const char* name) {
  std::vector<host_cuda::Block>& blocks = host_cuda::machine().blocks;
  if (rank < 0 || rank >= int(blocks.size()))
    fail(format("%s: block %d of a cluster of %zu", name, rank, blocks.size()));
  if (!blocks[rank].running) fail(format("%s: block %d of the cluster has ended", name, rank));
  return blocks[rank];
}

}  // namespace host

inline void barrier_init(Barrier* barrier, int arrivals) {
  host_cuda::Block& block = *host_cuda::current().block;
  check_shared(block, barrier, sizeof(Barrier), alignof(Barrier), "barrier_init");
  if (arrivals < 1 || arrivals >= 1 << 20) host_cuda::fail(host_cuda::format("barrier_init: %d arrivals", arrivals));
  barrier->state = host_cuda::BarrierState::kInitialised;
  block.barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

inline void fence_barrier_init() {}

inline void barrier_arrive(Barrier* barrier) {
  host::arrive(*host_cuda::current().block, barrier, 0, "barrier_arrive");
}

inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  host::arrive(*host_cuda::current().block, barrier, bytes, "barrier_arrive_expect");
}

inline void barrier_arrive_cluster(Barrier* barrier, int rank) {
  host_cuda::Block& block = host::peer(rank, "barrier_arrive_cluster");
  const int64_t offset = reinterpret_cast<char*>(barrier) - shared_memory();
  host::arrive(block, reinterpret_cast<Barrier*>(block.shared + offset), 0, "barrier_arrive_cluster");
}

// Waits while the phase of this parity is under way.
inline void barrier_wait(Barrier* barrier, int parity) {
  host_cuda::BarrierState& state = host::state(*host_cuda::current().block, barrier, "barrier_wait");
  const long long offset = reinterpret_cast<char*>(barrier) - shared_memory();
  while (int(state.phase & 1) == parity)
    host_cuda::machine().wait(state.event, "barrier_wait", [offset, parity, &state] {
      return host_cuda::format("barrier at byte %lld, parity %d: phase %llu lacks %d arrivals and %lld bytes", offset,
                               parity, (unsigned long long)state.phase, state.missing, (long long)state.bytes);
    });
}

namespace host {

inline void round_chunk(char* chunk) {
  float numbers[kChunkBytes / sizeof(float)];
  std::memcpy(numbers, chunk, kChunkBytes);
  for (float& number : numbers) number = tf32_by_tma(number);
  std::memcpy(chunk, numbers, kChunkBytes);
}

// Writes a box from byte `first` of a view of shared memory on.
inline void write_box(char* view, int64_t first, bool swizzled, bool round_to_tf32, const std::vector<Chunk>& chunks) {
  for (const Chunk& chunk : chunks) {
    char* destination = view + place(first + chunk.offset, swizzled);
    std::memset(destination, 0, kChunkBytes);
    if (chunk.end > chunk.begin)
      std::memcpy(destination + chunk.begin, chunk.global + chunk.begin, size_t(chunk.end - chunk.begin));
    if (round_to_tf32) round_chunk(destination);
  }
}

inline void load_box(const char* name, void* shared, Barrier* barrier, const TensorMap& map,
                     std::vector<Chunk> chunks) {
  host_cuda::Block& block = *host_cuda::current().block;
  check_shared(block, shared, map.box_bytes(), 128, name);
  check_chunks(chunks, name);
  state(block, barrier, name);
  const int64_t first = static_cast<char*>(shared) - block.shared;
  const bool swizzled = map.swizzled, rounded = map.round_to_tf32;
  const std::array<char*, 2> views{block.shared, block.async_view.data()};
  for (char* view : views)
    if (host_cuda::options().late) std::memset(view + first, host_cuda::kPoison, size_t(map.box_bytes()));
  auto perform = [=, &block, chunks = std::move(chunks)] {
    for (char* view : views) write_box(view, first, swizzled, rounded, chunks);
    host_cuda::BarrierState& arrived = block.barriers.at(barrier);
    arrived.bytes -= int64_t(chunks.size()) * kChunkBytes;
    complete_if_due(arrived);
  };
  host_cuda::machine().issue({&block, std::move(perform)});
}

inline void store_box(const char* name, const TensorMap& map, const void* shared, std::vector<Chunk> chunks) {
  host_cuda::Block& block = *host_cuda::current().block;
  check_shared(block, shared, map.box_bytes(), 128, name);
  check_chunks(chunks, name);
  if (map.round_to_tf32) fail(format("%s: through a map that rounds", name));
  const char* view = block.async_view.data();
  const int64_t first = static_cast<const char*>(shared) - block.shared;
  const bool swizzled = map.swizzled;
  host_cuda::current().stores.issue([=, chunks = std::move(chunks)] {
    for (const Chunk& chunk : chunks)
      if (chunk.end > chunk.begin)
        std::memcpy(const_cast<char*>(chunk.global) + chunk.begin,
                    view + place(first + chunk.offset, swizzled) + chunk.begin, size_t(chunk.end - chunk.begin));
  });
}

}  // namespace host

inline void tensor_load_2d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1) {
  host::load_box("tensor_load_2d", shared, barrier, *map, host::tile_chunks("tensor_load_2d", *map, {c0, c1}));
}
inline void tensor_load_3d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2) {
  host::load_box("tensor_load_3d", shared, barrier, *map, host::tile_chunks("tensor_load_3d", *map, {c0, c1, c2}));
}
inline void tensor_load_4d(void* shared, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3) {
  host::load_box("tensor_load_4d", shared, barrier, *map, host::tile_chunks("tensor_load_4d", *map, {c0, c1, c2, c3}));
}
inline void tensor_load_im2col(void* shared, const TensorMap* map, Barrier* barrier, int c, int w, int h, int n,
                               int offset_w, int offset_h) {
  host::load_box("tensor_load_im2col", shared, barrier, *map,
                 host::im2col_chunks("tensor_load_im2col", *map, c, w, h, n, offset_w, offset_h));
}

inline void tensor_prefetch_l2_2d(const TensorMap* map, int c0, int c1) {
  host::tile_chunks("tensor_prefetch_l2_2d", *map, {c0, c1});
}
inline void tensor_prefetch_l2_3d(const TensorMap* map, int c0, int c1, int c2) {
  host::tile_chunks("tensor_prefetch_l2_3d", *map, {c0, c1, c2});
}
inline void tensor_map_prefetch(const TensorMap*) {}

inline void tensor_store_2d(const TensorMap* map, const void* shared, int c0, int c1) {
  host::store_box("tensor_store_2d", *map, shared, host::tile_chunks("tensor_store_2d", *map, {c0, c1}));
}
inline void tensor_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2) {
  host::store_box("tensor_store_3d", *map, shared, host::tile_chunks("tensor_store_3d", *map, {c0, c1, c2}));
}
inline void tensor_store_commit() { host_cuda::current().stores.commit(); }
template <int kPending>
void tensor_store_wait_read() {
  host_cuda::current().stores.wait(kPending);
}
template <int kPending>
void tensor_store_wait() {
  host_cuda::current().stores.wait(kPending);
}

inline void fence_async_proxy() {
  host_cuda::Block& block = *host_cuda::current().block;
  std::copy_n(block.shared, block.shared_bytes, block.async_view.begin());
}

// Fields of a matrix descriptor, in units of 16 bytes: address from bit 0, leading offset from 16, stride from 32; the
// layout from bit 62, of which 1 is the 128-byte swizzle.
inline uint64_t matrix_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
  const auto field = [](uint32_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
  return field(shared_address(shared)) | field(uint32_t(leading_bytes)) << 16 | field(uint32_t(stride_bytes)) << 32 |
         uint64_t(1) << 62;
}

namespace host {

inline float wgmma_operand(float value) { return tf32_operand(bits_of_float(value)); }
inline float wgmma_operand(half_t value) { return to_float(value); }
inline float wgmma_operand(bfloat16_t value) { return to_float(value); }

// An operand of wgmma in shared memory: `index` counts rows of A or columns of B, of which `extent` are used.
template <class T>
struct Operand {
  const char* view;
  int64_t start, leading, stride;
  bool k_major;

  static constexpr int kDepth = 32 / int(sizeof(T));
  static constexpr int kSpan = 128 / int(sizeof(T));  // elements of a swizzled row

  Operand(const char* view, uint64_t descriptor, bool k_major)
      : view(view),
        start(int64_t(descriptor & 0x3fff) * 16 - host_cuda::kSharedBase),
        leading(int64_t(descriptor >> 16 & 0x3fff) * 16),
        stride(int64_t(descriptor >> 32 & 0x3fff) * 16),
        k_major(k_major) {}

  int64_t offset(int index, int k) const {
    const int64_t linear =
        k_major ? index / 8 * stride + index % 8 * 128 + k * int(sizeof(T))
                : index / kSpan * leading + index % kSpan * int(sizeof(T)) + k / 8 * stride + k % 8 * 128;
    return place(start + linear, true);
  }

  float operator()(int index, int k) const {
    T element;
    std::memcpy(&element, view + offset(index, k), sizeof(T));
    return wgmma_operand(element);
  }

  void check(const host_cuda::Block& block, uint64_t descriptor, int extent, const char* which) const {
    if (descriptor >> 62 != 1) fail(format("wgmma: operand %s does not have the 128-byte swizzle", which));
    if (start / 128 % 8) fail(format("wgmma: operand %s begins inside a swizzle's 1024 bytes", which));
    for (int index = 0; index < extent; ++index)
      for (int k = 0; k < kDepth; ++k) {
        const int64_t at = offset(index, k);
        if (at < 0 || at + int(sizeof(T)) > block.shared_bytes)
          fail(format("wgmma: operand %s reaches byte %lld of a shared memory of %d", which, (long long)at,
                      block.shared_bytes));
      }
  }
};

struct WgmmaLane {
  float* d;
  uint64_t a, b;
  bool accumulate;
};

inline void check_wgmma(host_cuda::Warp& warp, WgmmaLane** lanes) {
  if (!warp.matmul_fenced) fail("wgmma: no wgmma_fence since the registers were free to use");
  const WgmmaLane& first = *lanes[0];
  for (int lane = 1; lane < kWarp; ++lane)
    if (lanes[lane]->a != first.a || lanes[lane]->b != first.b || lanes[lane]->accumulate != first.accumulate)
      fail("wgmma: the lanes of the warp give different operands");
  auto& issued = warp.block->matmuls[warp.index / (host_cuda::kWarpgroup / kWarp)];
  const std::array<uint64_t, 3> operands{first.a, first.b, uint64_t(first.accumulate)};
  if (warp.matmuls_issued == issued.size()) issued.push_back(operands);
  if (issued[warp.matmuls_issued++] != operands) fail("wgmma: the warps of the warpgroup give different operands");
}

}  // namespace host

inline void wgmma_fence() {
  host::converge("wgmma_fence");
  host_cuda::current().warp->matmul_fenced = true;
}

inline void wgmma_commit() {
  int none = 0;
  host_cuda::warp_collective("wgmma_commit", none, [](int**) { host_cuda::current().warp->matmuls.commit(); });
}

template <int kPending>
void wgmma_wait() {
  int none = 0;
  host_cuda::warp_collective("wgmma_wait", none, [](int**) {
    host_cuda::Warp& warp = *host_cuda::current().warp;
    warp.matmuls.wait(kPending);
    if (!warp.matmuls.unfinished()) warp.matmul_fenced = false;
  });
}

namespace host {

// The registers' numbers as they were before the first unfinished wgmma that adds to them.
inline host_cuda::Accumulators& take_registers(host_cuda::Warp& warp, const std::array<float*, kWarp>& registers,
                                               int count) {
  host_cuda::Accumulators& accumulators = warp.accumulators[registers[0]];
  if (accumulators.unfinished++ == 0) {
    accumulators.values.clear();
    for (const float* lane : registers) accumulators.values.insert(accumulators.values.end(), lane, lane + count);
  }
  if (accumulators.values.size() != size_t(kWarp * count)) fail("wgmma: another shape adds to the same registers");
  for (float* lane : registers) std::memset(lane, host_cuda::kPoison, size_t(count) * sizeof(float));
  return accumulators;
}

inline void give_registers_back(host_cuda::Accumulators& accumulators, const std::array<float*, kWarp>& registers) {
  if (--accumulators.unfinished) return;
  const size_t count = accumulators.values.size() / kWarp;
  for (int lane = 0; lane < kWarp; ++lane)
    std::memcpy(registers[lane], &accumulators.values[lane * count], count * sizeof(float));
}

// Lane 4 * i + j of the warp that has rows first_row to first_row + 15 of D holds in register 4 * t + 2 * h + e
// D[first_row + i + 8 * h][8 * t + 2 * j + e].
template <int kPixels, class T>
void multiply(float* values, const Operand<T>& a, const Operand<T>& b, int first_row, bool add) {
  constexpr int kDepth = Operand<T>::kDepth;
  float rows[16][kDepth], columns[kPixels][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 16; ++row) rows[row][k] = a(first_row + row, k);
    for (int column = 0; column < kPixels; ++column) columns[column][k] = b(column, k);
  }
  for (int lane = 0; lane < kWarp; ++lane)
    for (int r = 0; r < kPixels / 2; ++r) {
      float& value = *values++;
      if (!add) value = 0;
      accumulate<kDepth>(value, rows[lane / 4 + r / 2 % 2 * 8], columns[r / 4 * 8 + lane % 4 * 2 + r % 2]);
    }
}

}  // namespace host

// Each warp of the warpgroup computes its 16 rows when it comes; no warp waits for another.
template <class T, int kPixels, bool kPixelMajorB>
void wgmma(float (&d)[kPixels / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  static_assert(kPixels % 8 == 0 && kPixels >= 8 && kPixels <= 256, "wgmma has n from 8 to 256 in steps of 8");
  static_assert(!kPixelMajorB || sizeof(T) == 2, "32-bit operands are K-major");
  host::WgmmaLane own{d, a_descriptor, b_descriptor, accumulate};
  host_cuda::warp_collective("wgmma", own, [](host::WgmmaLane** lanes) {
    host_cuda::Warp& warp = *host_cuda::current().warp;
    host::check_wgmma(warp, lanes);
    const char* view = warp.block->async_view.data();
    const host::Operand<T> a(view, lanes[0]->a, true), b(view, lanes[0]->b, !kPixelMajorB);
    a.check(*warp.block, lanes[0]->a, 64, "A");
    b.check(*warp.block, lanes[0]->b, kPixels, "B");

    std::array<float*, host::kWarp> registers;
    for (int lane = 0; lane < host::kWarp; ++lane) registers[lane] = lanes[lane]->d;
    host_cuda::Accumulators& accumulators = host::take_registers(warp, registers, kPixels / 2);
    const int first_row = warp.index % 4 * 16;
    const bool add = lanes[0]->accumulate;
    warp.matmuls.issue([=, &accumulators] {
      host::multiply<kPixels>(accumulators.values.data(), a, b, first_row, add);
      host::give_registers_back(accumulators, registers);
    });
  });
}

template <int kCount>
void fence_registers(float (&)[kCount]) {}

inline int cluster_rank() { return host_cuda::current().block->rank; }
inline int cluster_size() { return host_cuda::machine().shape.cluster; }

inline void cluster_arrive() {
  host::converge("cluster_arrive");
  host_cuda::Fiber& self = host_cuda::current();
  host_cuda::ClusterBarrier& barrier = host_cuda::machine().cluster_barrier;
  if (self.cluster_arrived) host_cuda::fail("cluster_arrive: twice without cluster_wait");
  self.cluster_arrived = true;
  self.cluster_phase = barrier.phase;
  ++barrier.arrived;
  host_cuda::machine().complete_cluster_phase();
}

inline void cluster_wait() {
  host::converge("cluster_wait");
  host_cuda::Fiber& self = host_cuda::current();
  host_cuda::ClusterBarrier& barrier = host_cuda::machine().cluster_barrier;
  if (!self.cluster_arrived) host_cuda::fail("cluster_wait: without cluster_arrive");
  while (barrier.phase == self.cluster_phase)
    host_cuda::machine().wait(barrier.event, "cluster_wait",
                              [&barrier] { return host_cuda::format("%d threads came", barrier.arrived); });
  self.cluster_arrived = false;
}

inline void grid_barrier(uint32_t* arrived, uint32_t blocks) {
  host_cuda::Machine& machine = host_cuda::machine();
  host_cuda::check_global(arrived, 4, 4, "grid_barrier");
  if (!machine.shape.cooperative || blocks != machine.shape.grid)
    host_cuda::fail("grid_barrier: of blocks that do not all run at once");
  if (++*arrived > blocks) host_cuda::fail("grid_barrier: the counter was not zero");
  if (*arrived == blocks) machine.notify(machine.grid_event);
  while (*arrived < blocks)
    machine.wait(machine.grid_event, "grid_barrier",
                 [=] { return host_cuda::format("%u of %u blocks came", *arrived, blocks); });
}

inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

template <class V>
V load_cluster(const V* own_shared_address, int rank) {
  static_assert(sizeof(V) <= 16, "one load is at most 16 bytes");
  check_shared(*host_cuda::current().block, own_shared_address, sizeof(V), sizeof(V), "load_cluster");
  const char* own = reinterpret_cast<const char*>(own_shared_address);
  V value;
  std::memcpy(&value, host::peer(rank, "load_cluster").shared + (own - shared_memory()), sizeof(V));
  return value;
}

inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

namespace host {

template <int kRegisters>
void check_registers(const char* name) {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256,
                "setmaxnreg takes 24 to 256 in steps of 8");
  converge(name);
}

}  // namespace host

template <int kRegisters>
void registers_decrease() {
  host::check_registers<kRegisters>("registers_decrease");
}
template <int kRegisters>
void registers_increase() {
  host::check_registers<kRegisters>("registers_increase");
}

}  // namespace pointfuse
