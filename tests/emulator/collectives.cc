// What the lanes of a warp do together.
#include <string.h>

#include <array>

#include "floats.h"
#include "layouts.h"
#include "machine.h"

namespace emulator {

namespace {

// Calls visit(lane, word, byte) for the words of the row whose address lane `i` gives.
template <class Visit>
void for_each_word(int i, Visit visit) {
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const MatrixWord place = matrix_word(lane, word);
      if (place.lane == i) visit(lane, word, place.byte);
    }
  }
}

// stmatrix.x4: lane i gives the address of row i % 8 of matrix i / 8.
void store_matrix_row(Thread* lanes, int i) {
  uint8_t* row = machine().shared_pointer(lanes[i].value, kUnit);
  machine().check(lanes[i].value % kUnit == 0, "stmatrix: a row is not aligned to 16 bytes");
  for_each_word(i, [&](int lane, int word, int byte) { memcpy(row + byte, &lanes[lane].words[word], 4); });
  machine().order().visit_shared(lanes[i], *lanes[i].cta, lanes[i].value, kUnit, Access::kWrite);
}

// ldmatrix.x4, the other way round.
void load_matrix_row(Thread* lanes, int i) {
  const uint8_t* row = machine().shared_pointer(lanes[i].value, kUnit);
  machine().check(lanes[i].value % kUnit == 0, "ldmatrix: a row is not aligned to 16 bytes");
  for_each_word(i, [&](int lane, int word, int byte) { memcpy(&lanes[lane].words[word], row + byte, 4); });
  machine().order().visit_shared(lanes[i], *lanes[i].cta, lanes[i].value, kUnit, Access::kRead);
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

// mma.m16n8k16, the first operand's columns and the second one's rows as depth.
void multiply_in_warp(Format format, float* const* d, const uint32_t* a, const uint32_t* b) {
  constexpr int kRows = 16, kDepth = 16, kColumns = 8;
  const WarpWords a_words = gather(a, 4), b_words = gather(b, 2);
  const auto element = [format](const WarpWords& words, int lane, int i) {
    return decode(format, uint16_t(words[lane][i / 2] >> i % 2 * 16));
  };
  float left[kRows][kDepth], right[kDepth][kColumns];
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const auto [row, depth] = register_element(lane, i);
      left[row][depth] = element(a_words, lane, i);
    }
    for (int i = 0; i < 4; ++i) {
      const auto [depth, column] = second_operand_element(lane, i);
      right[depth][column] = element(b_words, lane, i);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const auto [row, column] = register_element(machine().thread().index % kWarpLanes, i);
    for (int depth = 0; depth < kDepth; ++depth) *d[i] += left[row][depth] * right[depth][column];
  }
}

}  // namespace emulator
