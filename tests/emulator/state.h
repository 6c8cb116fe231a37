// What a launch is made of: threads that are fibers, CTAs with their shared memory and barriers, and what was asked of
// the asynchronous units.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "accesses.h"
#include "clocks.h"
#include "instructions.h"

namespace emulator {

constexpr int kWarpLanes = 32;
constexpr int kWarpgroupLanes = 128;
constexpr int kStackBytes = 96 * 1024;
constexpr int kNamedBarriers = 16;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr uint32_t kSharedWindow = 1024;  // shared addresses begin here: the driver keeps 1 KiB for itself
constexpr int kMaxMBarriers = 64;         // of a CTA
constexpr int kMaxStorers = 8;            // threads of a CTA that ask for stores

struct Cta;

// What an mbarrier passes on from those who arrive to those who wait. What the copy engine wrote is known to whoever
// knows of the phase that the copy completed: `party` counts phases.
struct MBarrierOrder {
  uint32_t party = 0;
  Time phases = 0;           // complete
  Clock arrived, completed;  // in the phase under way; before
  Place initialised;
};

// Registers of a thread that products hold, which it has not waited for: accumulators, or a fragment that they read.
struct HeldRegisters {
  const void* begin;
  size_t bytes;
  bool accumulators;
  size_t last;  // of the products
};

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

  uint32_t party = 0;
  Clock knows;
  Clock fenced;                                   // what it knew at its last fence of memory
  Clock seen;                                     // by atomic operations since then
  bool acquires = false;                          // and has not fenced since then: the asynchronous proxy may be ahead
  std::vector<Place*> unfenced;                   // written, and not shown to the asynchronous proxy yet
  std::vector<MBarrierOrder*> unfenced_barriers;  // initialised, likewise

  size_t products = 0;  // issued
  std::vector<HeldRegisters> held;
  std::vector<size_t> product_groups;  // how many products had been issued when each group was committed
  int store_groups = 0;                // committed
  int storer = -1;                     // its number among those of its CTA that ask for stores
};

struct NamedBarrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  Clock gathered, completed;  // of the meeting under way; of the last one
};

// One wgmma of a warpgroup. It may be computed once all threads have issued it.
struct Product {
  int issued = 0;
  const uint32_t* a_words[kWarpgroupLanes] = {};  // or, if not null, fragments
  float* d[kWarpgroupLanes] = {};
  Multiplication what;
  Time number;
  Clock knows;  // what all of its warps knew
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
  std::vector<Place> places;                    // of shared memory
  std::map<uint32_t, MBarrierOrder> mbarriers;  // by address
  int num_storers = 0;
  int slot;                  // of those CTAs that fit on the machine
  uint32_t first_party = 0;  // parties: its threads, its warpgroups' products, mbarriers, stores
  Time origin;               // times of a slot's CTAs follow each other
  std::vector<Thread> threads;
  NamedBarrier named[kNamedBarriers];
  std::vector<std::deque<Product>> products;  // of each warpgroup
  std::vector<size_t> products_done;
  std::vector<std::function<void()>> loads;
  std::vector<Store> stores;
  int free_registers = 0;
  std::vector<int> registers;  // of each warp's threads

  uint32_t products_party(size_t warpgroup) const { return first_party + uint32_t(threads.size() + warpgroup); }
  uint32_t mbarrier_party(size_t number) const { return products_party(products.size() + number); }
  // A storer's stores, as far as they have read shared memory, or as they are done.
  uint32_t reads_party(int storer) const { return mbarrier_party(kMaxMBarriers) + 2 * uint32_t(storer); }
  uint32_t writes_party(int storer) const { return reads_party(storer) + 1; }
  uint32_t end_party() const { return reads_party(kMaxStorers); }

  uint32_t shared_address(const void* pointer) const {
    return uint32_t(static_cast<const uint8_t*>(pointer) - shared) + kSharedWindow;
  }

  bool ended() const {
    return std::all_of(threads.begin(), threads.end(), [](const Thread& thread) { return thread.ended; });
  }
};

// Calls visit(place) for each place of shared memory from `address` on.
template <class Visit>
void for_each_place(Cta& cta, uint32_t address, int bytes, Visit visit) {
  const uint32_t offset = address - kSharedWindow;
  for (uint32_t i = offset / kPlaceBytes; i <= (offset + bytes - 1) / kPlaceBytes; ++i) visit(cta.places[i]);
}

}  // namespace emulator
