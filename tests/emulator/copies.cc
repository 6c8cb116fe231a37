// The copy engine: tensor maps, loads that complete an mbarrier, stores and reductions in bulk groups.
#include <cuda.h>

#include <functional>

#include "layouts.h"
#include "machine.h"
#include "mbarrier.h"
#include "tensor_map.h"

namespace emulator {

namespace {

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
    visit(swizzled(linear, int(map.swizzle_bytes)), exists ? memory : nullptr);
    any |= exists;
  }
  machine().check(any, "a box without an element in bounds: the engine would touch the map's base address");
}

const TensorMap& tensor_map(const void* map) {
  const TensorMap& decoded = *static_cast<const TensorMap*>(map);
  machine().check(decoded.mark == TensorMap::kMark, "a tensor map that was not made");
  return decoded;
}

int box_bytes(const TensorMap& map) {
  int bytes = kMapElementBytes;
  for (uint32_t extent : map.box) bytes *= int(extent);
  return bytes;
}

// A thread as it was when it asked for a copy.
struct Asker {
  Visitor visitor() const { return {party, time, knows, Proxy::kAsynchronous}; }

  uint32_t party;
  Time time;
  Clock knows;
};

Asker ask() {
  Thread& thread = machine().thread();
  const Asker asker = {thread.party, thread.knows[thread.party], thread.knows};
  machine().order().tick(thread);
  return asker;
}

}  // namespace

void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims], uint32_t ranks) {
  const TensorMap decoded = tensor_map(map);
  Cta* const cta = &machine().cta();
  const uint32_t address = machine().shared_address(shared), barrier_address = machine().shared_address(barrier);
  machine().check(address % 128 == 0, "a box must begin at a multiple of 128 bytes");
  machine().shared_pointer(address, box_bytes(decoded));
  std::array<int32_t, kMapDims> at;
  std::copy_n(first, kMapDims, at.begin());
  const Asker asker = ask();
  for (int rank = 0; ranks >> rank != 0; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    cta->loads.push_back([=] {
      Cta& there = machine().in_rank(*cta, rank);
      int32_t coordinates[kMapDims];
      std::copy_n(at.begin(), kMapDims, coordinates);
      MBarrierUse done(there, barrier_address, asker.visitor());
      const Visitor copier = done.copier(asker.knows);
      for_each_element(decoded, address, coordinates, [&](uint32_t to, const uint8_t* from) {
        uint8_t* const element = machine().shared_pointer(there, to, kMapElementBytes);
        if (to % kUnit == 0) machine().order().visit_shared(copier, there, to, kUnit, Access::kWrite);
        if (from == nullptr) {
          memset(element, 0, kMapElementBytes);
        } else {
          memcpy(element, from, kMapElementBytes);
        }
      });
      done.complete_bytes(box_bytes(decoded));
    });
  }
}

void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims]) {
  load_box(map, barrier, shared, first, 1u << machine().cluster_rank());
}

void load_bytes(const void* memory, const void* barrier, void* shared, int bytes) {
  const uint32_t to = machine().shared_address(shared), barrier_address = machine().shared_address(barrier);
  machine().check(bytes % kUnit == 0 && reinterpret_cast<uintptr_t>(memory) % kUnit == 0 && to % kUnit == 0,
                  "a bulk copy is aligned to 16 bytes");
  machine().shared_pointer(to, bytes);
  Cta* const cta = &machine().cta();
  const Asker asker = ask();
  cta->loads.push_back([=] {
    MBarrierUse done(*cta, barrier_address, asker.visitor());
    machine().order().visit_shared(done.copier(asker.knows), *cta, to, bytes, Access::kWrite);
    memcpy(shared, memory, bytes);
    done.complete_bytes(bytes);
  });
}

void copy_to_rank(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  machine().check(bytes % kUnit == 0 && to % kUnit == 0 && from % kUnit == 0, "a bulk copy is aligned to 16 bytes");
  Cta* const cta = &machine().cta();
  const uint8_t* const here = machine().shared_pointer(from, bytes);
  const Asker asker = ask();
  cta->loads.push_back([=] {
    Cta& there = machine().in_rank(*cta, rank);
    MBarrierUse done(there, barrier, asker.visitor());
    const Visitor copier = done.copier(asker.knows);
    machine().order().visit_shared(copier, *cta, from, bytes, Access::kRead);
    machine().order().visit_shared(copier, there, to, bytes, Access::kWrite);
    memcpy(machine().shared_pointer(there, to, bytes), here, bytes);
    done.complete_bytes(bytes);
  });
}

