// Stand-in for CUTLASS's header: copies of the TMA unit.
#pragma once

#include "../../../instructions.h"

namespace cute {

namespace TMA {
enum class CacheHintSm90 : uint64_t { EVICT_NORMAL, EVICT_FIRST, EVICT_LAST };
}

struct SM90_TMA_LOAD_5D {
  static void copy(const void* map, uint64_t* barrier, uint64_t, void* shared, int32_t c0, int32_t c1, int32_t c2,
                   int32_t c3, int32_t c4) {
    emulator::load_box(map, barrier, shared, {c0, c1, c2, c3, c4});
  }
};

struct SM90_TMA_LOAD_MULTICAST_5D {
  static void copy(const void* map, uint64_t* barrier, uint16_t ranks, uint64_t, void* shared, int32_t c0, int32_t c1,
                   int32_t c2, int32_t c3, int32_t c4) {
    emulator::load_box(map, barrier, shared, {c0, c1, c2, c3, c4}, ranks);
  }
};

struct SM90_BULK_COPY_G2S {
  static void copy(const void* memory, uint64_t* barrier, void* shared, int32_t bytes) {
    emulator::load_bytes(memory, barrier, shared, bytes);
  }
};

struct SM90_BULK_COPY_S2G {
  static void copy(const void* shared, void* memory, int32_t bytes) {
    emulator::store_bulk(static_cast<float*>(memory), shared, bytes);
  }
};

struct SM90_TMA_STORE_5D {
  static void copy(const void* map, const void* shared, int32_t c0, int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
    emulator::store_box(map, shared, {c0, c1, c2, c3, c4});
  }
};

inline void tma_store_arrive() { emulator::commit_stores(); }

template <int kPending>
void tma_store_wait() {
  emulator::wait_stores(kPending, emulator::StoreStage::kRead);
}

}  // namespace cute
