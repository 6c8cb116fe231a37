// WarpgroupSplit::kKeys: one consumer warpgroup's work on a tile, 64 keys against all query blocks that see them.
//
// Scores are kept transposed, keys as rows, so that P^T and dS^T are operands of dV and dK straight from registers.
// Only dS goes through shared memory, for dQ, to which all warpgroups' keys contribute.
#pragma once

#include "barriers.cuh"
#include "key_chunks.cuh"
#include "products.cuh"
#include "score_gradients.cuh"
#include "write_dq.cuh"

namespace fa {

template <class Traits>
class KeySplitMma {
 public:
  using Shape = BackwardShape<Traits>;
  using OwnTile = const KeyTile&;  // in shared memory, and read again where it is needed: registers are scarce

  float dk[Shape::kDkColumns / 2];  // 64 x head_dim, without the softmax scale
  float dv[Shape::kDvColumns / 2];  // 64 x head_dim_v

  // `stage`: of the tile's first block.
  FA_DEVICE KeySplitMma(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup,
                        RingState<Traits::kNumStages> stage)
      : params_(params),
        smem_(smem),
        control_(smem.control),
        tile_(tile),
        warpgroup_(warpgroup),
        gradients_(params, tile, warpgroup * kWarpgroupRows),
        dq_output_(params, smem, tile, warpgroup),
        stage_(stage) {}

  FA_DEVICE void run() {
    clear_fragment(dk);
    clear_fragment(dv);
    if constexpr (KeyChunks<Traits>::kMayBeMissing) clear_missing_chunks(params_, smem_, tile_);
    for (head_ = 0; head_ < tile_.num_heads_q; ++head_) {
      for_each_query_block_by_kind<Traits>(tile_.blocks,
                                           [&](auto kind, int m_block) { step<decltype(kind)::value>(m_block); });
    }
  }

  // Of the next tile's first block, after run().
  FA_DEVICE RingState<Traits::kNumStages> stage() const { return stage_; }

 private:
  using Scores = typename ScoreGradients<Traits>::Scores;
  using Packed = typename ScoreGradients<Traits>::Packed;

  // Both products of a step beside the accumulators, or one after the other where those leave no registers for both.
  static constexpr bool kScoresTogether = Shape::kScoresTogether;
  // Weights of dS in full precision take block_m / 2 registers until dS is known. Where there are none to spare, P as
  // it is rounded for dV takes their place. With a softcap, whose slope P lacks, the weights are rounded themselves.
  static constexpr bool kSoftcap = ScoreGradients<Traits>::kSoftcap;
  static constexpr bool kRoundsWeights = Traits::kBlockM > 64 || !kScoresTogether;
  static_assert(!(kRoundsWeights && kSoftcap), "a rounded P has lost the slope");

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }

  template <BlockKind kKind>
  FA_DEVICE void step(int m_block) {
    // Asked anew: ptxas would keep the descriptors of k from tile to tile, and spill them.
    warpgroup_ = same_in_warp(threadIdx.x / kWarpgroupThreads) - 1;
    const int stage = stage_.index();
    Packed p;
    if constexpr (kScoresTogether) {
      differentiate_together<kKind>(m_block, stage, p);
    } else {
      differentiate_in_turn<kKind>(m_block, stage, p);
    }
    meet_consumers<Traits>();
    float dq[Shape::kDqSliceColumns / 2];
    issue_dq_slice<typename Traits::DqMma, 0>(dq);
    issue_dk(stage);
    cute::warpgroup_wait<1>();
    fence_fragment(dv);
    fence_fragment(p);
    fence_fragment(dq);
    if (leads()) control_.dout.release(dout_at());
    dq_output_.template add<0>(dq, dq_block(m_block));
    if constexpr (Shape::kNumDqSlices > 1) add_rest_of_dq(m_block);
    // Once in a step nothing is in flight: ptxas serialises products that stay in flight from step to step.
    cute::warpgroup_wait<0>();
    fence_fragment(dk);
    if constexpr (kScoresTogether) fence_fragment(ds_);
    if (leads()) control_.q.release(stage_);
    dq_output_.end_step();
    stage_.advance();
  }

  // Writes the warpgroup's rows of dS^T, and leaves dV in flight. P^T is computed beside dP^T, dS^T beside dV. The
  // buffer of dS^T was last read two steps ago, by products that all warpgroups had waited for when they met one step
  // ago.
  template <BlockKind kKind>
  FA_DEVICE void differentiate_together(int m_block, int stage, Packed& p) {
    Scores scores, dscores;
    issue_scores(scores, stage);
    issue_dscores(dscores);
    cute::warpgroup_wait<1>();
    fence_fragment(scores);
    gradients_.template to_probabilities<kKind>(m_block, smem_.lse_log2[stage], scores, p);
    Packed weights;
    if constexpr (kSoftcap) pack_fragment<Traits::kDtype>(weights, scores);
    issue_dv(p);
    cute::warpgroup_wait<1>();
    fence_fragment(dscores);
    if constexpr (kSoftcap) {
      gradients_.to_score_gradients(weights, smem_.delta[dout_at().index()], dscores, ds_);
    } else if constexpr (kRoundsWeights) {
      gradients_.to_score_gradients(p, smem_.delta[dout_at().index()], dscores, ds_);
    } else {
      gradients_.to_score_gradients(scores, smem_.delta[dout_at().index()], dscores, ds_);
    }
    stage_fragment<Shape::kTileKeys, Shape::kSwizzleBytesDs>(cute::cast_smem_ptr_to_uint(ds_tile()),
                                                             warpgroup_ * kWarpgroupRows, ds_);
    cutlass::arch::fence_view_async_shared();
  }

