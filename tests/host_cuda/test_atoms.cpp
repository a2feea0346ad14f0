// Tests of the emulated atoms against the layout tables and rules of the PTX documentation, written out here on their
// own.
//
//   test_atoms --list      the names
//   test_atoms [names]     runs those tests, or all; a line for each
#include <cstdio>
#include <limits>
#include <set>

#include "atoms.cuh"

using namespace pointfuse;

namespace {

struct Test {
  const char* name;
  void (*body)();
};

std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

struct Register {
  Register(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

#define TEST(name)                             \
  void name();                                 \
  const Register register_##name(#name, name); \
  void name()

void require(bool truth, const std::string& message) {
  if (!truth) throw message;
}

#define CHECK(truth) require(truth, host_cuda::format("line %d: %s", __LINE__, #truth))
#define CHECK_EQUAL(got, wanted) \
  require((got) == (wanted),     \
          host_cuda::format("line %d: %s is %g, not %g", __LINE__, #got, double(got), double(wanted)))

template <class... Parameters, class... Args>
void run(LaunchConfig config, void (*kernel)(Parameters...), Args... args) {
  const cudaError_t error = launch(config, nullptr, kernel, args...);
  require(error == cudaSuccess, host_cuda::last_error());
}

// The launch must fail with a message that contains `text`.
template <class... Parameters, class... Args>
void fails(const std::string& text, LaunchConfig config, void (*kernel)(Parameters...), Args... args) {
  const cudaError_t error = launch(config, nullptr, kernel, args...);
  require(error != cudaSuccess, "no failure where this was expected: " + text);
  require(host_cuda::last_error().find(text) != std::string::npos,
          "expected: " + text + "; got: " + host_cuda::last_error());
}

// Runs `body` late and early, in turn and in permuted orders.
template <class Body>
void in_every_mode(Body body) {
  for (const bool late : {true, false})
    for (const uint64_t seed : {0, 1, 2, 3, 4}) {
      host_cuda::options() = {late, seed};
      body();
    }
}

LaunchConfig block_of(int threads, int shared_bytes = 0) { return {1, threads, shared_bytes, 1, false}; }

// Small integers, exact in every format, of which neighbours differ.
float sample(int i) { return float((i * 37 + i / 7) % 17 - 8); }

template <class T>
std::vector<T> samples(int count) {
  std::vector<T> values(count);
  for (int i = 0; i < count; ++i) values[i] = from_float<T>(sample(i));
  return values;
}

// Numbers.

template <class T>
void check_rounding(float value) {
  const T rounded = from_float<T>(value);
  const double error = std::fabs(double(to_float(rounded)) - value);
  for (const int step : {-1, 1}) {
    const T neighbour{uint16_t(rounded.bits + step)};
    const double other = std::fabs(double(to_float(neighbour)) - value);
    if (std::isnan(other) || (neighbour.bits ^ rounded.bits) >> 15) continue;
    require(error < other || (error == other && rounded.bits % 2 == 0),
            host_cuda::format("%.9g becomes %.9g", value, to_float(rounded)));
  }
}

template <class T>
void check_format() {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const T number{uint16_t(bits)};
    const float value = to_float(number);
    if (std::isnan(value))
      CHECK(std::isnan(to_float(from_float<T>(value))));
    else
      CHECK_EQUAL(from_float<T>(value).bits, bits);
    const float next = to_float(T{uint16_t(bits + 1)});
    if (!std::isfinite(value) || !std::isfinite(next)) continue;
    const float middle = value / 2 + next / 2;
    for (const float near : {middle, std::nextafter(middle, 1e30f), std::nextafter(middle, -1e30f)})
      check_rounding<T>(near);
  }
}

TEST(half_rounds_to_nearest_even) {
  check_format<half_t>();
  CHECK_EQUAL(to_float(half_t{0x3555}), 0.333251953125f);
  CHECK_EQUAL(to_float(half_t{0x0001}), 0x1p-24f);
  CHECK_EQUAL(from_float<half_t>(65519.99f).bits, 0x7bff);
  CHECK_EQUAL(from_float<half_t>(65520.0f).bits, 0x7c00);
  CHECK_EQUAL(from_float<half_t>(-1e30f).bits, 0xfc00);
}

TEST(bfloat16_rounds_to_nearest_even) {
  check_format<bfloat16_t>();
  CHECK_EQUAL(from_float<bfloat16_t>(1.00390625f).bits, 0x3f80);
  CHECK_EQUAL(from_float<bfloat16_t>(1.01171875f).bits, 0x3f82);
  CHECK_EQUAL(from_float<bfloat16_t>(3.4e38f).bits, 0x7f80);
}

TEST(tf32_rounds_ties_away) {
  CHECK_EQUAL(to_tf32(1.0f + 0x1p-11f), bits_of_float(1.0f + 0x1p-10f));
  CHECK_EQUAL(to_tf32(-1.0f - 0x1p-11f), bits_of_float(-1.0f - 0x1p-10f));
  CHECK_EQUAL(to_tf32(1.0f + 0x1.ffep-12f), bits_of_float(1.0f));
  CHECK_EQUAL(to_tf32(INFINITY), bits_of_float(INFINITY));
  CHECK(std::isnan(float_of_bits(to_tf32(NAN))));
}

TEST(packing_puts_the_low_number_first) {
  CHECK_EQUAL(pack2<half_t>(1.0f, -2.0f), 0xc0003c00u);
  CHECK_EQUAL(unpack2<bfloat16_t>(0xc0003f80u).x, 1.0f);
  CHECK_EQUAL(unpack2<bfloat16_t>(0xc0003f80u).y, -2.0f);
}

TEST(fast_division_has_the_devices_limits) {
  CHECK_EQUAL(divide_fast(3.0f, -4.0f), -0.75f);
  CHECK_EQUAL(divide_fast(3.0f, INFINITY), 0.0f);
  CHECK_EQUAL(divide_fast(1e38f, 0x1p127f), 0.0f);
  CHECK(std::isnan(divide_fast(-INFINITY, INFINITY)));
}

// Threads.

TEST(threads_know_their_places) {
  int got[3 * 64 * 4];
  run(
      {3, 64, 0, 1, false},
      +[](int* out) {
        int* own = out + (blockIdx.x * blockDim.x + threadIdx.x) * 4;
        own[0] = thread_index(), own[1] = warp_index(), own[2] = lane_index(), own[3] = int(gridDim.x);
      },
      got);
  for (int i = 0; i < 3 * 64; ++i) {
    CHECK_EQUAL(got[4 * i], i % 64);
    CHECK_EQUAL(got[4 * i + 1], i % 64 / 32);
    CHECK_EQUAL(got[4 * i + 2], i % 32);
    CHECK_EQUAL(got[4 * i + 3], 3);
  }
}

TEST(shuffles_read_other_lanes) {
  in_every_mode([] {
    float got[2][64];
    run(
        block_of(64),
        +[](float* out) {
          const float own = float(thread_index());
          out[thread_index()] = shuffle(own, (lane_index() + 5) % 32);
          out[64 + thread_index()] = shuffle_xor(own, 6);
        },
        got[0]);
    for (int i = 0; i < 64; ++i) {
      CHECK_EQUAL(got[0][i], i / 32 * 32 + (i + 5) % 32);
      CHECK_EQUAL(got[1][i], i ^ 6);
    }
  });
}

TEST(one_lane_is_elected) {
  std::set<int> elected_lanes;
  in_every_mode([&] {
    int elected[64] = {};
    run(
        block_of(64),
        +[](int* out) {
          const bool first = elect_one(), second = elect_one();
          out[thread_index()] = first + second;
        },
        elected);
    CHECK_EQUAL(std::count(elected, elected + 64, 2), 2);
    elected_lanes.insert(int(std::find(elected, elected + 64, 2) - elected));
  });
  CHECK(elected_lanes.size() > 1);
}

void rotate_through_shared(float* out, bool synchronised) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_index()] = float(thread_index());
  if (synchronised) block_sync();
  out[thread_index()] = shared[(thread_index() + 33) % 128];
}

TEST(block_sync_orders_shared_memory) {
  in_every_mode([] {
    float got[128];
    run(block_of(128, 512), rotate_through_shared, got, true);
    for (int i = 0; i < 128; ++i) CHECK_EQUAL(got[i], (i + 33) % 128);
    run(block_of(128, 512), rotate_through_shared, got, false);
    CHECK(std::any_of(got, got + 128, [](float value) { return std::isnan(value); }));
  });
}

// Two warps fill a buffer that two others empty, by turns.
void hand_over(int* out) {
  constexpr int kFull = 1, kEmpty = 2, kRounds = 5;
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int thread = thread_index() % 64;
  for (int round = 0; round < kRounds; ++round) {
    if (warp_index() < 2) {
      if (round) named_sync(kEmpty, 128);
      shared[thread] = round * 64 + thread;
      named_arrive(kFull, 128);
    } else {
      named_sync(kFull, 128);
      out[round * 64 + thread] = shared[(thread + 40) % 64];
      if (round + 1 < kRounds) named_arrive(kEmpty, 128);
    }
  }
}

TEST(named_barriers_count_syncs_and_arrivals) {
  in_every_mode([] {
    int got[5 * 64];
    run(block_of(128, 256), hand_over, got);
    for (int i = 0; i < 5 * 64; ++i) CHECK_EQUAL(got[i], i / 64 * 64 + (i + 40) % 64);
  });
}

TEST(barriers_refuse_the_wrong_participants) {
  fails(
      "barrier 3 is expected by one warp to have 64 threads, by another 96", block_of(96),
      +[](int) { named_sync(3, warp_index() ? 96 : 64); }, 0);
  fails(
      "lane 8 comes to shuffle while lanes of its warp wait in warp_sync", block_of(32),
      +[](int) { lane_index() < 8 ? warp_sync() : void(shuffle(1, 2)); }, 0);
  fails("there is no barrier 16", block_of(32), +[](int) { named_sync(16, 32); }, 0);
  fails("named_sync: 48 threads of 64", block_of(64), +[](int) { named_sync(1, 48); }, 0);
}

TEST(deadlock_says_who_waits_where) {
  fails(
      "deadlock\n"
      "  block 1, threads 0 to 31: in named_sync, barrier 1: 32 of 64 threads came\n"
      "  block 1, threads 32 to 63: in block_sync, barrier 0: 32 of 96 threads came\n"
      "  block 1, threads 64 to 95: ended",
      {2, 96, 0, 1, false},
      +[](int) {
        if (blockIdx.x == 0) return;
        if (warp_index() == 0) named_sync(1, 64);
        if (warp_index() == 1) block_sync();
      },
      0);
}

TEST(a_seed_decides_the_schedule) {
  const auto order = [](uint64_t seed) {
    host_cuda::options() = {true, seed};
    std::vector<int> turns;
    run(
        block_of(128),
        +[](std::vector<int>* turns) {
          for (int i = 0; i < 4; ++i) {
            warp_sync();
            turns->push_back(thread_index());
          }
        },
        &turns);
    return turns;
  };
  const auto lanes = [&](uint64_t seed) {
    std::vector<int> lanes;
    for (const int thread : order(seed)) lanes.push_back(thread % 32);
    return lanes;
  };
  CHECK(order(1) == order(1));
  CHECK(order(1) != order(2));
  CHECK(lanes(1) != lanes(2));
  CHECK(order(0) != order(1));
}

// Shared and global memory.

TEST(shared_memory_starts_as_nan_and_aligned) {
  bool good = false;
  run(
      block_of(32, 4096),
      +[](bool* good) {
        const uint16_t* words = reinterpret_cast<uint16_t*>(shared_memory());
        *good = reinterpret_cast<uintptr_t>(words) % 1024 == 0 && shared_address(words) % 1024 == 0;
        for (int i = 0; i < 2048; ++i)
          *good = *good && std::isnan(to_float(half_t{words[i]})) && std::isnan(to_float(bfloat16_t{words[i]}));
      },
      &good);
  CHECK(good);
}

TEST(writes_outside_shared_memory_are_noticed) {
  fails(
      "shared memory was written outside its 100 bytes", block_of(32, 100), +[](int) { shared_memory()[100] = 1; }, 0);
  fails("shared memory was written outside its 100 bytes", block_of(32, 100), +[](int) { shared_memory()[-1] = 1; }, 0);
}

TEST(global_accesses_stay_within_registered_memory) {
  alignas(16) static float memory[64];
  host_cuda::register_global(memory, 32 * sizeof(float));
  run(block_of(32), +[](float* at) { store_global(at + lane_index(), load_constant(at) + load_global(at)); }, memory);
  fails("load_global: 4 bytes at", block_of(64), +[](float* at) { load_global(at + thread_index()); }, memory);
  fails("store_global: 16 bytes at", block_of(32), +[](float* at) { store_global((float4*)(at + 32), {}); }, memory);
  fails(
      "copy_async: 4 bytes at", block_of(32, 16), +[](float* at) { copy_async<16>(shared_memory(), at + 32, 4); },
      memory);
  fails("is not a multiple of 8", block_of(32), +[](float* at) { load_global((float2*)(at + 1)); }, memory);
  host_cuda::clear_global();
}

// cp.async.

TEST(cp_async_fills_with_zeros) {
  in_every_mode([] {
    alignas(16) char source[48], got[48];
    std::memset(source, 7, sizeof(source));
    run(
        block_of(32, 48),
        +[](const char* source, char* out) {
          if (thread_index() == 0) {
            copy_async<16>(shared_memory(), source, 5);
            copy_async<16>(shared_memory() + 16, nullptr, 0);
            copy_async<8>(shared_memory() + 32, source, 8);
            copy_async<4>(shared_memory() + 40, source, 3);
            copy_async<4>(shared_memory() + 44, source, 4);
            copy_async_commit();
            copy_async_wait<0>();
            std::memcpy(out, shared_memory(), 48);
          }
        },
        source, got);
    for (int i = 0; i < 48; ++i) CHECK_EQUAL(got[i], i < 5 || (i >= 32 && i != 43) ? 7 : 0);
  });
}

TEST(cp_async_arrives_when_waited_for) {
  in_every_mode([] {
    float source[4] = {1, 2, 3, 4}, got[3][4];
    run(
        block_of(32, 16),
        +[](const float* source, float* out) {
          if (thread_index()) return;
          const auto look = [&](int when) { std::memcpy(out + 4 * when, shared_memory(), 16); };
          for (int i = 0; i < 3; ++i) {
            copy_async<4>(shared_memory() + 4 * i, source + i, 4);
            copy_async_commit();
          }
          copy_async<4>(shared_memory() + 12, source + 3, 4);  // never committed, so never waited for
          look(0);
          copy_async_wait<1>();
          look(1);
          copy_async_wait<0>();
          look(2);
        },
        source, got[0]);
    const int arrived_late[3] = {0, 2, 3};
    for (int when = 0; when < 3; ++when)
      for (int i = 0; i < 4; ++i) {
        const bool arrived = !host_cuda::options().late || i < arrived_late[when];
        CHECK(arrived ? got[when][i] == source[i] : std::isnan(got[when][i]));
      }
  });
}

TEST(cp_async_spoils_its_destination_when_issued) {
  in_every_mode([] {
    float source = 1, got;
    run(
        block_of(32, 16),
        +[](const float* source, float* out) {
          if (thread_index()) return;
          float* shared = reinterpret_cast<float*>(shared_memory());
          *shared = 5;
          copy_async<4>(shared, source, 4);
          *out = *shared;
          copy_async_commit();
          copy_async_wait<0>();
        },
        &source, &got);
    CHECK(host_cuda::options().late ? std::isnan(got) : got == 1);
  });
}

TEST(cp_async_refuses_bad_addresses) {
  static char source[64];
  fails(
      "copy_async: shared address 4 is not a multiple of 8", block_of(32, 64),
      +[](char* x) { copy_async<8>(shared_memory() + 4, x, 8); }, source);
  fails(
      "copy_async: bytes 64 to 80 of a shared memory of 64", block_of(32, 64),
      +[](char* x) { copy_async<16>(shared_memory() + 64, x, 16); }, source);
  fails(
      "copy_async: global address", block_of(32, 64), +[](char* x) { copy_async<4>(shared_memory(), x, 4); },
      source + 1);
}

// ldmatrix, stmatrix.

// Row r of matrix m lies at byte 16 * (8 * m + r); its element c is 64 * m + 8 * r + c.
void fill_matrices() {
  uint16_t* shared = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = thread_index(); i < 256; i += 32) shared[i] = uint16_t(i);
  warp_sync();
}

TEST(ldmatrix_gives_each_lane_its_elements) {
  in_every_mode([] {
    uint32_t got[4][32][4] = {};
    run(
        block_of(32, 512),
        +[](uint32_t (*out)[32][4]) {
          fill_matrices();
          const int lane = lane_index();
          const char* row = shared_memory() + 16 * lane;
          load_matrix_x4(out[0][lane], row);
          load_matrix_x4_trans(out[1][lane], row);
          // Lanes from 16 on give no row.
          const char* row_x2 = lane < 16 ? row : nullptr;
          uint32_t pair[2];
          load_matrix_x2(pair, row_x2);
          std::copy_n(pair, 2, out[2][lane]);
          load_matrix_x2_trans(pair, row_x2);
          std::copy_n(pair, 2, out[3][lane]);
        },
        got);
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const int plain = 64 * m + 8 * (lane / 4) + 2 * (lane % 4);
        const int transposed = 64 * m + 8 * (2 * (lane % 4)) + lane / 4;
        CHECK_EQUAL(got[0][lane][m], uint32_t(plain | (plain + 1) << 16));
        CHECK_EQUAL(got[1][lane][m], uint32_t(transposed | (transposed + 8) << 16));
        if (m < 2) CHECK_EQUAL(got[2][lane][m], got[0][lane][m]);
        if (m < 2) CHECK_EQUAL(got[3][lane][m], got[1][lane][m]);
      }
  });
}

