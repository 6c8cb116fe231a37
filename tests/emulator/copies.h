// The copy engine: tensor maps, loads that complete an mbarrier, stores and reductions in bulk groups.
#pragma once

#include <cuda.h>

#include <atomic>
#include <functional>

#include "memory_barriers.h"
#include "tensor_map.h"

namespace emulator {

// Calls visit(shared address, memory address or null) for each 16-bit element of a box.
template <class Visit>
void for_each_element(const TensorMap& map, uint32_t shared, const int32_t (&first)[kMapDims], Visit visit) {
  uint64_t count = 1;
  for (int dim = 0; dim < kMapDims; ++dim) count *= map.box[dim];
  bool any = false;
  for (uint64_t i = 0; i < count; ++i) {
    uint64_t rest = i;
    uint8_t* memory = reinterpret_cast<uint8_t*>(map.base);
    bool exists = true;
    for (int dim = 0; dim < kMapDims; ++dim) {
      const int64_t at = int64_t(first[dim]) + int64_t(rest % map.box[dim]);
      rest /= map.box[dim];
      exists &= 0 <= at && at < int64_t(map.sizes[dim]);
      memory += at * int64_t(dim == 0 ? kMapElementBytes : map.strides[dim - 1]);
    }
    const uint32_t linear = shared + uint32_t(i) * kMapElementBytes;
    visit(linear ^ ((linear >> 7 & (map.swizzle_bytes / 16 - 1)) << 4), exists ? memory : nullptr);
    any |= exists;
  }
  machine().check(any, "a box without an element in bounds: the engine would touch the map's base address");
}

inline const TensorMap& tensor_map(const void* map) {
  const TensorMap& decoded = *static_cast<const TensorMap*>(map);
  machine().check(decoded.mark == TensorMap::kMark, "a tensor map that was not made");
  return decoded;
}

inline int box_bytes(const TensorMap& map) {
  int bytes = kMapElementBytes;
  for (uint32_t extent : map.box) bytes *= int(extent);
  return bytes;
}

// Into the running CTA, or the same place of those ranks of its cluster whose bits are set: each has it when it comes.
inline void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims],
                     uint32_t ranks) {
  const TensorMap decoded = tensor_map(map);
  Cta* const cta = &machine().cta();
  const uint32_t address = machine().shared_address(shared), barrier_address = machine().shared_address(barrier);
  machine().check(address % 128 == 0, "a box must begin at a multiple of 128 bytes");
  machine().shared_pointer(address, box_bytes(decoded));
  std::array<int32_t, kMapDims> at;
  std::copy_n(first, kMapDims, at.begin());
  for (int rank = 0; ranks >> rank != 0; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    cta->loads.push_back([=] {
      Cta& there = machine().in_rank(*cta, rank);
      int32_t coordinates[kMapDims];
      std::copy_n(at.begin(), kMapDims, coordinates);
      for_each_element(decoded, address, coordinates, [&there](uint32_t to, const uint8_t* from) {
        uint8_t* const element = machine().shared_pointer(there, to, kMapElementBytes);
        if (from == nullptr) {
          memset(element, 0, kMapElementBytes);
        } else {
          memcpy(element, from, kMapElementBytes);
        }
      });
      complete_bytes(machine().shared_pointer(there, barrier_address, sizeof(MBarrier)), box_bytes(decoded));
    });
  }
}

inline void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims]) {
  load_box(map, barrier, shared, first, 1u << machine().cluster_rank());
}

inline void load_bytes(const void* memory, const void* barrier, void* shared, int bytes) {
  machine().check(bytes % kUnit == 0 && reinterpret_cast<uintptr_t>(memory) % kUnit == 0 &&
                      machine().shared_address(shared) % kUnit == 0,
                  "a bulk copy is aligned to 16 bytes");
  machine().shared_pointer(machine().shared_address(shared), bytes);
  machine().cta().loads.push_back([=] {
    memcpy(shared, memory, bytes);
    complete_bytes(barrier, bytes);
  });
}

