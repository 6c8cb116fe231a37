// Classes of sequences by how many keys they have, for batches too large to be sorted.
#pragma once

#include "platform.h"

namespace fa {

// Octave c: lengths of 2^c to 2^(c + 1) - 1.
FA_DEVICE int octave(int length) { return 31 - __clz(max_of(1, length)); }

// The classes that are still to be gone over, the longest first. Each is an octave of lengths; the last one also holds
// all that is shorter.
class LengthClasses {
 public:
  // One class, of all lengths.
  FA_DEVICE LengthClasses() : octaves_(kAll) {}

  // Of `batch` sequences whose lengths lie in these octaves (bit c: octave c).
  FA_DEVICE LengthClasses(unsigned octaves, int batch) {
    const int longest = 31 - __clz(int(octaves));
    const int last = min_of(longest, max_of(longest - (kMostClasses - 1), last_octave(batch)));
    const unsigned shorter = octaves & ((1u << last) - 1);
    const unsigned classes = (octaves - shorter) | (shorter == 0 ? 0 : 1u << last);
    octaves_ = (classes & (classes - 1)) == 0 ? kAll : classes;
  }

  // Whether lengths of at most `longest` can be of more than one class.
  FA_DEVICE static bool can_differ(int longest, int batch) { return octave(longest) > last_octave(batch); }

  FA_DEVICE bool empty() const { return octaves_ == 0; }
  FA_DEVICE bool first_holds_all() const { return octaves_ == kAll; }
  FA_DEVICE bool first_holds(int length) const {
    const unsigned shortest = first();
    return unsigned(length) < 2 * shortest && (unsigned(length) >= shortest || octaves_ == shortest);
  }
  FA_DEVICE void drop_first() { octaves_ -= first(); }

 private:
  static constexpr unsigned kAll = 1u << 30;
  // So that the last class, of which a tile may be the last one to begin, has less than 1 / 8 of the most keys.
  static constexpr int kMostClasses = 5;
  // Going over a batch takes about as long as a tile of as many keys as there are sequences; and a tile of so few ends
  // soon.
  static constexpr int kFewKeys = 1024;

  FA_DEVICE static int last_octave(int batch) { return octave(max_of(kFewKeys, batch)); }
  FA_DEVICE unsigned first() const { return 1u << (31 - __clz(int(octaves_))); }

  unsigned octaves_;
};

}  // namespace fa