TEST(stmatrix_puts_each_lanes_elements) {
  in_every_mode([] {
    uint16_t got[4][256];
    run(
        block_of(32, 4 * 512),
        +[](uint16_t* out) {
          const int lane = lane_index(), r = lane / 4, c = lane % 4 * 2;
          uint32_t plain[4], transposed[4];
          for (int m = 0; m < 4; ++m) {
            plain[m] = uint32_t(64 * m + 8 * r + c) | uint32_t(64 * m + 8 * r + c + 1) << 16;
            transposed[m] = uint32_t(64 * m + 8 * c + r) | uint32_t(64 * m + 8 * (c + 1) + r) << 16;
          }
          char* row = shared_memory() + 16 * lane;
          store_matrix_x4(row, plain);
          store_matrix_x4_trans(row + 512, transposed);
          store_matrix_x2(row + 1024, {plain[0], plain[1]});
          store_matrix_x2_trans(row + 1536, {transposed[0], transposed[1]});
          warp_sync();
          if (lane == 0) std::memcpy(out, shared_memory(), 4 * 512);
        },
        got[0]);
    for (int i = 0; i < 256; ++i) {
      CHECK_EQUAL(got[0][i], i);
      CHECK_EQUAL(got[1][i], i);
      CHECK_EQUAL(got[2][i], i < 128 ? i : 0xffff);
      CHECK_EQUAL(got[3][i], i < 128 ? i : 0xffff);
    }
  });
}

