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

// In the order of issue within a warpgroup.
inline bool multiply_one(Cta& cta, Random& random) {
  const size_t first = random() % cta.products.size();
  for (size_t i = 0; i < cta.products.size(); ++i) {
    const size_t warpgroup = (first + i) % cta.products.size();
    std::deque<Product>& products = cta.products[warpgroup];
    if (products.empty() || products.front().issued < kWarpgroupLanes) continue;
    products.front().compute(cta, products.front());
    products.pop_front();
    ++cta.products_done[warpgroup];
    return true;
  }
  return false;
}

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
