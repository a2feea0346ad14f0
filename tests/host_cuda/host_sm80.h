// The atoms of sm_80: threads, shared memory, cp.async, ldmatrix, mma.
#pragma once

#include "cuda_words.h"
#include "machine.h"
#include "numbers.h"

namespace pointfuse {

inline int thread_index() { return host_cuda::current().thread; }
inline int warp_index() { return host_cuda::current().warp->index; }
inline int lane_index() { return host_cuda::current().lane(); }

namespace host {

using host_cuda::fail;
using host_cuda::format;
using host_cuda::kWarp;

// All lanes of the warp come here.
inline void converge(const char* name) {
  int none = 0;
  host_cuda::warp_collective(name, none, [](int**) {});
}

struct BarrierLane {
  int id, threads;
  uint64_t phase;
};

// The barriers of a block are counted by whole warps.
inline void arrive(int id, int threads, const char* name, bool wait) {
  host_cuda::NamedBarrier& barrier = host_cuda::current().block->named[id];
  BarrierLane own{id, threads, 0};
  host_cuda::warp_collective(name, own, [&](BarrierLane** lanes) {
    for (int lane = 0; lane < kWarp; ++lane) {
      if (lanes[lane]->id != id || lanes[lane]->threads != threads)
        fail(format("%s: the lanes of the warp name different barriers or thread counts", name));
      lanes[lane]->phase = barrier.phase;
    }
    if (threads <= 0 || threads % kWarp || threads > host_cuda::machine().shape.threads)
      fail(format("%s: %d threads of %d", name, threads, host_cuda::machine().shape.threads));
    if (barrier.arrived == 0) barrier.expected = threads;
    if (barrier.expected != threads)
      fail(format("%s: barrier %d is expected by one warp to have %d threads, by another %d", name, id,
                  barrier.expected, threads));
    barrier.arrived += kWarp;
    if (barrier.arrived < threads) return;
    barrier.arrived = 0;
    ++barrier.phase;
    host_cuda::machine().notify(barrier.event);
  });
  while (wait && barrier.phase == own.phase)
    host_cuda::machine().wait(barrier.event, name, [id, &barrier] {
      return format("barrier %d: %d of %d threads came", id, barrier.arrived, barrier.expected);
    });
}

inline void check_named(int id, const char* name) {
  if (id < 1 || id > 15) fail(format("%s: there is no barrier %d", name, id));
}

// The shared-memory row that lane 8 * matrix + row of the warp points at.
struct MatrixLane {
  uint32_t* registers;
  const char* row;
};

// ldmatrix: register m of lane 4 * i + j is elements 2 * j and 2 * j + 1 of matrix m's row i, or with kTrans its column
// i.
template <int kMatrices, bool kTrans>
void load_matrix(const char* name, uint32_t* registers, const void* row) {
  MatrixLane own{registers, static_cast<const char*>(row)};
  if (lane_index() < 8 * kMatrices) check_shared(*host_cuda::current().block, row, 16, 16, name);
  host_cuda::warp_collective(name, own, [](MatrixLane** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t elements[8][8];
      for (int i = 0; i < 8; ++i) std::memcpy(elements[i], lanes[8 * matrix + i]->row, 16);
      for (int lane = 0; lane < kWarp; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t low = kTrans ? elements[j][i] : elements[i][j];
        const uint16_t high = kTrans ? elements[j + 1][i] : elements[i][j + 1];
        lanes[lane]->registers[matrix] = low | uint32_t(high) << 16;
      }
    }
  });
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

// Exact products, summed exactly over the instruction's k and added to the accumulator with one rounding.
template <int kDepth>
void accumulate(float& d, const float* a, const float* b) {
  double sum = 0;
  for (int k = 0; k < kDepth; ++k) sum += double(a[k]) * double(b[k]);
  d = float(double(d) + sum);
}

// mma.m16n8: lane 4 * i + j holds d[2 * h + e] = D[i + 8 * h][2 * j + e].
template <int kDepth, class Fetch>
void mma(const char* name, MmaLane own, Fetch fetch) {
  host_cuda::warp_collective(name, own, [fetch](MmaLane** lanes) {
    float a[16][kDepth], b[8][kDepth];
    fetch(lanes, a, b);
    for (int lane = 0; lane < kWarp; ++lane)
      for (int e = 0; e < 4; ++e)
        accumulate<kDepth>(lanes[lane]->d[e], a[lane / 4 + e / 2 * 8], b[lane % 4 * 2 + e % 2]);
  });
}

}  // namespace host

inline void block_sync() { host::arrive(0, host_cuda::machine().shape.threads, "block_sync", true); }

inline void named_sync(int id, int threads) {
  host::check_named(id, "named_sync");
  host::arrive(id, threads, "named_sync", true);
}

inline void named_arrive(int id, int threads) {
  host::check_named(id, "named_arrive");
  host::arrive(id, threads, "named_arrive", false);
}

inline void warp_sync() { host::converge("warp_sync"); }

namespace host {

template <class T>
struct ShuffleLane {
  T value, result;
  int source;
};

template <class T>
T shuffle(const char* name, T value, int source) {
  ShuffleLane<T> own{value, value, source};
  host_cuda::warp_collective(name, own, [](ShuffleLane<T>** lanes) {
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane]->result = lanes[lanes[lane]->source % kWarp]->value;
  });
  return own.result;
}

}  // namespace host