TEST(ldmatrix_and_stmatrix_refuse_bad_addresses) {
  fails(
      "load_matrix_x4: shared address 8 is not a multiple of 16", block_of(32, 1024),
      +[](int) {
        uint32_t r[4];
        load_matrix_x4(r, shared_memory() + 8);
      },
      0);
  fails(
      "load_matrix_x2: bytes 1024 to 1040 of a shared memory of 1024", block_of(32, 1024),
      +[](int) {
        uint32_t r[2];
        load_matrix_x2(r, shared_memory() + (lane_index() == 3 ? 1024 : 0));
      },
      0);
  fails(
      "store_matrix_x4_trans: bytes -16 to 0", block_of(32, 1024),
      +[](int) { store_matrix_x4_trans(shared_memory() - 16, {0, 0, 0, 0}); }, 0);
}

// mma.

// The documentation's tables for mma.m16n8k16 with 16-bit operands: element i of a lane's fragment.
int a16_row(int lane, int i) { return lane / 4 + (i < 2 || (i >= 4 && i < 6) ? 0 : 8); }
int a16_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 4 ? 0 : 8); }
int b16_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i < 2 ? 0 : 8); }
int b16_column(int lane, int) { return lane / 4; }
// The same for mma.m16n8k8 with TF32, and for the accumulators of both.
int a32_row(int lane, int i) { return lane / 4 + (i == 0 || i == 2 ? 0 : 8); }
int a32_column(int lane, int i) { return lane % 4 + (i < 2 ? 0 : 4); }
int b32_row(int lane, int i) { return lane % 4 + (i == 0 ? 0 : 4); }
int b32_column(int lane, int) { return lane / 4; }
int d_row(int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); }
int d_column(int lane, int i) { return lane % 4 * 2 + (i & 1); }

