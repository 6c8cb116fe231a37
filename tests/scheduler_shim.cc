// The kernels' order of tiles and their schedulers, for the CPU tests.
#include "emulator/builtins.h"
#include "emulator/machine.h"

// scheduler.cuh needs its constants.
#include "core/traits.cuh"

#include "core/scheduler.cuh"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <string>
#include <vector>

// These have twins in tests/cpu/test_scheduler.py.
struct Problem {
  int32_t batch, heads_q, packed_heads, num_value_passes, heads_per_section, least_heads_in_last_section, seqlen_q,
      seqlen_k, window_left, window_right, attention_chunk;
  const int32_t *cu_seqlens_q, *cu_seqlens_k, *seqused_q, *seqused_k;
};

struct HandedTile {
  int32_t cta, batch, m_block, head;
};

namespace {

constexpr int kBlockM = 128;

template <fa::Mask kMaskOfTraits, fa::SeqLayout kLayout>
struct Traits {
  static constexpr fa::Mask kMask = kMaskOfTraits;
  static constexpr fa::SeqLayout kSeqLayout = kLayout;
  static constexpr int kBlockM = ::kBlockM;
  static constexpr int kClusterSize = 1;
};

// A copy that ends where readable memory ends: reading past it is a fault.
class GuardedCopy {
 public:
  GuardedCopy(const int32_t* values, int count) : guard_bytes_(sysconf(_SC_PAGESIZE)) {
    if (values == nullptr) return;
    const size_t bytes = count * sizeof(int32_t);
    const size_t readable = (bytes + guard_bytes_ - 1) / guard_bytes_ * guard_bytes_;
    mapped_bytes_ = readable + guard_bytes_;
    memory_ =
        static_cast<char*>(mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + readable, guard_bytes_, PROT_NONE) != 0) abort();
    values_ = reinterpret_cast<int32_t*>(memory_ + readable - bytes);
    memcpy(values_, values, bytes);
  }
  ~GuardedCopy() {
    if (memory_ != nullptr) munmap(memory_, mapped_bytes_);
  }
  GuardedCopy(const GuardedCopy&) = delete;
  GuardedCopy& operator=(const GuardedCopy&) = delete;

  const int32_t* get() const { return values_; }

 private:
  size_t guard_bytes_, mapped_bytes_ = 0;
  char* memory_ = nullptr;
  int32_t* values_ = nullptr;
};

bool same(const fa::ScheduledTile& a, const fa::ScheduledTile& b) {
  return a.batch == b.batch && a.position.m_block == b.position.m_block && a.position.head == b.position.head;
}

// One launch. Every lane follows the tiles, as the kernels' producer warp does; lane 0 writes them down.
template <class Traits>
std::string run_traits(const fa::ForwardParams& params, int num_ctas, const std::vector<uint8_t>& turns, int capacity,
                       HandedTile* tiles, int32_t* num_tiles) {
  emulator::Machine grid;
  grid.take_turns(turns);
  // Of each CTA: the tiles that its lanes have been given.
  std::vector<std::vector<fa::ScheduledTile>> given(num_ctas);
  *num_tiles = 0;
  const unsigned ctas = unsigned(num_ctas);
  return grid.run({ctas, /*cluster=*/1, fa::kWarpThreads, /*shared_bytes=*/0, /*seed=*/0, ctas, nullptr, 0}, [&] {
    const int cta = blockIdx.x;
    fa::Scheduler<Traits> scheduler(params);
    size_t count = 0;
    for (;; ++count) {
      const fa::ScheduledTile tile = scheduler.next(params);
      if (!tile.valid) break;
      if (threadIdx.x == 0) {
        if (*num_tiles == capacity) grid.fail("more tiles than there are");
        tiles[(*num_tiles)++] = {cta, tile.batch, tile.position.m_block, tile.position.head};
        given[cta].push_back(tile);
      }
      __shfl_sync(~0u, 0, 0);  // lane 0 has written
      if (count >= given[cta].size() || !same(tile, given[cta][count])) grid.fail("not the tile of lane 0");
    }
    if (count != given[cta].size()) grid.fail("ends before lane 0");
    scheduler.close(params);
  });
}

template <fa::SeqLayout kLayout, class... Args>
std::string run(fa::Mask mask, const Args&... args) {
  switch (mask) {
    case fa::Mask::kFull:
      return run_traits<Traits<fa::Mask::kFull, kLayout>>(args...);
    case fa::Mask::kCausal:
      return run_traits<Traits<fa::Mask::kCausal, kLayout>>(args...);
    case fa::Mask::kLocal:
      return run_traits<Traits<fa::Mask::kLocal, kLayout>>(args...);
  }
  return "no such mask";
}

}  // namespace

extern "C" int block_m() { return kBlockM; }

extern "C" void tile_position(fa::Mask mask, int index, int num_m_blocks, int num_heads, int heads_per_section,
                              int least_heads_in_last_section, fa::TilePosition* position) {
  const fa::Sections sections = {heads_per_section, least_heads_in_last_section};
  *position = mask == fa::Mask::kFull ? fa::tile_position<fa::Mask::kFull>(index, num_m_blocks, num_heads, sections)
              : mask == fa::Mask::kCausal
                  ? fa::tile_position<fa::Mask::kCausal>(index, num_m_blocks, num_heads, sections)
                  : fa::tile_position<fa::Mask::kLocal>(index, num_m_blocks, num_heads, sections);
}

// Writes the tiles in the order in which they were handed out. Returns what went wrong, or an empty string; it is valid
// until the next call.
extern "C" const char* launch(fa::Mask mask, fa::SeqLayout layout, const Problem* problem, fa::TileCounter* counter,
                              int num_ctas, const uint8_t* turns, int num_turns, int capacity, HandedTile* tiles,
                              int32_t* num_tiles) {
  const GuardedCopy cu_seqlens_q(problem->cu_seqlens_q, problem->batch + 1);
  const GuardedCopy cu_seqlens_k(problem->cu_seqlens_k, problem->batch + 1);
  const GuardedCopy seqused_q(problem->seqused_q, problem->batch);
  const GuardedCopy seqused_k(problem->seqused_k, problem->batch);
  fa::ForwardParams params = {};
  params.tile_counter = counter;
  params.cu_seqlens_q = cu_seqlens_q.get();
  params.cu_seqlens_k = cu_seqlens_k.get();
  params.seqused_q = seqused_q.get();
  params.seqused_k = seqused_k.get();
  params.batch = problem->batch;
  params.heads_q = problem->heads_q;
  params.packing = fa::Packing::of(problem->packed_heads);
  params.num_value_passes = problem->num_value_passes;
  params.heads_per_section = problem->heads_per_section;
  params.least_heads_in_last_section = problem->least_heads_in_last_section;
  params.seqlen_q = problem->seqlen_q;
  params.seqlen_k = problem->seqlen_k;
  params.window_left = problem->window_left;
  params.window_right = problem->window_right;
  params.attention_chunk = problem->attention_chunk;

  static std::string error;
  const std::vector<uint8_t> order(turns, turns + num_turns);
  error = layout == fa::SeqLayout::kDense
              ? run<fa::SeqLayout::kDense>(mask, params, num_ctas, order, capacity, tiles, num_tiles)
              : run<fa::SeqLayout::kVarlen>(mask, params, num_ctas, order, capacity, tiles, num_tiles);
  return error.c_str();
}