namespace {

// Who reads shared memory for a store, or who writes memory, of the thread's group under way.
void push_store(std::function<void(const Visitor&)> read_shared, std::function<void(const Visitor&)> write_global) {
  Thread* const thread = &machine().thread();
  Cta* const cta = thread->cta;
  machine().check(!thread->acquires, "asynchronous access to memory behind an acquire, without a fence of proxies");
  if (thread->storer < 0) thread->storer = cta->num_storers++;
  machine().check(thread->storer < kMaxStorers, "more threads ask for stores than the emulator counts");
  const Time time = cta->origin + Time(thread->store_groups) + 1;
  const Clock knows = thread->knows;
  machine().order().tick(*thread);
  const uint32_t reads = cta->reads_party(thread->storer), writes = cta->writes_party(thread->storer);
  cta->stores.push_back({thread, thread->store_groups, false,
                         [=] { read_shared({reads, time, knows, Proxy::kAsynchronous}); },
                         [=] { write_global({writes, time, knows, Proxy::kAsynchronous}); }});
}

}  // namespace

void store_box(const void* map, const void* shared, const int32_t (&first)[kMapDims]) {
  const TensorMap decoded = tensor_map(map);
  Cta* const cta = &machine().cta();
  const uint32_t address = machine().shared_address(shared);
  machine().check(address % 128 == 0, "a box must begin at a multiple of 128 bytes");
  std::array<int32_t, kMapDims> at;
  std::copy_n(first, kMapDims, at.begin());
  auto read = std::make_shared<std::vector<std::pair<uint8_t*, uint16_t>>>();
  const auto read_shared = [=](const Visitor& visitor) {
    int32_t coordinates[kMapDims];
    std::copy_n(at.begin(), kMapDims, coordinates);
    for_each_element(decoded, address, coordinates, [&](uint32_t from, uint8_t* to) {
      if (to == nullptr) return;
      if (from % kUnit == 0) machine().order().visit_shared(visitor, *cta, from, kUnit, Access::kRead);
      uint16_t bits;
      memcpy(&bits, machine().shared_pointer(*cta, from, kMapElementBytes), kMapElementBytes);
      read->emplace_back(to, bits);
    });
  };
  push_store(read_shared, [read](const Visitor& visitor) {
    for (const auto& [to, bits] : *read) {
      machine().order().visit_memory(visitor, to, kMapElementBytes, Access::kWrite);
      memcpy(to, &bits, kMapElementBytes);
    }
  });
}

namespace {

// Floats of shared memory, each brought to its place in memory by `put`.
template <class Put>
void push_floats(float* memory, const void* shared, int bytes, Access access, Put put) {
  const uint32_t from = machine().shared_address(shared);
  machine().check(bytes % kUnit == 0 && reinterpret_cast<uintptr_t>(memory) % kUnit == 0 && from % kUnit == 0,
                  "a bulk store or reduction is aligned to 16 bytes");
  const float* const floats = reinterpret_cast<const float*>(machine().shared_pointer(from, bytes));
  auto read = std::make_shared<std::vector<float>>();
  Cta* const cta = &machine().cta();
  const auto read_shared = [=](const Visitor& visitor) {
    machine().order().visit_shared(visitor, *cta, from, bytes, Access::kRead);
    read->assign(floats, floats + bytes / 4);
  };
  push_store(read_shared, [=](const Visitor& visitor) {
    machine().order().visit_memory(visitor, memory, bytes, access);
    for (size_t i = 0; i < read->size(); ++i) put(memory[i], (*read)[i]);
  });
}

}  // namespace

void reduce_add_bulk(float* memory, const void* shared, int bytes) {
  push_floats(memory, shared, bytes, Access::kAdd, [](float& sum, float value) { sum += value; });
}

void store_bulk(float* memory, const void* shared, int bytes) {
  push_floats(memory, shared, bytes, Access::kWrite, [](float& place, float value) { place = value; });
}

void commit_stores() { ++machine().thread().store_groups; }

void wait_stores(int pending, StoreStage stage) {
  Thread* const thread = &machine().thread();
  const int last = thread->store_groups - pending;
  machine().wait("its stores", [thread, last, stage] {
    const auto& stores = thread->cta->stores;
    return std::none_of(stores.begin(), stores.end(), [&](const Store& store) {
      return store.thread == thread && store.group < last && !(stage == StoreStage::kRead && store.read);
    });
  });
  if (last <= 0 || thread->storer < 0) return;
  const Cta& cta = *thread->cta;
  thread->knows.advance(cta.reads_party(thread->storer), cta.origin + Time(last));
  if (stage == StoreStage::kDone) thread->knows.advance(cta.writes_party(thread->storer), cta.origin + Time(last));
}

}  // namespace emulator