float a_at(int row, int k) { return sample(row * 16 + k); }
float b_at(int k, int column) { return sample(1000 + k * 8 + column); }

void check_product(const float (*d)[4], int depth) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      float sum = 100;
      for (int k = 0; k < depth; ++k) sum += a_at(d_row(lane, i), k) * b_at(k, d_column(lane, i));
      CHECK_EQUAL(d[lane][i], sum);
    }
}

template <class T>
void check_mma_16x8x16() {
  in_every_mode([] {
    float d[32][4];
    run(
        block_of(32),
        +[](float (*out)[4]) {
          const int lane = lane_index();
          uint32_t a[4], b[2];
          for (int i = 0; i < 8; i += 2)
            a[i / 2] = pack2<T>(a_at(a16_row(lane, i), a16_column(lane, i)),
                                a_at(a16_row(lane, i + 1), a16_column(lane, i + 1)));
          for (int i = 0; i < 4; i += 2)
            b[i / 2] = pack2<T>(b_at(b16_row(lane, i), b16_column(lane, i)),
                                b_at(b16_row(lane, i + 1), b16_column(lane, i + 1)));
          float sums[4] = {100, 100, 100, 100};
          mma_16x8x16<T>(sums, a, b);
          std::copy_n(sums, 4, out[lane]);
        },
        d);
    check_product(d, 16);
  });
}

TEST(mma_16x8x16_half_follows_the_fragment_tables) { check_mma_16x8x16<half_t>(); }
TEST(mma_16x8x16_bfloat16_follows_the_fragment_tables) { check_mma_16x8x16<bfloat16_t>(); }

TEST(mma_16x8x8_tf32_follows_the_fragment_tables) {
  in_every_mode([] {
    float d[32][4];
    run(
        block_of(32),
        +[](float (*out)[4]) {
          const int lane = lane_index();
          constexpr uint32_t kIgnored = 0x1fff;
          uint32_t a[4], b[2];
          for (int i = 0; i < 4; ++i) a[i] = bits_of_float(a_at(a32_row(lane, i), a32_column(lane, i))) | kIgnored;
          for (int i = 0; i < 2; ++i) b[i] = bits_of_float(b_at(b32_row(lane, i), b32_column(lane, i))) | kIgnored;
          float sums[4] = {100, 100, 100, 100};
          mma_16x8x8_tf32(sums, a, b);
          std::copy_n(sums, 4, out[lane]);
        },
        d);
    check_product(d, 8);
  });
}

// mbarriers.

TEST(mbarrier_phases_alternate) {
  in_every_mode([] {
    int got[4 * 32];
    run(
        block_of(64, 512),
        +[](int* out) {
          Barrier* full = reinterpret_cast<Barrier*>(shared_memory());
          Barrier* empty = full + 1;
          int* buffer = reinterpret_cast<int*>(shared_memory() + 128);
          if (thread_index() == 0) {
            barrier_init(full, 32);
            barrier_init(empty, 32);
            fence_barrier_init();
          }
          block_sync();
          for (int round = 0; round < 4; ++round) {
            if (warp_index() == 0) {
              barrier_wait(empty, (round & 1) ^ 1);  // at once in the first round: the phase before the first is over
              buffer[lane_index()] = 32 * round + lane_index();
              barrier_arrive(full);
            } else {
              barrier_wait(full, round & 1);
              out[32 * round + lane_index()] = buffer[31 - lane_index()];
              barrier_arrive(empty);
            }
          }
        },
        got);
    for (int i = 0; i < 4 * 32; ++i) CHECK_EQUAL(got[i], i / 32 * 32 + 31 - i % 32);
  });
}

TEST(mbarrier_misuse_is_refused) {
  fails(
      "barrier_arrive: more than the 1 arrivals of a phase", block_of(32, 64),
      +[](int) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory());
        if (thread_index()) return;
        barrier_init(barrier, 1);
        barrier_arrive_expect(barrier, 64);
        barrier_arrive(barrier);
      },
      0);
  fails(
      "barrier_arrive: the barrier was not initialised", block_of(32, 64),
      +[](int) { barrier_arrive(reinterpret_cast<Barrier*>(shared_memory())); }, 0);
  fails(
      "barrier_wait: the barrier was overwritten", block_of(32, 64),
      +[](int) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory());
        if (thread_index() == 0) barrier_init(barrier, 1);
        warp_sync();
        barrier->state = 0;
        barrier_wait(barrier, 0);
      },
      0);
  fails(
      "deadlock\n  block 0, threads 0 to 0: in barrier_wait, barrier at byte 8, parity 0: phase 0 lacks 1 arrivals and "
      "64 bytes",
      block_of(32, 64),
      +[](int) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory()) + 1;
        if (thread_index()) return;
        barrier_init(barrier, 2);
        barrier_arrive_expect(barrier, 64);
        barrier_wait(barrier, 0);
      },
      0);
}

// TMA.

// Byte of a swizzled box: its 16-byte column is flipped by the 128-byte row's number.
int swizzled_byte(int row, int byte) { return row * 128 + ((byte / 16) ^ (row % 8)) * 16 + byte % 16; }

constexpr int kMaxBoxBytes = 32 * 1024;

Barrier* barrier_after_box() { return reinterpret_cast<Barrier*>(shared_memory() + kMaxBoxBytes); }

// One thread loads a box, then all of it is copied out, before the wait too.
template <class Load>
void load_and_copy(uint16_t* before, uint16_t* after, int bytes, Load load) {
  Barrier* barrier = barrier_after_box();
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    fence_barrier_init();
    barrier_arrive_expect(barrier, bytes);
    load(barrier);
    std::memcpy(before, shared_memory(), size_t(bytes));
  }
  block_sync();
  barrier_wait(barrier, 0);
  if (thread_index() == 32) std::memcpy(after, shared_memory(), size_t(bytes));
}

struct TileCase {
  int rank;
  int64_t sizes[4];
  int box[4], corner[4];
  bool swizzle;
};

