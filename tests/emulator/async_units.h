// What works beside the threads: loads, stores and products, one operation at a time, in any order that they may come
// in.
#pragma once

#include <random>
#include <utility>

#include "state.h"

namespace emulator {

using Random = std::minstd_rand;

enum class Unit { kLoads, kStores, kProducts };

inline bool load_one(Cta& cta, Random& random) {
  if (cta.loads.empty()) return false;
  const size_t which = random() % cta.loads.size();
  auto load = std::move(cta.loads[which]);
  cta.loads.erase(cta.loads.begin() + which);
  load();
  return true;
}

inline bool store_one(Cta& cta, Random& random) {
  if (cta.stores.empty()) return false;
  const size_t which = random() % cta.stores.size();
  Store& store = cta.stores[which];
  if (!store.read) {
    store.read_shared();
    store.read = true;
    return true;
  }
  store.write_global();
  cta.stores.erase(cta.stores.begin() + which);
  return true;
}

bool multiply_one(Cta& cta, Random& random);

// One operation of a unit. Returns whether there was one.
inline bool advance_unit(Unit unit, Cta& cta, Random& random) {
  switch (unit) {
    case Unit::kLoads:
      return load_one(cta, random);
    case Unit::kStores:
      return store_one(cta, random);
    default:
      return multiply_one(cta, random);
  }
}

}  // namespace emulator