  // The same with one product at a time. The second warpgroup issues its scores behind the first one's, so that one's
  // P^T is computed beside the other's products.
  template <BlockKind kKind>
  FA_DEVICE void differentiate_in_turn(int m_block, int stage, Packed& p) {
    Scores scores;
    if (warpgroup_ > 0) await_warpgroup(kScoresIssuedBarrier);
    issue_scores(scores, stage);
    if (warpgroup_ == 0) signal_warpgroup(kScoresIssuedBarrier);
    cute::warpgroup_wait<0>();
    fence_fragment(scores);
    gradients_.template to_probabilities<kKind>(m_block, smem_.lse_log2[stage], scores, p);
    issue_dscores(scores);
    issue_dv(p);
    cute::warpgroup_wait<1>();
    fence_fragment(scores);
    gradients_.write_score_gradients(p, smem_.delta[dout_at().index()], scores, ds_tile(), warpgroup_ * kWarpgroupRows);
    cutlass::arch::fence_view_async_shared();
  }

  FA_DEVICE RingState<Traits::kNumDoutStages> dout_at() const { return {stage_.count}; }
  FA_DEVICE DqBlock dq_block(int m_block) const { return {tile_.first_head_q + head_, m_block, stage_.count}; }
  FA_DEVICE uint8_t* ds_tile() { return smem_.exchange.ds[stage_.count % 2]; }

  FA_DEVICE uint32_t key_rows(const uint8_t* tile, int swizzle) const {
    return cute::cast_smem_ptr_to_uint(tile) + warpgroup_ * kWarpgroupRows * swizzle;
  }

  FA_DEVICE void issue_scores(Scores& scores, int stage) {
    control_.q.wait_full(stage_);
    fence_fragment(scores);
    cute::warpgroup_arrive();
    issue_transposed_scores<Traits, Traits::kHeadDim, Shape::kSwizzleBytes>(
        scores, key_rows(smem_.k, Shape::kSwizzleBytes), cute::cast_smem_ptr_to_uint(smem_.q[stage]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dscores(Scores& dscores) {
    control_.dout.wait_full(dout_at());
    fence_fragment(dscores);
    cute::warpgroup_arrive();
    issue_transposed_scores<Traits, Traits::kHeadDimV, Shape::kSwizzleBytesV>(
        dscores, key_rows(smem_.v, Shape::kSwizzleBytesV), cute::cast_smem_ptr_to_uint(smem_.dout[dout_at().index()]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dv(Packed& p) {
    fence_fragment(dv);
    fence_fragment(p);
    cute::warpgroup_arrive();
    issue_key_gradient<Traits, typename Traits::DvMma, Shape::kSwizzleBytesV>(
        dv, p, cute::cast_smem_ptr_to_uint(smem_.dout[dout_at().index()]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dk(int stage) {
    const uint32_t queries = cute::cast_smem_ptr_to_uint(smem_.q[stage]);
    fence_fragment(dk);
    if constexpr (kScoresTogether) {
      fence_fragment(ds_);
      cute::warpgroup_arrive();
      issue_key_gradient<Traits, typename Traits::DkMma, Shape::kSwizzleBytes>(dk, ds_, queries);
    } else {
      cute::warpgroup_arrive();
      issue_key_gradient<Traits, typename Traits::DkMma, Shape::kSwizzleBytes>(
          dk, key_rows(ds_tile(), Shape::kSwizzleBytesDs), queries);
    }
    cute::warpgroup_commit_batch();
  }

  // Columns from kFirst on of the warpgroup's.
  template <class Mma, int kFirst, int kSize>
  FA_DEVICE void issue_dq_slice(float (&dq)[kSize]) {
    constexpr int kColumnBytes = Shape::kTileKeys * Shape::kElementBytes;
    uint32_t ds = cute::cast_smem_ptr_to_uint(ds_tile());
    uint32_t k = cute::cast_smem_ptr_to_uint(smem_.k) + kFirst * kColumnBytes;
    if constexpr (Shape::kSplitsDqRows) {
      ds += warpgroup_ * Shape::kTileKeys * Shape::kSwizzleBytesDs;
    } else {
      k += warpgroup_ * Shape::kDqColumns * kColumnBytes;
    }
    fence_fragment(dq);
    cute::warpgroup_arrive();
    issue_dq<Traits, Mma>(dq, ds, k);
    cute::warpgroup_commit_batch();
  }

  // Behind dK.
  FA_DEVICE void add_rest_of_dq(int m_block) {
    float dq[(Shape::kDqColumns - Shape::kDqSliceColumns) / 2];
    issue_dq_slice<typename Traits::DqRestMma, Shape::kDqSliceColumns>(dq);
    cute::warpgroup_wait<0>();
    fence_fragment(dq);
    dq_output_.template add<Shape::kDqSliceColumns / 2>(dq, dq_block(m_block));
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  BackwardControl<Traits>& control_;
  const KeyTile& tile_;
  int warpgroup_;
  ScoreGradients<Traits> gradients_;
  DqOutput<Traits> dq_output_;
  int head_ = 0;  // of those that share the keys
  Packed ds_;     // A operand of dK
  RingState<Traits::kNumStages> stage_;
};

}  // namespace fa
