// Who has accessed a place in memory, and whether others may do so now.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "clocks.h"

namespace emulator {

constexpr int kPlaceBytes = 4;
constexpr Time kNever = ~Time(0);

// Additions may come in any order among themselves.
enum class Access : uint8_t { kRead, kAdd, kWrite };

// Ordinary instructions and the asynchronous units see shared memory by different ways (PTX ISA, "Proxies").
enum class Proxy : uint8_t { kOrdinary, kAsynchronous };

struct Visit {
  uint32_t party = 0;
  Time time = 0;  // 0: none
  Access access = Access::kRead;
};

// Who accesses memory. Others know that it is done when they know of `time` of `party`.
struct Visitor {
  uint32_t party;
  Time time;
  const Clock& knows;
  Proxy proxy;

  // Or made it itself, by the same operation.
  bool knows_of(const Visit& visit) const {
    return visit.time <= knows[visit.party] || (visit.party == party && visit.time == time);
  }
};

enum class Hazard { kNone, kUnordered, kUnfenced };

class Place {
 public:
  // Whether the visitor may access the place. If not, `earlier` is the visit that stands against it.
  Hazard hazard(const Visitor& visitor, Access access, Visit& earlier) const {
    earlier = write_;
    if (!visitor.knows_of(write_)) return Hazard::kUnordered;
    const bool fenced_later = visible_ > write_.time;
    if (visitor.proxy == Proxy::kAsynchronous && fenced_later && visitor.knows[write_.party] < visible_) {
      return Hazard::kUnfenced;
    }
    for (const Visit& visit : visits_) {
      earlier = visit;
      if ((visit.access != access || access == Access::kWrite) && !visitor.knows_of(visit)) return Hazard::kUnordered;
    }
    return Hazard::kNone;
  }

  // `visible`: from which of the visitor's times on the asynchronous proxy sees what it writes.
  void note(const Visitor& visitor, Access access, Time visible) {
    const Visit visit = {visitor.party, visitor.time, access};
    if (access == Access::kWrite) {
      visits_.clear();
      write_ = visit;
      visible_ = visible;
      return;
    }
    // Whoever knows of a thread's visit knows of those that the thread knew of.
    const bool passes_on = visitor.proxy == Proxy::kOrdinary;
    const auto replaced = [&](const Visit& old) {
      return old.access == access && (old.party == visit.party || (passes_on && old.time <= visitor.knows[old.party]));
    };
    visits_.erase(std::remove_if(visits_.begin(), visits_.end(), replaced), visits_.end());
    visits_.push_back(visit);
  }

  // The writer has fenced.
  void show(uint32_t writer, Time time) {
    if (write_.party == writer && visible_ == kNever) visible_ = time;
  }

 private:
  Visit write_;
  Time visible_ = 0;
  std::vector<Visit> visits_;  // since then, without writes
};

// The places of memory that all CTAs share.
class Places {
 public:
  Place& at(uintptr_t address) {
    const uintptr_t page = address / kPageBytes;
    if (last_ == nullptr || page != last_page_) {
      std::unique_ptr<Page>& found = pages_[page];
      if (found == nullptr) found = std::make_unique<Page>();
      last_ = found.get();
      last_page_ = page;
    }
    return (*last_)[address % kPageBytes / kPlaceBytes];
  }

 private:
  static constexpr uintptr_t kPageBytes = 1024;

  using Page = std::array<Place, kPageBytes / kPlaceBytes>;

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  Page* last_ = nullptr;
  uintptr_t last_page_ = 0;
};

}  // namespace emulator
