// What a launch is made of: threads that are fibers, CTAs with their shared memory and barriers, and what was asked of
// the asynchronous units.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr int kWarpgroupLanes = 128;
constexpr int kStackBytes = 96 * 1024;
constexpr int kNamedBarriers = 16;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr uint32_t kSharedWindow = 1024;  // shared addresses begin here: the driver keeps 1 KiB for itself
constexpr int kUnit = 16;                 // bytes; what the proxy check tells apart

enum class Collective { kShuffle, kShuffleUp, kShuffleXor, kBallot, kSync, kStoreMatrices, kLoadMatrices, kGather };

struct Cta;

struct Thread {
  Cta* cta;
  int index;
  bool started = false, ended = false, polls = false;
  bool meets_cluster = false;
  std::function<bool()> wakes;  // empty: ready
  const char* waits_for = "";
  const void* waits_at = nullptr;  // in shared memory
  ucontext_t entry;
  jmp_buf resume_point;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};

  // What it brings to a collective of its warp, and takes away.
  bool meets = false;
  Collective collective;
  uint32_t value, argument, result;
  uint32_t words[4];

  size_t products = 0;                 // issued
  std::vector<size_t> product_groups;  // how many products had been issued when each group was committed
  int store_groups = 0;                // committed
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

// One wgmma of a warpgroup. It may be computed once all threads have issued it.
struct Product {
  int issued = 0;
  uint64_t a = 0, b = 0;                          // matrix descriptors
  const uint32_t* a_words[kWarpgroupLanes] = {};  // or, if not null, fragments
  float* d[kWarpgroupLanes] = {};
  std::function<void(Cta&, Product&)> compute;
};

// A store or reduction of the copy engine. Groups are those of the thread that issued it.
struct Store {
  Thread* thread;
  int group;
  bool read = false;
  std::function<void()> read_shared, write_global;
};

struct Cta {
  unsigned index;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  std::vector<uint8_t> storage;
  std::vector<int> written_by;  // unit -> 1 + the thread whose ordinary stores the asynchronous proxy may not see yet
  std::vector<Thread> threads;
  NamedBarrier named[kNamedBarriers];
  std::vector<std::deque<Product>> products;  // of each warpgroup
  std::vector<size_t> products_done;
  std::vector<std::function<void()>> loads;
  std::vector<Store> stores;
  int free_registers = 0;
  std::vector<int> registers;  // of each warp's threads

  bool ended() const {
    return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.ended; });
  }
};

}  // namespace emulator