void check_tile(const TileCase& tile) {
  int64_t byte_strides[3], elements = tile.sizes[0] + 8;  // padded rows
  for (int i = 1; i < tile.rank; ++i) {
    byte_strides[i - 1] = elements * 2;
    elements *= tile.sizes[i];
  }
  const std::vector<half_t> x = samples<half_t>(int(elements));
  TensorMap map;
  CHECK(make_tensor_map(&map, DType::kFloat16, tile.rank, x.data(), tile.sizes, byte_strides, tile.box, tile.swizzle) ==
        cudaSuccess);
  std::vector<uint16_t> before(kMaxBoxBytes), after(kMaxBoxBytes);
  const int bytes = int(map.box_bytes());
  run(
      block_of(64, kMaxBoxBytes + 8),
      +[](const TensorMap map, TileCase tile, uint16_t* before, uint16_t* after, int bytes) {
        load_and_copy(before, after, bytes, [&](Barrier* barrier) {
          const int* c = tile.corner;
          if (tile.rank == 2) tensor_load_2d(shared_memory(), &map, barrier, c[0], c[1]);
          if (tile.rank == 3) tensor_load_3d(shared_memory(), &map, barrier, c[0], c[1], c[2]);
          if (tile.rank == 4) tensor_load_4d(shared_memory(), &map, barrier, c[0], c[1], c[2], c[3]);
        });
      },
      map, tile, before.data(), after.data(), bytes);

  for (int i = 0; i < bytes / 2; ++i) {
    CHECK_EQUAL(before[i], host_cuda::options().late ? 0xffff : after[i]);
    int rest = i, at[4] = {};
    bool inside = true;
    int64_t element = 0;
    for (int d = 0; d < tile.rank; ++d) {
      at[d] = tile.corner[d] + rest % tile.box[d];
      rest /= tile.box[d];
      inside = inside && at[d] >= 0 && at[d] < tile.sizes[d];
      element += at[d] * (d ? byte_strides[d - 1] / 2 : 1);
    }
    const int row = i / tile.box[0], column = i % tile.box[0];
    const int where = tile.swizzle ? swizzled_byte(row, 2 * column) / 2 : i;
    CHECK_EQUAL(after[where], inside ? x[element].bits : 0);
  }
}

TEST(tma_loads_tiles) {
  in_every_mode([] {
    check_tile({2, {64, 40}, {64, 32}, {0, 3}, true});
    check_tile({2, {72, 40}, {64, 32}, {64, 20}, true});    // past both ends
    check_tile({2, {72, 40}, {64, 16}, {-5, -3}, true});    // before both beginnings
    check_tile({2, {72, 40}, {24, 16}, {50, 30}, false});   // not swizzled
    check_tile({2, {72, 40}, {64, 16}, {100, 100}, true});  // nothing inside
    check_tile({3, {64, 7, 3}, {64, 8, 2}, {0, -1, 2}, true});
    check_tile({4, {40, 5, 6, 3}, {64, 3, 4, 2}, {8, 3, -2, 1}, true});
  });
}

TEST(tma_rounds_to_tf32_where_asked) {
  alignas(16) static const float x[8] = {
      1.0f + 0x1p-11f, 1.0f + 0x3p-11f, -1.0f - 0x1.002p-11f, 0x1.fffffep0f, INFINITY, NAN, 0x1p-149f, 3.0f};
  const float wanted[8] = {1.0f, 1.0f + 0x1p-9f, -1.0f - 0x1p-10f, 2.0f, INFINITY, NAN, 0.0f, 3.0f};
  const int64_t sizes[2] = {8, 1}, byte_strides[1] = {32};
  const int box[2] = {8, 1};
  for (const bool rounds : {false, true}) {
    TensorMap map;
    CHECK(make_tensor_map(&map, DType::kFloat32, 2, x, sizes, byte_strides, box, false, rounds) == cudaSuccess);
    uint16_t before[16], after[16];
    run(
        block_of(64, kMaxBoxBytes + 8),
        +[](const TensorMap map, uint16_t* before, uint16_t* after) {
          load_and_copy(before, after, 32,
                        [&](Barrier* barrier) { tensor_load_2d(shared_memory(), &map, barrier, 0, 0); });
        },
        map, before, after);
    float loaded[8];
    std::memcpy(loaded, after, sizeof(loaded));
    for (int i = 0; i < 8; ++i) CHECK_EQUAL(bits_of_float(loaded[i]), bits_of_float(rounds ? wanted[i] : x[i]));
  }
}

struct ConvCase {
  int channels, width, height, batch, kernel, stride, padding;
};

// The im2col map of a convolution loads, for a tap, what the convolution reads: compared pixel by pixel.
void check_im2col(const ConvCase& conv, int pixels, int first_pixel, int tap_w, int tap_h, int c) {
  const int out_width = (conv.width + 2 * conv.padding - conv.kernel) / conv.stride + 1;
  const int out_height = (conv.height + 2 * conv.padding - conv.kernel) / conv.stride + 1;
  const std::vector<half_t> x = samples<half_t>(conv.channels * conv.width * conv.height * conv.batch);
  const int64_t sizes[4] = {conv.channels, conv.width, conv.height, conv.batch};
  const int64_t byte_strides[3] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
  const int lower[2] = {-conv.padding, -conv.padding};
  const int upper[2] = {conv.padding - (conv.kernel - 1), conv.padding - (conv.kernel - 1)};
  const int strides[2] = {conv.stride, conv.stride};
  TensorMap map;
  CHECK(make_tensor_map_im2col(&map, DType::kFloat16, x.data(), sizes, byte_strides, lower, upper, 64, pixels,
                               strides) == cudaSuccess);
  const int start[4] = {c, first_pixel % out_width * conv.stride - conv.padding,
                        first_pixel / out_width % out_height * conv.stride - conv.padding,
                        first_pixel / out_width / out_height};
  std::vector<uint16_t> before(kMaxBoxBytes), after(kMaxBoxBytes);
  struct Tap {
    int start[4], w, h;
  } tap{{start[0], start[1], start[2], start[3]}, tap_w, tap_h};
  run(
      block_of(64, kMaxBoxBytes + 8),
      +[](const TensorMap map, Tap tap, uint16_t* before, uint16_t* after, int bytes) {
        load_and_copy(before, after, bytes, [&](Barrier* barrier) {
          tensor_load_im2col(shared_memory(), &map, barrier, tap.start[0], tap.start[1], tap.start[2], tap.start[3],
                             tap.w, tap.h);
        });
      },
      map, tap, before.data(), after.data(), pixels * 128);

  for (int pixel = 0; pixel < pixels; ++pixel) {
    const int p = first_pixel + pixel, n = p / out_width / out_height;
    const int w = p % out_width * conv.stride - conv.padding + tap_w;
    const int h = p / out_width % out_height * conv.stride - conv.padding + tap_h;
    const bool inside = n < conv.batch && w >= 0 && w < conv.width && h >= 0 && h < conv.height;
    for (int i = 0; i < 64; ++i) {
      const int element = ((n * conv.height + h) * conv.width + w) * conv.channels + c + i;
      const uint16_t wanted = inside && c + i < conv.channels ? x[element].bits : 0;
      CHECK_EQUAL(after[swizzled_byte(pixel, 2 * i) / 2], wanted);
    }
  }
}

TEST(tma_im2col_loads_what_the_convolution_reads) {
  in_every_mode([] {
    const ConvCase same{72, 7, 5, 3, 3, 1, 1}, strided{64, 9, 8, 2, 3, 2, 1}, valid{64, 7, 6, 2, 3, 2, 0},
        pointwise{64, 5, 4, 3, 1, 2, 0};
    for (int tap = 0; tap < 9; ++tap) {
      check_im2col(same, 32, 11, tap % 3, tap / 3, tap % 2 * 64);
      check_im2col(strided, 24, 7, tap % 3, tap / 3, 0);
      check_im2col(valid, 16, 3, tap % 3, tap / 3, 0);
    }
    check_im2col(pointwise, 16, 4, 0, 0, 0);
  });
}

