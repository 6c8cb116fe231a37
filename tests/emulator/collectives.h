// What the lanes of a warp do together.
#pragma once

#include <string.h>

#include <array>

#include "machine.h"

namespace emulator {

// stmatrix.x4: lane i gives the address of row i % 8 of matrix i / 8; lane l holds in word m elements 2 (l % 4) and
// the next of row l / 4 of matrix m.
inline void store_matrix_row(Thread* lanes, int i) {
  uint8_t* row = machine().shared_pointer(lanes[i].value, 16);
  machine().check(lanes[i].value % 16 == 0, "stmatrix: a row is not aligned to 16 bytes");
  for (int l = i % 8 * 4; l < i % 8 * 4 + 4; ++l) memcpy(row + l % 4 * 4, &lanes[l].words[i / 8], 4);
  lanes[i].cta->written_by[lanes[i].value / kUnit] = lanes[i].index + 1;
}

// ldmatrix.x4, the other way round.
inline void load_matrix_row(Thread* lanes, int i) {
  const uint8_t* row = machine().shared_pointer(lanes[i].value, 16);
  machine().check(lanes[i].value % 16 == 0, "ldmatrix: a row is not aligned to 16 bytes");
  for (int l = i % 8 * 4; l < i % 8 * 4 + 4; ++l) memcpy(&lanes[l].words[i / 8], row + l % 4 * 4, 4);
}

// Completes a meeting of the thread's warp if all lanes have come.
inline void complete_meeting(Thread& self) {
  Thread* const lanes = &self.cta->threads[self.index / kWarpLanes * kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) {
    if (!lanes[i].meets) return;
  }
  unsigned ballot = 0;
  for (int i = 0; i < kWarpLanes; ++i) {
    if (lanes[i].collective != lanes[0].collective) machine().fail("lanes of a warp meet at different collectives");
    ballot |= unsigned(lanes[i].value != 0) << i;
  }
  for (int i = 0; i < kWarpLanes; ++i) {
    const int argument = int(lanes[i].argument);
    switch (lanes[0].collective) {
      case Collective::kShuffle:
        lanes[i].result = lanes[argument % kWarpLanes].value;
        break;
      case Collective::kShuffleUp:
        lanes[i].result = lanes[i < argument ? i : i - argument].value;
        break;
      case Collective::kShuffleXor:
        lanes[i].result = lanes[i ^ argument].value;
        break;
      case Collective::kStoreMatrices:
        store_matrix_row(lanes, i);
        break;
      case Collective::kLoadMatrices:
        load_matrix_row(lanes, i);
        break;
      default:
        lanes[i].result = ballot;
    }
  }
  for (int i = 0; i < kWarpLanes; ++i) lanes[i].meets = false;
}

// What a lane brings, and what it takes away when all have come.
inline uint32_t meet(unsigned mask, Collective collective, uint32_t value, uint32_t argument = 0,
                     const uint32_t* words = nullptr) {
  machine().check(mask == ~0u, "a collective of less than a warp");
  Thread& self = machine().thread();
  self.collective = collective;
  self.value = value;
  self.argument = argument;
  if (words != nullptr) std::copy_n(words, 4, self.words);
  self.meets = true;
  complete_meeting(self);
  machine().wait("its warp", [&self] { return !self.meets; });
  return self.result;
}

// Four words of each lane, for all.
using WarpWords = std::array<std::array<uint32_t, 4>, kWarpLanes>;

inline WarpWords gather(const std::array<uint32_t, 4>& words) {
  meet(~0u, Collective::kGather, 0, 0, words.data());
  const Thread& self = machine().thread();
  WarpWords all;
  for (int i = 0; i < kWarpLanes; ++i) {
    const Thread& lane = self.cta->threads[self.index / kWarpLanes * kWarpLanes + i];
    std::copy_n(lane.words, 4, all[i].data());
  }
  meet(~0u, Collective::kGather, 0);  // nobody brings other words before all have taken these
  return all;
}

// mma.m16n8k16, the first operand's rows and the second one's columns as depth: element (row, depth) of `a` is in lane
// 4 (row % 8) + depth % 8 / 2, and (depth, column) of `b` in lane 4 column + depth % 8 / 2 (PTX ISA, "Matrix
// Fragments"). d, rows lane / 4 and 8 below: columns 2 (lane % 4) and the next.
template <class Format>
void multiply_in_warp(float* (&&d)[4], const std::array<uint32_t, 4>& a, const std::array<uint32_t, 2>& b) {
  const auto element = [](const WarpWords& words, int index, int depth, int word) {
    return Format::decode(uint16_t(words[index % 8 * 4 + depth % 8 / 2][word] >> depth % 2 * 16));
  };
  const WarpWords all_a = gather(a), all_b = gather({b[0], b[1]});
  const int lane = machine().thread().index % kWarpLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int depth = 0; depth < 16; ++depth) {
      *d[i] += element(all_a, row, depth, row / 8 + depth / 8 * 2) * element(all_b, column, depth, depth / 8);
    }
  }
}

}  // namespace emulator
