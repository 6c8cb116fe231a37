// One consumer warpgroup's work on a tile: 64 query rows against all key blocks they may see.
#pragma once

#include "../core/mask.cuh"
#include "../core/score.cuh"
#include "../core/softmax.cuh"
#include "../core/wgmma.cuh"
#include "load.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
class TileMma {
 public:
  using Shape = ForwardShape<Traits>;

  float out[Traits::kHeadDimV / 2];  // 64 x head_dim_v, fp32, not normalised
  OnlineSoftmax<Traits::kRescale> softmax;

  FA_DEVICE TileMma(const ForwardParams& params, ForwardSmem<Traits>& smem, int warpgroup)
      : turn_{warpgroup}, params_(params), smem_(smem), control_(smem.control) {}

  FA_DEVICE void begin() { turn_.begin(); }
  FA_DEVICE void end() { turn_.end(); }

  // Leaves the tile's output in `out` and its statistics in `softmax`. Key blocks run from the last to the first.
  // `tile` lies in shared memory; it is read again where an edge block needs it rather than kept in registers.
  FA_DEVICE void run(const WorkTile& tile, uint32_t q_phase) {
    softmax = {};
    clear_fragment(out);
    Barrier::wait(&control_.q.full[turn_.warpgroup], q_phase);
    const BlockRange range =
        tile_visibility<Traits>(params_, tile).template blocks<Traits::kBlockM, Traits::kBlockN>(tile.m_block);
    if (range.empty()) return;
    int n_block = range.end - 1;
    first_block(tile, range, n_block--);
    // One loop for each kind of block: a branch inside a step keeps the compiler from ordering its instructions well.
    if constexpr (Traits::kMask != Mask::kFull) run_blocks<BlockKind::kEdge>(tile, n_block, range.full_end);
    run_blocks<BlockKind::kFull>(tile, n_block, range.full_begin);
    if constexpr (Traits::kMask == Mask::kLocal) run_blocks<BlockKind::kEdge>(tile, n_block, range.begin);
    last_values();
  }

  // Frees q's buffer for the next tile. Nobody may read q, nor the output staged in it, any more.
  FA_DEVICE void release_q() {
    if (leads()) Barrier::arrive(&control_.q.empty[turn_.warpgroup]);
  }

 private:
  using Scores = float[Traits::kBlockN / 2];

  // Whether every row of the tile sees every key of the block.
  enum class BlockKind { kFull, kEdge };

  // Down to block `begin`.
  template <BlockKind kKind>
  FA_DEVICE void run_blocks(const WorkTile& tile, int& n_block, int begin) {
#pragma unroll 1
    for (; n_block >= begin; --n_block) next_block<kKind>(tile, n_block);
  }

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }

  FA_DEVICE void first_block(const WorkTile& tile, const BlockRange& range, int n_block) {
    Scores scores;
    control_.k.wait_full(k_stage_);
    turn_.wait();
    issue_scores(scores);
    turn_.pass_on();
    cute::warpgroup_wait<0>();
    fence_fragment(scores);
    release_k();
    apply_hook(tile, scores, n_block);
    if (!range.is_full(n_block)) mask(tile, scores, n_block);
    softmax.update(scores, params_.exp2_scale);
    pack_fragment<Traits::kDtype>(p_, scores);
  }

  // QK of this block and PV of the one before are in flight together; the softmax of this block runs beside PV.
  template <BlockKind kKind>
  FA_DEVICE void next_block(const WorkTile& tile, int n_block) {
    Scores scores;
    control_.k.wait_full(k_stage_);
    turn_.wait();
    issue_scores(scores);
    control_.v.wait_full(v_stage_);
    issue_values();
    turn_.pass_on();
    cute::warpgroup_wait<1>();
    fence_fragment(scores);
    release_k();
    apply_hook(tile, scores, n_block);
    if constexpr (kKind == BlockKind::kEdge) mask(tile, scores, n_block);
    softmax.update(scores, params_.exp2_scale);
    cute::warpgroup_wait<0>();
    fence_fragment(out);
    fence_fragment(p_);
    release_v();
    if (softmax.corrects) scale_rows(out, softmax.correction);
    pack_fragment<Traits::kDtype>(p_, scores);
  }

  FA_DEVICE void last_values() {
    control_.v.wait_full(v_stage_);
    issue_values();
    cute::warpgroup_wait<0>();
    fence_fragment(out);
    release_v();
  }

  FA_DEVICE void issue_scores(Scores& scores) {
    fence_fragment(scores);
    cute::warpgroup_arrive();
    issue_qk<Traits>(scores, cute::cast_smem_ptr_to_uint(smem_.q[turn_.warpgroup]),
                     cute::cast_smem_ptr_to_uint(smem_.k[k_stage_.index()]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_values() {
    fence_fragment(out);
    fence_fragment(p_);
    cute::warpgroup_arrive();
    issue_pv<Traits>(out, p_, cute::cast_smem_ptr_to_uint(smem_.v[v_stage_.index()]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void apply_hook(const WorkTile& tile, Scores& scores, int n_block) {
    if constexpr (Traits::kScore != Score::kScaled) {
      apply_score<Traits::kScore>(
          scores,
          {tile.batch, tile.head_q, tile.head_kv, first_row(tile), n_block * Traits::kBlockN + fragment_column()},
          params_);
    }
  }

  FA_DEVICE void mask(const WorkTile& tile, Scores& scores, int n_block) {
    mask_scores(scores, tile_visibility<Traits>(params_, tile), first_row(tile), n_block * Traits::kBlockN);
  }

  // The sequence's row that is the thread's first.
  FA_DEVICE int first_row(const WorkTile& tile) const {
    return tile.m_block * Traits::kBlockM + turn_.warpgroup * kWarpgroupRows + fragment_row();
  }

  // One arrival per warpgroup: its products are complete for all its threads at once.
  FA_DEVICE void release_k() {
    if (leads()) control_.k.release(k_stage_);
    k_stage_.advance();
  }
  FA_DEVICE void release_v() {
    if (leads()) control_.v.release(v_stage_);
    v_stage_.advance();
  }

  Turn<Traits> turn_;
  const ForwardParams& params_;
  ForwardSmem<Traits>& smem_;
  ForwardControl<Traits>& control_;
  uint32_t p_[Traits::kBlockN / 4];  // probabilities of the last block, packed: A operand of PV
  RingState<Traits::kNumStages> k_stage_;
  RingState<Traits::kNumStages> v_stage_;
};

}  // namespace fa