TensorMap map_2d(const void* base, int64_t columns, int64_t rows, int box_columns, int box_rows) {
  const int64_t sizes[2] = {columns, rows}, byte_strides[1] = {2 * columns};
  const int box[2] = {box_columns, box_rows};
  TensorMap map;
  CHECK(make_tensor_map(&map, DType::kFloat16, 2, base, sizes, byte_strides, box, true) == cudaSuccess);
  return map;
}

TEST(tma_loads_arrive_in_any_order) {
  alignas(16) static half_t x[64 * 64];
  std::set<std::vector<int>> orders;
  for (const uint64_t seed : {0, 1, 2, 3, 4, 5, 6, 7}) {
    host_cuda::options() = {true, seed};
    std::vector<int> order;
    run(
        block_of(64, 4096),
        +[](const TensorMap map, std::vector<int>* order) {
          Barrier* barriers = reinterpret_cast<Barrier*>(shared_memory() + 2048);
          if (thread_index() == 0)
            for (int i = 0; i < 2; ++i) {
              barrier_init(barriers + i, 1);
              barrier_arrive_expect(barriers + i, 1024);
              tensor_load_2d(shared_memory() + 1024 * i, &map, barriers + i, 0, 8 * i);
            }
          block_sync();
          barrier_wait(barriers + warp_index(), 0);
          if (lane_index() == 0) order->push_back(warp_index());
        },
        map_2d(x, 64, 64, 64, 8), &order);
    orders.insert(order);
  }
  CHECK_EQUAL(orders.size(), 2u);
}

TEST(tma_loads_wait_and_misuse_is_refused) {
  alignas(16) static half_t x[64 * 64];
  const TensorMap map = map_2d(x, 64, 64, 64, 8);
  host_cuda::options() = {true, 0};
  fails(
      "block 0 ended with a tensor_load under way", block_of(32, 2048),
      +[](const TensorMap map) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + 1024);
        if (thread_index()) return;
        barrier_init(barrier, 1);
        tensor_load_2d(shared_memory(), &map, barrier, 0, 0);
      },
      map);
  fails(
      "tensor_load_2d: shared address 64 is not a multiple of 128", block_of(32, 2048),
      +[](const TensorMap map) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + 1536);
        barrier_init(barrier, 1);
        tensor_load_2d(shared_memory() + 64, &map, barrier, 0, 0);
      },
      map);
  fails(
      "tensor_load_3d: the map has another kind or rank", block_of(32, 2048),
      +[](const TensorMap map) { tensor_load_3d(shared_memory(), &map, nullptr, 0, 0, 0); }, map);
  host_cuda::register_global(x, 32 * 128);
  fails(
      "tensor_load_2d: 16 bytes at", block_of(32, 2048),
      +[](const TensorMap map) {
        Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory() + 1536);
        barrier_init(barrier, 1);
        tensor_load_2d(shared_memory(), &map, barrier, 0, 30);
      },
      map);
  host_cuda::clear_global();
}

// A box of 8 rows is stored; `early_reuse` overwrites it before the store has surely read it.
void store_a_box(const TensorMap map, int c0, int c1, bool early_reuse) {
  if (thread_index() == 0)
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 64; ++column) {
        const half_t value = from_float<half_t>(float(64 * row + column));
        std::memcpy(shared_memory() + swizzled_byte(row, 2 * column), &value, 2);
      }
  fence_async_proxy();
  block_sync();
  if (thread_index()) return;
  tensor_store_2d(&map, shared_memory(), c0, c1);
  tensor_store_commit();
  if (early_reuse) {
    std::memset(shared_memory(), 0, 1024);
    fence_async_proxy();
  }
  tensor_store_wait_read<0>();
  tensor_store_wait<0>();
}

TEST(tma_stores_what_lies_inside) {
  in_every_mode([] {
    for (const auto& [c0, c1] : {std::pair(0, 4), std::pair(16, 15), std::pair(-3, -2)}) {
      std::vector<half_t> y(72 * 20 + 64, half_t{0xffff});
      const TensorMap map = map_2d(y.data(), 72, 20, 64, 8);
      run(block_of(64, 1024), store_a_box, map, c0, c1, false);
      for (int i = 0; i < int(y.size()); ++i) {
        const int row = i / 72 - c1, column = i % 72 - c0;
        const bool inside = i < 72 * 20 && row >= 0 && row < 8 && column >= 0 && column < 64;
        CHECK_EQUAL(y[i].bits, inside ? from_float<half_t>(float(64 * row + column)).bits : 0xffff);
      }
    }
  });
}

TEST(tma_stores_read_late) {
  in_every_mode([] {
    std::vector<half_t> y(64 * 8);
    run(block_of(64, 1024), store_a_box, map_2d(y.data(), 64, 8, 64, 8), 0, 0, true);
    CHECK_EQUAL(to_float(y[100]), host_cuda::options().late ? 0 : 100);
    fails(
        "the thread ends without waiting for its tensor_store", block_of(32, 1024),
        +[](const TensorMap map) {
          tensor_store_2d(&map, shared_memory(), 0, 0);
          tensor_store_commit();
        },
        map_2d(y.data(), 64, 8, 64, 8));
  });
}

TEST(tensor_maps_refuse_what_the_driver_refuses) {
  alignas(128) static half_t x[4096];
  TensorMap map;
  const auto tiled = [&](const half_t* base, int64_t byte_stride, int columns, int rows, bool swizzle) {
    const int64_t sizes[2] = {64, 16};
    const int box[2] = {columns, rows};
    return make_tensor_map(&map, DType::kFloat16, 2, base, sizes, &byte_stride, box, swizzle) == cudaSuccess;
  };
  CHECK(tiled(x, 128, 64, 16, true));
  CHECK(!tiled(x + 4, 128, 64, 16, true));
  CHECK(!tiled(x, 130, 64, 16, true));
  CHECK(!tiled(x, 128, 128, 16, true));
  CHECK(tiled(x, 128, 128, 16, false));
  CHECK(!tiled(x, 128, 64, 257, true));
  CHECK(!tiled(x, 128, 0, 16, true));
  CHECK(!tiled(x, 128, 12, 16, true));
  const auto im2col = [&](int lower, int upper, int channels, int pixels, int stride) {
    const int64_t sizes[4] = {64, 8, 8, 1}, byte_strides[3] = {128, 1024, 8192};
    const int low[2] = {lower, lower}, high[2] = {upper, upper}, strides[2] = {stride, stride};
    return make_tensor_map_im2col(&map, DType::kFloat16, x, sizes, byte_strides, low, high, channels, pixels,
                                  strides) == cudaSuccess;
  };
  CHECK(im2col(-1, -1, 64, 1024, 8));
  CHECK(!im2col(-129, -1, 64, 64, 1));
  CHECK(!im2col(0, -8, 64, 64, 1));
  CHECK(!im2col(-1, -1, 128, 64, 1));
  CHECK(!im2col(-1, -1, 64, 1025, 1));
  CHECK(!im2col(-1, -1, 64, 64, 9));
}

