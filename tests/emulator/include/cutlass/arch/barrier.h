// Stand-in for CUTLASS's header: barriers and fences.
#pragma once

#include "../../../instructions.h"

namespace cutlass::arch {

struct ClusterBarrier {
  static void init(const uint64_t* barrier, uint32_t arrivals) { emulator::init_mbarrier(barrier, arrivals); }
  static void wait(const uint64_t* barrier, uint32_t parity) { emulator::wait_mbarrier(barrier, parity); }
  static void arrive(const uint64_t* barrier) { emulator::arrive_mbarrier(barrier); }
  static void arrive(const uint64_t* barrier, uint32_t rank, uint32_t predicate) {
    if (predicate) emulator::arrive_mbarrier(barrier, int(rank));
  }
};

struct ClusterTransactionBarrier : ClusterBarrier {
  static void expect_transaction(const uint64_t* barrier, uint32_t bytes) {
    emulator::expect_bytes(barrier, int(bytes));
  }
  static void arrive_and_expect_tx(const uint64_t* barrier, uint32_t bytes) {
    emulator::expect_bytes(barrier, int(bytes));
    emulator::arrive_mbarrier(barrier);
  }
};

// CUTLASS keeps the first eight for itself.
struct NamedBarrier {
  static constexpr uint32_t kReserved = 8;

  static void sync(uint32_t threads, uint32_t id) { emulator::sync_named_barrier(kReserved + id, threads); }
  static void arrive(uint32_t threads, uint32_t id) { emulator::arrive_named_barrier(kReserved + id, threads); }
};

inline void fence_barrier_init() { emulator::fence_barrier_init(); }
inline void fence_view_async_shared() { emulator::fence_async(); }

}  // namespace cutlass::arch