template <class T>
T shuffle(T value, int lane) {
  return host::shuffle("shuffle", value, lane & 31);
}

template <class T>
T shuffle_xor(T value, int mask) {
  return host::shuffle("shuffle_xor", value, lane_index() ^ (mask & 31));
}

// Any lane may be elected, always the same in a launch: which one is the seed's choice.
inline bool elect_one() {
  host::converge("elect_one");
  return lane_index() == int(host_cuda::options().seed % host_cuda::kWarp);
}

inline char* shared_memory() { return host_cuda::current().block->shared; }

inline uint32_t shared_address(const void* pointer) {
  return uint32_t(static_cast<const char*>(pointer) - shared_memory()) + host_cuda::kSharedBase;
}

template <class T>
float2 unpack2(uint32_t packed) {
  return {to_float(T{uint16_t(packed)}), to_float(T{uint16_t(packed >> 16)})};
}

template <class V>
V load_global(const V* pointer) {
  static_assert(sizeof(V) <= 16, "one load is at most 16 bytes");
  host_cuda::check_global(pointer, sizeof(V), sizeof(V), "load_global");
  return *pointer;
}

template <class V>
V load_constant(const V* pointer) {
  static_assert(sizeof(V) <= 16, "one load is at most 16 bytes");
  host_cuda::check_global(pointer, sizeof(V), sizeof(V), "load_constant");
  return *pointer;
}

template <class V>
void store_global(V* pointer, V value) {
  static_assert(sizeof(V) <= 16, "one store is at most 16 bytes");
  host_cuda::check_global(pointer, sizeof(V), sizeof(V), "store_global");
  *pointer = value;
}

template <int kBytes>
void copy_async(void* shared, const void* global, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  host_cuda::Fiber& self = host_cuda::current();
  if (valid_bytes < 0 || valid_bytes > kBytes) host_cuda::fail(host_cuda::format("copy_async: %d bytes", valid_bytes));
  host_cuda::check_shared(*self.block, shared, kBytes, kBytes, "copy_async");
  host_cuda::check_global(global, valid_bytes, kBytes, "copy_async");
  if (host_cuda::options().late) std::memset(shared, host_cuda::kPoison, kBytes);
  self.copies.issue([=] {
    std::memset(shared, 0, kBytes);
    if (valid_bytes) std::memcpy(shared, global, size_t(valid_bytes));
  });
}

inline void copy_async_commit() { host_cuda::current().copies.commit(); }

template <int kPending>
void copy_async_wait() {
  host_cuda::current().copies.wait(kPending);
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) { host::load_matrix<4, false>("load_matrix_x4", r, row); }
inline void load_matrix_x2(uint32_t (&r)[2], const void* row) { host::load_matrix<2, false>("load_matrix_x2", r, row); }
inline void load_matrix_x4_trans(uint32_t (&r)[4], const void* row) {
  host::load_matrix<4, true>("load_matrix_x4_trans", r, row);
}
inline void load_matrix_x2_trans(uint32_t (&r)[2], const void* row) {
  host::load_matrix<2, true>("load_matrix_x2_trans", r, row);
}

// Lane 4 * i + j holds in register r elements 2 * j and 2 * j + 1 of: A, row i + 8 * (r % 2), from column 8 * (r / 2)
// on; B, column i, from row 8 * r on.
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma<16>("mma_16x8x16", {d, a, b}, [](host::MmaLane** lanes, float (*a)[16], float (*b)[16]) {
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      for (int r = 0; r < 4; ++r) {
        const float2 pair = unpack2<T>(lanes[lane]->a[r]);
        a[i + r % 2 * 8][j + r / 2 * 8] = pair.x;
        a[i + r % 2 * 8][j + r / 2 * 8 + 1] = pair.y;
      }
      for (int r = 0; r < 2; ++r) {
        const float2 pair = unpack2<T>(lanes[lane]->b[r]);
        b[i][j + r * 8] = pair.x;
        b[i][j + r * 8 + 1] = pair.y;
      }
    }
  });
}

// Lane 4 * i + j holds in register r: A[i + 8 * (r % 2)][j + 4 * (r / 2)]; B[j + 4 * r][i].
inline void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::mma<8>("mma_16x8x8_tf32", {d, a, b}, [](host::MmaLane** lanes, float (*a)[8], float (*b)[8]) {
    for (int lane = 0; lane < host::kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4;
      for (int r = 0; r < 4; ++r) a[i + r % 2 * 8][j + r / 2 * 4] = tf32_operand(lanes[lane]->a[r]);
      for (int r = 0; r < 2; ++r) b[i][j + r * 4] = tf32_operand(lanes[lane]->b[r]);
    }
  });
}

}  // namespace pointfuse