// wgmma.

// Where element (row, k) of a K-major operand lies, with 128 bytes of K to a row.
template <class T>
int k_major_byte(int row, int k) {
  return swizzled_byte(row, k * int(sizeof(T)));
}
// Where element (k, column) of a pixel-major operand lies: blocks of 64 columns, each of `depth` rows of 128 bytes.
int pixel_major_byte(int k, int column, int depth) {
  return column / 64 * depth * 128 + swizzled_byte(k, column % 64 * 2);
}

template <class T>
T stored(float value) {
  return from_float<T>(value);
}
template <>
float stored<float>(float value) {
  return float_of_bits(bits_of_float(value) | 0x1fff);  // TF32 ignores the low bits
}

constexpr int kOperandBytes = 32 * 1024;

// Fills A (64 rows) and B (`columns`), 128 bytes of K each.
template <class T, bool kPixelMajor>
void fill_operands(int columns) {
  constexpr int kDepth = 128 / int(sizeof(T));
  for (int i = thread_index(); i < (64 + columns) * kDepth; i += 128) {
    const int row = i / kDepth, k = i % kDepth, column = row - 64;
    const T value = stored<T>(row < 64 ? a_at(row, k) : b_at(k, column));
    const int byte = row < 64      ? k_major_byte<T>(row, k)
                     : kPixelMajor ? kOperandBytes + pixel_major_byte(k, column, kDepth)
                                   : kOperandBytes + k_major_byte<T>(column, k);
    std::memcpy(shared_memory() + byte, &value, sizeof(T));
  }
  fence_async_proxy();
  block_sync();
}

template <class T, int kColumns, bool kPixelMajor>
void multiply(float (&d)[kColumns / 2], int step, bool accumulate) {
  const char* b = shared_memory() + kOperandBytes;
  // 32 bytes of K on: along the row, or (pixel-major, 16 rows of K) by two groups of 8 rows.
  const uint64_t a_descriptor = matrix_descriptor(shared_memory() + 32 * step, 0, 1024);
  const uint64_t b_descriptor =
      kPixelMajor ? matrix_descriptor(b + 2048 * step, 64 * 128, 1024) : matrix_descriptor(b + 32 * step, 0, 1024);
  wgmma<T, kColumns, kPixelMajor>(d, a_descriptor, b_descriptor, accumulate);
}

template <class T, int kColumns, bool kPixelMajor>
void check_wgmma() {
  in_every_mode([] {
    static float got[128][kColumns / 2];
    run(
        block_of(128, 2 * kOperandBytes),
        +[](float (*out)[kColumns / 2]) {
          fill_operands<T, kPixelMajor>(kColumns);
          float d[kColumns / 2];
          wgmma_fence();
          for (int step = 0; step < 4; ++step) multiply<T, kColumns, kPixelMajor>(d, step, step > 0);
          wgmma_commit();
          wgmma_wait<0>();
          fence_registers(d);
          std::copy_n(d, kColumns / 2, out[thread_index()]);
        },
        got);
    for (int thread = 0; thread < 128; ++thread)
      for (int i = 0; i < kColumns / 2; ++i) {
        // The documentation's table of D: four numbers to each 8 columns.
        const int row = thread / 32 * 16 + d_row(thread % 32, i % 4), column = i / 4 * 8 + d_column(thread % 32, i % 4);
        float sum = 0;
        for (int k = 0; k < 128 / int(sizeof(T)); ++k) sum += a_at(row, k) * b_at(k, column);
        CHECK_EQUAL(got[thread][i], sum);
      }
  });
}

TEST(wgmma_bfloat16_k_major) {
  check_wgmma<bfloat16_t, 32, false>();
  check_wgmma<bfloat16_t, 176, false>();
  check_wgmma<bfloat16_t, 256, false>();
}
TEST(wgmma_half_k_major) { check_wgmma<half_t, 96, false>(); }
TEST(wgmma_tf32_k_major) { check_wgmma<float, 64, false>(); }
TEST(wgmma_bfloat16_pixel_major) {
  check_wgmma<bfloat16_t, 64, true>();
  check_wgmma<bfloat16_t, 192, true>();
}
TEST(wgmma_half_pixel_major) { check_wgmma<half_t, 32, true>(); }

// Two groups: what the accumulators hold before each wait, and what becomes of an operand overwritten too early.
TEST(wgmma_happens_when_waited_for) {
  in_every_mode([] {
    static float got[3][128];
    run(
        block_of(128, 2 * kOperandBytes),
        +[](float (*out)[128]) {
          fill_operands<half_t, false>(16);
          float first[8], second[8];
          wgmma_fence();
          multiply<half_t, 16, false>(first, 0, false);
          wgmma_commit();
          multiply<half_t, 16, false>(second, 1, false);
          wgmma_commit();
          out[0][thread_index()] = first[0];
          wgmma_wait<1>();
          out[1][thread_index()] = first[0] + 0 * (std::isnan(second[0]) ? 0 : second[0]);
          block_sync();
          if (thread_index() == 0) std::memset(shared_memory(), host_cuda::kPoison, 64 * 128);
          fence_async_proxy();
          block_sync();
          wgmma_wait<0>();
          out[2][thread_index()] = second[0];
        },
        got);
    for (int thread = 0; thread < 128; ++thread) {
      CHECK_EQUAL(std::isnan(got[0][thread]), host_cuda::options().late);
      CHECK(!std::isnan(got[1][thread]));
      CHECK_EQUAL(std::isnan(got[2][thread]), host_cuda::options().late);
    }
  });
}

TEST(the_async_proxy_sees_fenced_writes_only) {
  in_every_mode([] {
    static float got[128];
    run(
        block_of(128, 2 * kOperandBytes),
        +[](float* out) {
          fill_operands<half_t, false>(16);
          if (thread_index() == 0) std::memset(shared_memory(), 0, 64 * 128);
          block_sync();
          float d[8];
          wgmma_fence();
          multiply<half_t, 16, false>(d, 0, false);
          wgmma_commit();
          wgmma_wait<0>();
          out[thread_index()] = d[0];
        },
        got);
    CHECK(std::any_of(got, got + 128, [](float value) { return value != 0; }));
    std::vector<half_t> y(64 * 8);
    run(
        block_of(32, 1024),
        +[](const TensorMap map) {
          if (thread_index()) return;
          std::memset(shared_memory(), 0, 1024);
          tensor_store_2d(&map, shared_memory(), 0, 0);
          tensor_store_commit();
          tensor_store_wait<0>();
        },
        map_2d(y.data(), 64, 8, 64, 8));
    CHECK(std::isnan(to_float(y[0])));
  });
}