// From shared memory to that of another CTA of the cluster.
inline void copy_to_rank(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  machine().check(bytes % kUnit == 0 && to % kUnit == 0 && from % kUnit == 0, "a bulk copy is aligned to 16 bytes");
  Cta* const cta = &machine().cta();
  const uint8_t* const here = machine().shared_pointer(from, bytes);
  cta->loads.push_back([=] {
    Cta& there = machine().in_rank(*cta, rank);
    machine().check_visible(*cta, from, bytes);
    memcpy(machine().shared_pointer(there, to, bytes), here, bytes);
    complete_bytes(machine().shared_pointer(there, barrier, sizeof(MBarrier)), bytes);
  });
}

inline void push_store(std::function<void()> read_shared, std::function<void()> write_global) {
  Thread* const thread = &machine().thread();
  machine().cta().stores.push_back(
      {thread, thread->store_groups, false, std::move(read_shared), std::move(write_global)});
}

inline void store_box(const void* map, const void* shared, const int32_t (&first)[kMapDims]) {
  const TensorMap decoded = tensor_map(map);
  Cta* const cta = &machine().cta();
  const uint32_t address = machine().shared_address(shared);
  machine().check(address % 128 == 0, "a box must begin at a multiple of 128 bytes");
  std::array<int32_t, kMapDims> at;
  std::copy_n(first, kMapDims, at.begin());
  auto read = std::make_shared<std::vector<std::pair<uint8_t*, uint16_t>>>();
  const auto read_shared = [=] {
    int32_t coordinates[kMapDims];
    std::copy_n(at.begin(), kMapDims, coordinates);
    for_each_element(decoded, address, coordinates, [cta, &read](uint32_t from, uint8_t* to) {
      if (to == nullptr) return;
      machine().check_visible(*cta, from, kMapElementBytes);
      uint16_t bits;
      memcpy(&bits, machine().shared_pointer(*cta, from, kMapElementBytes), kMapElementBytes);
      read->emplace_back(to, bits);
    });
  };
  push_store(read_shared, [read] {
    for (const auto& [to, bits] : *read) memcpy(to, &bits, kMapElementBytes);
  });
}

// Floats of shared memory, each brought to its place in memory by `put`.
template <class Put>
void push_floats(float* memory, const float* shared, int bytes, Put put) {
  machine().check(bytes % kUnit == 0 && reinterpret_cast<uintptr_t>(memory) % kUnit == 0 &&
                      machine().shared_address(shared) % kUnit == 0,
                  "a bulk store or reduction is aligned to 16 bytes");
  auto read = std::make_shared<std::vector<float>>();
  const auto read_shared = [=] { read->assign(shared, shared + bytes / 4); };
  push_store(read_shared, [=] {
    for (size_t i = 0; i < read->size(); ++i) put(memory[i], (*read)[i]);
  });
}

inline void reduce_add(float* memory, const float* shared, int bytes) {
  push_floats(memory, shared, bytes, [](float& sum, float value) { sum += value; });
}

inline void store(float* memory, const float* shared, int bytes) {
  push_floats(memory, shared, bytes, [](float& place, float value) { place = value; });
}

inline void commit_stores() { ++machine().thread().store_groups; }

enum class StoreStage { kRead, kDone };  // of shared memory; in memory

// Until all but the thread's last `pending` groups have come to that stage.
inline void wait_stores(int pending, StoreStage stage) {
  Thread* const thread = &machine().thread();
  const int last = thread->store_groups - pending;
  machine().wait("its stores", [thread, last, stage] {
    const auto& stores = thread->cta->stores;
    return std::none_of(stores.begin(), stores.end(), [&](const Store& store) {
      return store.thread == thread && store.group < last && !(stage == StoreStage::kRead && store.read);
    });
  });
}

}  // namespace emulator
