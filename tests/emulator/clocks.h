// What one party of a launch knows of the others' progress.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

// Of one party, counted by itself. It begins at 1.
using Time = uint32_t;

// A vector clock: of each party the time up to which everything that it did has happened before.
class Clock {
 public:
  Time operator[](size_t party) const { return party < times_.size() ? times_[party] : 0; }

  void advance(size_t party, Time time) {
    if (times_.size() <= party) times_.resize(party + 1);
    times_[party] = std::max(times_[party], time);
  }

  // Learns what `other` knows.
  void join(const Clock& other) {
    if (times_.size() < other.times_.size()) times_.resize(other.times_.size());
    Time* const times = times_.data();
    const Time* const others = other.times_.data();
    for (size_t i = 0; i < other.times_.size(); ++i) times[i] = std::max(times[i], others[i]);
  }

  // Keeps what `other` knows, too.
  void meet(const Clock& other) {
    times_.resize(std::min(times_.size(), other.times_.size()));
    for (size_t i = 0; i < times_.size(); ++i) times_[i] = std::min(times_[i], other.times_[i]);
  }

  void clear() { times_.clear(); }

 private:
  std::vector<Time> times_;
};

}  // namespace emulator