TEST(wgmma_misuse_is_refused) {
  fails(
      "wgmma: no wgmma_fence", block_of(128, 2 * kOperandBytes),
      +[](int) {
        float d[8];
        wgmma_fence();
        for (int i = 0; i < 2; ++i) {
          multiply<half_t, 16, false>(d, 0, false);
          wgmma_commit();
          wgmma_wait<0>();
        }
      },
      0);
  fails(
      "the warp ends without waiting for its wgmma", block_of(128, 2 * kOperandBytes),
      +[](int) {
        float d[8];
        wgmma_fence();
        multiply<half_t, 16, false>(d, 0, false);
        wgmma_commit();
      },
      0);
  fails(
      "wgmma: no wgmma_fence", block_of(128, 2 * kOperandBytes),
      +[](int) {
        float d[8];
        multiply<half_t, 16, false>(d, 0, false);
      },
      0);
  fails(
      "wgmma: the warps of the warpgroup give different operands", block_of(128, 2 * kOperandBytes),
      +[](int) {
        float d[8];
        wgmma_fence();
        multiply<half_t, 16, false>(d, warp_index() == 2, false);
        wgmma_commit();
        wgmma_wait<0>();
      },
      0);
  fails(
      "wgmma: operand B begins inside a swizzle's 1024 bytes", block_of(128, 2 * kOperandBytes),
      +[](int) {
        float d[8];
        wgmma_fence();
        const uint64_t a = matrix_descriptor(shared_memory(), 0, 1024),
                       b = matrix_descriptor(shared_memory() + 128, 0, 1024);
        wgmma<half_t, 16, false>(d, a, b, false);
      },
      0);
  fails(
      "wgmma: operand A reaches byte", block_of(128, 4096),
      +[](int) {
        float d[8];
        wgmma_fence();
        multiply<half_t, 16, false>(d, 0, false);
      },
      0);
}

// Clusters.

TEST(clusters_read_each_others_shared_memory) {
  in_every_mode([] {
    float got[4][64];
    run(
        {4, 64, 256, 2, false},
        +[](float (*out)[64]) {
          float* shared = reinterpret_cast<float*>(shared_memory());
          shared[thread_index()] = float(100 * blockIdx.x + thread_index());
          cluster_sync();
          out[blockIdx.x][thread_index()] =
              load_cluster(shared + (thread_index() + 40) % 64, (cluster_rank() + 1) % cluster_size());
          cluster_arrive();
          cluster_wait();
        },
        got);
    for (int block = 0; block < 4; ++block)
      for (int i = 0; i < 64; ++i) CHECK_EQUAL(got[block][i], 100 * (block ^ 1) + (i + 40) % 64);
  });
}

TEST(cluster_barriers_arrive_remotely) {
  in_every_mode([] {
    float got[2] = {};
    run(
        {2, 32, 64, 2, false},
        +[](float* out) {
          Barrier* barrier = reinterpret_cast<Barrier*>(shared_memory());
          float* value = reinterpret_cast<float*>(shared_memory() + 16);
          if (thread_index() == 0) {
            barrier_init(barrier, 1);
            fence_barrier_init();
          }
          cluster_sync();
          if (thread_index() == 0) {
            *value = float(cluster_rank() + 5);
            barrier_arrive_cluster(barrier, cluster_rank() ^ 1);
            barrier_wait(barrier, 0);
            out[cluster_rank()] = load_cluster(value, cluster_rank() ^ 1);
          }
          cluster_sync();
        },
        got);
    CHECK_EQUAL(got[0], 6);
    CHECK_EQUAL(got[1], 5);
  });
}

TEST(blocks_of_a_cooperative_grid_meet) {
  for (const uint64_t seed : {0, 1, 2, 3}) {
    host_cuda::options() = {true, seed};
    float left[5] = {}, seen[5] = {};
    uint32_t arrived = 0;
    const auto kernel = +[](float* left, float* seen, uint32_t* arrived) {
      if (thread_index() == 40) left[blockIdx.x] = float(blockIdx.x + 1);
      block_sync();
      if (thread_index() == 0) grid_barrier(arrived, gridDim.x);
      block_sync();
      if (thread_index() == 50) seen[blockIdx.x] = left[(blockIdx.x + 1) % 5];
    };
    run({5, 64, 0, 1, false, true}, kernel, left, seen, &arrived);
    for (int block = 0; block < 5; ++block) CHECK_EQUAL(seen[block], float((block + 1) % 5 + 1));
    fails("the counter was not zero", {5, 64, 0, 1, false, true}, kernel, left, seen, &arrived);
    arrived = 0;
    fails("of blocks that do not all run at once", {5, 64, 0, 1, false}, kernel, left, seen, &arrived);
  }
  uint32_t arrived = 0;
  fails(
      "1 of 2 blocks came", {2, 32, 0, 1, false, true},
      +[](uint32_t* arrived) {
        if (blockIdx.x == 0 && thread_index() == 0) grid_barrier(arrived, 2);
      },
      &arrived);
  fails("no clusters in a cooperative grid", {2, 32, 0, 2, false, true}, +[](int) {}, 0);
}

TEST(cluster_misuse_is_refused) {
  host_cuda::options() = {true, 0};
  fails(
      "load_cluster: block 0 of the cluster has ended", {2, 32, 64, 2, false},
      +[](int) {
        if (cluster_rank() == 0) return;
        block_sync();
        load_cluster(reinterpret_cast<float*>(shared_memory()), 0);
      },
      0);
  fails("cluster_wait: without cluster_arrive", {2, 32, 64, 2, false}, +[](int) { cluster_wait(); }, 0);
  fails(
      "in cluster_wait, 32 threads came", {2, 64, 64, 2, false},
      +[](int) {
        if (cluster_rank() == 0 && warp_index() == 0) cluster_sync();
        if (cluster_rank() == 0 && warp_index() == 1) block_sync();
      },
      0);
}

// Launches.

TEST(launches_refuse_what_the_device_refuses) {
  const auto nothing = +[](int) {};
  fails("launch: a grid of 3 blocks of 32 threads in clusters of 2", {3, 32, 0, 2, false}, nothing, 0);
  fails("launch: a grid of 1 blocks of 1056 threads", block_of(1056), nothing, 0);
  fails("launch: 232449 bytes of shared memory", block_of(32, 232449), nothing, 0);
  run(block_of(32, 232448), nothing, 0);
  run(
      {4, 32, 0, 1, true},
      +[](int) {
        grid_dependency_wait();
        grid_dependency_launch();
        registers_decrease<40>();
      },
      0);
}

int run_tests(const std::vector<std::string>& names) {
  int failures = 0;
  for (const Test& test : tests()) {
    if (!names.empty() && std::find(names.begin(), names.end(), test.name) == names.end()) continue;
    host_cuda::options() = {};
    host_cuda::clear_global();
    std::string message = "ok";
    try {
      test.body();
    } catch (const std::string& failure) {
      message = host_cuda::format("FAILED (late %d, seed %llu): ", host_cuda::options().late,
                                  (unsigned long long)host_cuda::options().seed) +
                failure;
      ++failures;
    }
    std::printf("%s: %s\n", test.name, message.c_str());
  }
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> names(arguments + 1, arguments + count);
  if (names != std::vector<std::string>{"--list"}) return run_tests(names) != 0;
  for (const Test& test : tests()) std::printf("%s\n", test.name);
}
