// What the lanes of a warp do together.
#include <string.h>

#include <array>

#include "floats.h"
#include "machine.h"

namespace emulator {

namespace {

// stmatrix.x4: lane i gives the address of row i % 8 of matrix i / 8; lane l holds in word m elements 2 (l % 4) and
// the next of row l / 4 of matrix m.
void store_matrix_row(Thread* lanes, int i) {
  uint8_t* row = machine().shared_pointer(lanes[i].value, 16);
  machine().check(lanes[i].value % 16 == 0, "stmatrix: a row is not aligned to 16 bytes");
  for (int l = i % 8 * 4; l < i % 8 * 4 + 4; ++l) memcpy(row + l % 4 * 4, &lanes[l].words[i / 8], 4);
  machine().order().visit_shared(lanes[i], *lanes[i].cta, lanes[i].value, 16, Access::kWrite);
}

// ldmatrix.x4, the other way round.
void load_matrix_row(Thread* lanes, int i) {
  const uint8_t* row = machine().shared_pointer(lanes[i].value, 16);
  machine().check(lanes[i].value % 16 == 0, "ldmatrix: a row is not aligned to 16 bytes");
  for (int l = i % 8 * 4; l < i % 8 * 4 + 4; ++l) memcpy(&lanes[l].words[i / 8], row + l % 4 * 4, 4);
  machine().order().visit_shared(lanes[i], *lanes[i].cta, lanes[i].value, 16, Access::kRead);
}

// __syncwarp: each lane learns what all know.
void share_knowledge(Thread* lanes) {
  Clock all;
  for (int i = 0; i < kWarpLanes; ++i) machine().order().release(lanes[i], all);
  for (int i = 0; i < kWarpLanes; ++i) lanes[i].knows.join(all);
}

// Completes a meeting of the thread's warp if all lanes have come.
void complete_meeting(Thread& self) {
  Thread* const lanes = &self.cta->threads[self.index / kWarpLanes * kWarpLanes];
  for (int i = 0; i < kWarpLanes; ++i) {
    if (!lanes[i].meets) return;
  }
  if (self.collective == Collective::kSync) share_knowledge(lanes);
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

}  // namespace

uint32_t meet(unsigned mask, Collective collective, uint32_t value, uint32_t argument, const uint32_t* words) {
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

namespace {

// Words of each lane, for all.
using WarpWords = std::array<std::array<uint32_t, 4>, kWarpLanes>;

WarpWords gather(const uint32_t* words, int count) {
  uint32_t brought[4] = {};
  std::copy_n(words, count, brought);
  meet(~0u, Collective::kGather, 0, 0, brought);
  const Thread& self = machine().thread();
  WarpWords all;
  for (int i = 0; i < kWarpLanes; ++i) {
    const Thread& lane = self.cta->threads[self.index / kWarpLanes * kWarpLanes + i];
    std::copy_n(lane.words, 4, all[i].data());
  }
  meet(~0u, Collective::kGather, 0);  // nobody brings other words before all have taken these
  return all;
}

}  // namespace

// mma.m16n8k16, the first operand's rows and the second one's columns as depth: element (row, depth) of `a` is in lane
// 4 (row % 8) + depth % 8 / 2, and (depth, column) of `b` in lane 4 column + depth % 8 / 2 (PTX ISA, "Matrix
// Fragments"). d, rows lane / 4 and 8 below: columns 2 (lane % 4) and the next.
void multiply_in_warp(Format format, float* const* d, const uint32_t* a, const uint32_t* b) {
  const auto element = [format](const WarpWords& words, int index, int depth, int word) {
    return decode(format, uint16_t(words[index % 8 * 4 + depth % 8 / 2][word] >> depth % 2 * 16));
  };
  const WarpWords all_a = gather(a, 4), all_b = gather(b, 2);
  const int lane = machine().thread().index % kWarpLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int depth = 0; depth < 16; ++depth) {
      *d[i] += element(all_a, row, depth, row / 8 + depth / 8 * 2) * element(all_b, column, depth, depth / 8);
    }
  }
}

}  // namespace emulator
