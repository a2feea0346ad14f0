// The emulated machine: clusters of blocks, whose threads are fibers of one OS thread, how they wait for one another,
// and what counts as a failure. A thread runs until it must wait; the seed decides which one runs next.
//
// Not modelled: clocks, caches, bank conflicts; that the operations which a warp does together order memory only where
// the PTX documentation says so (here all do); loops that poll memory (here they never end).
#pragma once

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace host_cuda {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
// Shared addresses begin here, so that 0 is none: at a multiple of the 1024 bytes after which the swizzle repeats.
constexpr uint32_t kSharedBase = 1024;
// Bytes on either side of a block's shared memory that must keep their value.
constexpr int kGuardBytes = 1024;
constexpr char kGuard = char(0xa5);
// Every half, bfloat16 and float made of this byte is NaN.
constexpr char kPoison = char(0xff);

struct Options {
  bool late = true;   // asynchronous operations happen as late as is allowed; else when they are issued
  uint64_t seed = 0;  // 0: threads run in turn; else in an order that the seed decides
};

inline Options& options() {
  static Options instance;
  return instance;
}

inline std::string& error_message() {
  static std::string message;
  return message;
}

// Why the last launch or host call failed.
inline const std::string& last_error() { return error_message(); }

inline std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

// The global memory that atoms may touch. While nothing is registered they may touch all of it.
inline std::vector<std::pair<const char*, size_t>>& global_ranges() {
  static std::vector<std::pair<const char*, size_t>> ranges;
  return ranges;
}
inline void register_global(const void* base, size_t bytes) {
  global_ranges().emplace_back(static_cast<const char*>(base), bytes);
}
inline void clear_global() { global_ranges().clear(); }

struct Fiber;
struct Block;

struct Event {
  std::vector<Fiber*> waiters;
};

// Asynchronous operations, committed in groups and waited for by age.
class AsyncGroups {
 public:
  void issue(std::function<void()> operation) {
    if (!options().late) operation();
    open_.push_back(options().late ? std::move(operation) : nullptr);
  }
  void commit() {
    committed_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(size_t pending) {
    for (; committed_.size() > pending; committed_.pop_front())
      for (auto& operation : committed_.front())
        if (operation) operation();
  }
  bool unfinished() const {
    for (auto& group : committed_)
      if (!group.empty()) return true;
    return !open_.empty();
  }

 private:
  std::vector<std::function<void()>> open_;
  std::deque<std::vector<std::function<void()>>> committed_;
};

// Where the lanes of a warp meet: the last to come does the operation for all.
struct Rendezvous {
  const char* name = nullptr;
  int arrived = 0;
  void* lanes[kWarp];
  Event event;
};

// The registers that unfinished wgmma add to. The threads see NaN in them until the last has been waited for.
struct Accumulators {
  std::vector<float> values;
  int unfinished = 0;
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  int running = kWarp;
  uint64_t priority = 0;
  std::vector<Fiber*> ready;
  Rendezvous rendezvous;
  AsyncGroups matmuls;
  std::map<float*, Accumulators> accumulators;  // by lane 0's registers
  bool matmul_fenced = false;
  size_t matmuls_issued = 0;
};

struct Fiber {
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  Context context;
  char* stack = nullptr;
  bool ended = false;
  const char* waits_in = nullptr;
  std::function<std::string()> waits_for;
  AsyncGroups copies, stores;
  bool cluster_arrived = false;
  uint64_t cluster_phase = 0;

  int lane() const { return thread % kWarp; }
};

struct NamedBarrier {
  int expected = 0;
  int arrived = 0;
  uint64_t phase = 0;
  Event event;
};

// What an mbarrier's 64 bits mean; they themselves only hold kInitialised.
struct BarrierState {
  static constexpr uint64_t kInitialised = 0x6d62617272696572;
  int expected = 0;   // arrivals of a phase
  int missing = 0;    // arrivals that this phase still waits for
  int64_t bytes = 0;  // that it still waits for
  uint64_t phase = 0;
  Event event;
};

struct Block {
  int64_t index = 0;
  int rank = 0;  // in its cluster
  int running = 0;
  char* shared = nullptr;
  int shared_bytes = 0;
  // What TMA and wgmma read: shared memory without the writes of threads since the last fence_async_proxy.
  std::vector<char> async_view;
  NamedBarrier named[16];
  std::map<const void*, BarrierState> barriers;
  // Descriptors of each wgmma of each warpgroup, in order: its four warps must give the same.
  std::vector<std::vector<std::array<uint64_t, 3>>> matmuls;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
};

struct ClusterBarrier {
  int arrived = 0;
  uint64_t phase = 0;
  Event event;
};

// A TMA load under way.
struct Load {
  Block* block;
  std::function<void()> perform;
};

struct Shape {
  int64_t grid;
  int threads, shared_bytes, cluster;
  bool cooperative = false;

  // Blocks that run at the same time.
  int64_t together() const { return cooperative ? grid : cluster; }
};

class Machine {
 public:
  Machine(const Shape& shape, std::function<void()> kernel) : shape(shape), kernel_(std::move(kernel)) {}
  ~Machine();

  // Runs the grid. Returns what went wrong, nothing if all went well.
  std::string run();

  void wait(Event& event, const char* name, std::function<std::string()> detail = nullptr);
  void notify(Event& event);
  [[noreturn]] void fail(const std::string& message);
  void issue(Load load);
  void complete_cluster_phase();
  uint64_t random();

  const Shape shape;
  Fiber* current = nullptr;
  std::vector<Block> blocks;  // of the cluster, or the cooperative grid, that runs
  ClusterBarrier cluster_barrier;
  Event grid_event;

 private:
  static void run_fiber();
  void set_up(Block& block, int64_t index, int rank);
  void tear_down();
  void end(Fiber& fiber);
  void schedule();
  Fiber* next();
  Warp* choose_warp();
  void resume(Fiber& fiber);
  void report_deadlock();
  bool complete_a_load();

  std::function<void()> kernel_;
  std::vector<Warp*> warps_;
  size_t warp_ = 0;
  std::vector<Load> loads_;
  Context scheduler_;
  std::string error_;
  uint64_t random_ = 0;
};

inline Machine*& running_machine() {
  static Machine* machine = nullptr;
  return machine;
}

// The machine whose kernel calls.
inline Machine& machine() {
  if (!running_machine()) {
    std::fputs("host_cuda: a device function was called outside a launch\n", stderr);
    std::abort();
  }
  return *running_machine();
}
inline Fiber& current() { return *machine().current; }
[[noreturn]] inline void fail(const std::string& message) { machine().fail(message); }

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Builtins {
  Index thread, block, block_size{1, 1, 1}, grid_size{1, 1, 1};
};
inline Builtins builtins;

inline Machine::~Machine() { tear_down(); }

inline uint64_t Machine::random() {
  random_ += 0x9e3779b97f4a7c15u;
  uint64_t mixed = (random_ ^ (random_ >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  return mixed ^ (mixed >> 31);
}

inline std::string Machine::run() {
  random_ = options().seed;
  const int64_t together = shape.together(), clusters = shape.grid / together;
  for (int64_t i = 0; i < clusters && error_.empty(); ++i) {
    const int64_t cluster = options().seed % 2 ? clusters - 1 - i : i;
    blocks = std::vector<Block>(together);
    for (int rank = 0; rank < together; ++rank) set_up(blocks[rank], cluster * together + rank, rank);
    schedule();
    tear_down();
  }
  return error_;
}

inline void Machine::set_up(Block& block, int64_t index, int rank) {
  block.index = index;
  block.rank = rank;
  block.running = shape.threads;
  block.shared_bytes = shape.shared_bytes;
  const size_t bytes = (size_t(shape.shared_bytes) + 2 * kGuardBytes + 1023) / 1024 * 1024;
  char* memory = static_cast<char*>(std::aligned_alloc(1024, bytes));
  std::memset(memory, kGuard, bytes);
  block.shared = memory + kGuardBytes;
  std::memset(block.shared, kPoison, shape.shared_bytes);
  block.async_view.assign(shape.shared_bytes, kPoison);
  block.warps = std::vector<Warp>(shape.threads / kWarp);
  block.matmuls.resize((shape.threads + kWarpgroup - 1) / kWarpgroup);
  block.fibers = std::vector<Fiber>(shape.threads);
  for (int i = 0; i < shape.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.warp = &block.warps[i / kWarp];
    fiber.thread = i;
    fiber.stack = Stack::take();
    make_context(&fiber.context, fiber.stack, run_fiber);
    fiber.warp->ready.push_back(&fiber);
  }
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.block = &block;
    warp.index = int(i);
    warp.priority = random();
    warps_.push_back(&warp);
  }
}

inline void Machine::tear_down() {
  for (Block& block : blocks) {
    for (Fiber& fiber : block.fibers) Stack::give_back(fiber.stack);
    const char* end = block.shared + block.shared_bytes;
    for (int i = 0; i < kGuardBytes && error_.empty(); ++i)
      if (block.shared[-1 - i] != kGuard || end[i] != kGuard)
        error_ = format("block %lld: shared memory was written outside its %d bytes", (long long)block.index,
                        block.shared_bytes);
    std::free(block.shared - kGuardBytes);
  }
  blocks.clear();
  cluster_barrier = {};
  loads_.clear();
  warps_.clear();
  warp_ = 0;
}

inline void Machine::run_fiber() {
  Machine& self = machine();
  self.kernel_();
  self.end(*self.current);
  switch_context(&self.current->context, &self.scheduler_);
  std::abort();
}

inline void Machine::end(Fiber& fiber) {
  if (fiber.stores.unfinished()) fail("the thread ends without waiting for its tensor_store");
  fiber.ended = true;
  --fiber.block->running;
  if (--fiber.warp->running == 0 && fiber.warp->matmuls.unfinished())
    fail("the warp ends without waiting for its wgmma");
  complete_cluster_phase();
}

// Threads that have ended count as arrived.
inline void Machine::complete_cluster_phase() {
  int running = 0;
  for (const Block& block : blocks) running += block.running;
  if (cluster_barrier.arrived == 0 || cluster_barrier.arrived < running) return;
  cluster_barrier.arrived = 0;
  ++cluster_barrier.phase;
  notify(cluster_barrier.event);
}

inline void Machine::issue(Load load) {
  if (options().late)
    loads_.push_back(std::move(load));
  else
    load.perform();
}

inline bool Machine::complete_a_load() {
  if (loads_.empty()) return false;
  const auto chosen = loads_.begin() + (options().seed ? random() % loads_.size() : 0);
  const Load load = std::move(*chosen);
  loads_.erase(chosen);
  if (load.block->running)
    load.perform();
  else
    error_ = format("block %lld ended with a tensor_load under way", (long long)load.block->index);
  return true;
}

inline void Machine::schedule() {
  while (error_.empty()) {
    if (Fiber* fiber = next())
      resume(*fiber);
    else if (!complete_a_load())
      break;
  }
  for (const Block& block : blocks)
    if (block.running && error_.empty()) report_deadlock();
}

// Stays with a warp while one of its lanes can go on.
inline Fiber* Machine::next() {
  if (warps_[warp_]->ready.empty() && !choose_warp()) return nullptr;
  std::vector<Fiber*>& ready = warps_[warp_]->ready;
  const size_t chosen = options().seed ? random() % ready.size() : 0;
  Fiber* fiber = ready[chosen];
  ready.erase(ready.begin() + chosen);
  return fiber;
}

// In turn, or (with a seed) by priorities that now and then change, so that some warps run far ahead of others.
inline Warp* Machine::choose_warp() {
  const size_t count = warps_.size(), last = warp_;
  Warp* best = nullptr;
  for (size_t i = 1; i <= count; ++i) {
    Warp* warp = warps_[(last + i) % count];
    if (warp->ready.empty() || (best && (!options().seed || warp->priority <= best->priority))) continue;
    best = warp;
    warp_ = (last + i) % count;
  }
  if (best && random() % 32 == 0) best->priority = random();
  return best;
}

inline void Machine::resume(Fiber& fiber) {
  current = &fiber;
  builtins.thread.x = unsigned(fiber.thread);
  builtins.block.x = unsigned(fiber.block->index);
  builtins.block_size.x = unsigned(shape.threads);
  builtins.grid_size.x = unsigned(shape.grid);
  switch_context(&scheduler_, &fiber.context);
}

inline void Machine::wait(Event& event, const char* name, std::function<std::string()> detail) {
  Fiber& self = *current;
  self.waits_in = name;
  self.waits_for = std::move(detail);
  event.waiters.push_back(&self);
  switch_context(&self.context, &scheduler_);
  self.waits_in = nullptr;
}

inline void Machine::notify(Event& event) {
  for (Fiber* fiber : event.waiters) fiber->warp->ready.push_back(fiber);
  event.waiters.clear();
}

// The fiber that fails is never resumed.
inline void Machine::fail(const std::string& message) {
  error_ = format("block %lld, thread %d: ", (long long)current->block->index, current->thread) + message;
  switch_context(&current->context, &scheduler_);
  std::abort();
}

// One line for each run of threads that wait in the same place.
inline void Machine::report_deadlock() {
  error_ = "deadlock";
  for (const Block& block : blocks) {
    std::string last;
    for (int i = 0, first = 0; i <= shape.threads; ++i) {
      std::string now;
      if (i < shape.threads) {
        const Fiber& fiber = block.fibers[i];
        now = fiber.ended ? "ended" : std::string("in ") + fiber.waits_in;
        if (!fiber.ended && fiber.waits_for) now += ", " + fiber.waits_for();
      }
      if (i && now != last) {
        error_ += format("\n  block %lld, threads %d to %d: ", (long long)block.index, first, i - 1) + last;
        first = i;
      }
      last = now;
    }
  }
}

// Fails unless [pointer, pointer + bytes) lies in the block's shared memory, aligned.
inline void check_shared(const Block& block, const void* pointer, int64_t bytes, int alignment, const char* what) {
  const int64_t offset = static_cast<const char*>(pointer) - block.shared;
  if (offset < 0 || offset + bytes > block.shared_bytes)
    fail(format("%s: bytes %lld to %lld of a shared memory of %d", what, (long long)offset, (long long)(offset + bytes),
                block.shared_bytes));
  if (offset % alignment)
    fail(format("%s: shared address %lld is not a multiple of %d", what, (long long)offset, alignment));
}

inline bool in_global(const void* pointer, int64_t bytes) {
  const char* begin = static_cast<const char*>(pointer);
  for (auto& [base, size] : global_ranges())
    if (begin >= base && begin + bytes <= base + size) return true;
  return global_ranges().empty();
}

inline void check_global(const void* pointer, int64_t bytes, int alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment)
    fail(format("%s: global address %p is not a multiple of %d", what, pointer, alignment));
  if (bytes && !in_global(pointer, bytes))
    fail(format("%s: %lld bytes at %p lie outside the registered global memory", what, (long long)bytes, pointer));
}

// `lane` holds this lane's operands; perform(lanes) is called once, with those of the whole warp.
template <class Lane, class Perform>
void warp_collective(const char* name, Lane& lane, Perform perform) {
  Fiber& self = current();
  Rendezvous& meeting = self.warp->rendezvous;
  if (meeting.arrived == 0) meeting.name = name;
  if (meeting.name != name && std::strcmp(meeting.name, name))
    fail(format("lane %d comes to %s while lanes of its warp wait in %s", self.lane(), name, meeting.name));
  meeting.lanes[self.lane()] = &lane;
  if (++meeting.arrived < kWarp) {
    machine().wait(meeting.event, name, [&meeting] { return format("%d of 32 lanes came", meeting.arrived); });
    return;
  }
  Lane* lanes[kWarp];
  for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<Lane*>(meeting.lanes[i]);
  perform(lanes);
  meeting.arrived = 0;
  machine().notify(meeting.event);
}

}  // namespace host_cuda
