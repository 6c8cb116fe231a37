// WarpgroupSplit::kColumns: two consumer warpgroups share 64 keys; each has half of the columns of dk and dv, since the
// accumulators of all columns would leave no registers for the rest.
//
// The first one also makes P^T of every block, the second one dS^T, both for both: each is 64 x 64 (a narrower product
// would be limited by shared memory), and one's elementwise work runs beside the other's products. P^T and dS^T go
// through shared memory.
//
// Where block_n is 128, a cluster of two CTAs has 64 keys each. They exchange dS^T and make half of dq's columns each,
// for all 128 keys, so that half as much is added to memory.
#pragma once

#include "barriers.cuh"
#include "key_chunks.cuh"
#include "products.cuh"
#include "score_gradients.cuh"
#include "write_dq.cuh"

namespace fa {

template <class Traits>
class ColumnSplitMma {
 public:
  using Shape = BackwardShape<Traits>;
  using OwnTile = KeyTile;  // a warpgroup's own copy, in registers

  float dk[Shape::kDkColumns / 2];  // 64 x half of head_dim, without the softmax scale
  float dv[Shape::kDvColumns / 2];  // 64 x half of head_dim_v

  // `stage`: of the tile's first block.
  FA_DEVICE ColumnSplitMma(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup,
                           RingState<Traits::kNumStages> stage)
      : params_(params),
        smem_(smem),
        control_(smem.control),
        tile_(tile),
        warpgroup_(warpgroup),
        gradients_(params, tile, tile_rank<Traits>() * Shape::kTileKeys),
        dq_output_(params, smem, tile, warpgroup),
        stage_(stage) {}

  FA_DEVICE void run() {
    clear_fragment(dk);
    clear_fragment(dv);
    if constexpr (KeyChunks<Traits>::kMayBeMissing) clear_missing_chunks(params_, smem_, tile_);
    if constexpr (kAddsLater) begin_pending_dq();
    for (int head = 0; head < tile_.num_heads_q; ++head) {
      head_q_ = tile_.first_head_q + head;
      if (warpgroup_ == 0) {
        run_probabilities();
      } else {
        run_score_gradients();
      }
    }
    if (kAddsLater && !tile_.blocks.empty()) add_pending_dq();
  }

  // Of the next tile's first block, after run().
  FA_DEVICE RingState<Traits::kNumStages> stage() const { return stage_; }

 private:
  using Scores = typename ScoreGradients<Traits>::Scores;
  using Packed = typename ScoreGradients<Traits>::Packed;

  static constexpr bool kSoftcap = ScoreGradients<Traits>::kSoftcap;
  static constexpr bool kPaired = Shape::kClusterSize == 2;
  // Whether dq is added in the step after its own. With an order of additions others wait for it.
  static constexpr bool kAddsLater = kPaired && Traits::kAccumulation == Accumulation::kUnordered;

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }

  FA_DEVICE void run_probabilities() {
    for_each_query_block_by_kind<Traits>(tile_.blocks, [&](auto kind, int m_block) {
      const int stage = stage_.index();
      share_probabilities<decltype(kind)::value>(m_block, stage);
      control_.dout.wait_full(dout_at());
      issue_dv();
      await_warpgroup(kScoreGradientsBarrier);
      finish_step(m_block, stage);
    });
  }

  FA_DEVICE void run_score_gradients() {
    for_each_query_block(tile_.blocks.begin, tile_.blocks.end, [&](int m_block) {
      const int stage = stage_.index();
      signal_warpgroup(kBuffersFreeBarrier);
      if constexpr (kPaired) {
        if (leads()) TransactionBarrier::arrive_and_expect_tx(other_ds_full(), Shape::kDsBytes);
      }
      share_score_gradients();
      control_.q.wait_full(stage_);
      finish_step(m_block, stage);
    });
  }

  // The first warpgroup's part: P^T, and with a softcap the weights of dS^T in its place.
  template <BlockKind kKind>
  FA_DEVICE void share_probabilities(int m_block, int stage) {
    Scores scores;
    Packed p;
    control_.q.wait_full(stage_);
    issue_product<Traits::kHeadDim, Shape::kSwizzleBytes>(scores, smem_.k, smem_.q[stage]);
    signal_warpgroup(kScoresIssuedBarrier);
    add_pending_dq();
    cute::warpgroup_wait<0>();
    fence_fragment(scores);
    gradients_.template to_probabilities<kKind>(m_block, smem_.lse_log2[stage], scores, p);
    await_warpgroup(kBuffersFreeBarrier);
    write(smem_.exchange.p, p);
    if constexpr (kSoftcap) {
      if constexpr (kPaired) control_.other_ds.wait_empty(ds_at());
      pack_fragment<Traits::kDtype>(p, scores);
      write(ds_tile(), p);
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    signal_warpgroup(kProbabilitiesBarrier);
  }

  // The second one's: dS^T. Issues dV on the way.
  FA_DEVICE void share_score_gradients() {
    const int stage = dout_at().index();
    Scores dscores;
    Packed weights;
    control_.dout.wait_full(dout_at());
    // Behind the other's product, which P^T waits for.
    await_warpgroup(kScoresIssuedBarrier);
    issue_product<Traits::kHeadDimV, Shape::kSwizzleBytesV>(dscores, smem_.v, smem_.dout[stage]);
    add_pending_dq();
    await_warpgroup(kProbabilitiesBarrier);
    issue_dv();
    load_fragment<Shape::kTileKeys, Shape::kSwizzleBytesDs>(
        weights, cute::cast_smem_ptr_to_uint(kSoftcap ? ds_tile() : smem_.exchange.p), 0);
    cute::warpgroup_wait<1>();
    fence_fragment(dscores);
    if constexpr (kPaired) control_.other_ds.wait_empty(ds_at());
    gradients_.write_score_gradients(weights, smem_.delta[stage], dscores, ds_tile(), 0);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    signal_warpgroup(kScoreGradientsBarrier);
    if constexpr (kPaired) {
      if (leads()) send_ds();
    }
  }

  // With dV in flight and dS^T written.
  FA_DEVICE void finish_step(int m_block, int stage) {
    if constexpr (kPaired) {
      make_dq_of_both(m_block, stage);
    } else {
      make_dq(m_block, stage);
    }
    dq_output_.end_step();
    stage_.advance();
  }

  // dq is added beside dK.
  FA_DEVICE void make_dq(int m_block, int stage) {
    issue_dq_part<ScaleOut::Zero>(ds_tile(), own_columns<Shape::kTileKeys, Shape::kDqColumns>(smem_.k));
    issue_dk(stage);
    cute::warpgroup_wait<1>();
    fence_fragment(dv);
    fence_fragment(dq_);
    if (leads()) control_.dout.release(dout_at());
    dq_output_.template add<0>(dq_, {head_q_, m_block, stage_.count});
    // Once in a step nothing is in flight: ptxas serialises products that stay in flight from step to step.
    cute::warpgroup_wait<0>();
    fence_fragment(dk);
    if (leads()) control_.q.release(stage_);
  }

  // The other CTA's keys come last, since its dS^T is on its way; dq is added beside a product of the next
  // step where nobody waits for it.
  FA_DEVICE void make_dq_of_both(int m_block, int stage) {
    constexpr int kHalfBytes = Shape::kTileKeys * Traits::kHeadDim / 2 * Shape::kElementBytes;
    const uint8_t* const half = smem_.k + tile_rank<Traits>() * kHalfBytes;
    issue_dq_part<ScaleOut::Zero>(ds_tile(), own_columns<Shape::kTileKeys, Shape::kDqColumns>(half));
    issue_dk(stage);
    control_.other_ds.wait_full(ds_at());
    issue_dq_part<ScaleOut::One>(smem_.exchange.other_ds[ds_at().index()],
                                 own_columns<Shape::kTileKeys, Shape::kDqColumns>(smem_.exchange.other_k));
    cute::warpgroup_wait<1>();
    fence_fragment(dv);
    fence_fragment(dk);
    if (leads()) {
      control_.dout.release(dout_at());
      control_.q.release(stage_);
    }
    cute::warpgroup_wait<0>();
    fence_fragment(dq_);
    if (leads()) Barrier::arrive(&control_.other_ds.empty[ds_at().index()], 1 - tile_rank<Traits>(), /*pred=*/1);
    if constexpr (kAddsLater) {
      // Sums rather than copies: for registers of a product ptxas would wait until none is in flight.
#pragma unroll
      for (int i = 0; i < Shape::kDqColumns / 2; ++i) pending_dq_[i] = dq_[i] + 0.f;
      pending_head_ = head_q_;
      pending_block_ = m_block;
    } else {
      dq_output_.template add<0>(dq_, {head_q_, m_block, stage_.count});
    }
  }

  // Before the first one zeros for the first block: with a branch around it ptxas would serialise products in flight.
  FA_DEVICE void begin_pending_dq() {
    clear_fragment(pending_dq_);
    pending_head_ = tile_.first_head_q;
    pending_block_ = tile_.blocks.begin;
  }

  // Of no numbered step: those are for additions with an order, and none of them is left for later.
  FA_DEVICE void add_pending_dq() {
    if constexpr (kAddsLater) dq_output_.template add<0>(pending_dq_, {pending_head_, pending_block_, 0});
  }

  FA_DEVICE void send_ds() {
    const uint32_t to = cute::cast_smem_ptr_to_uint(smem_.exchange.other_ds[ds_at().index()]);
    bulk_copy_to(1 - tile_rank<Traits>(), to, cute::cast_smem_ptr_to_uint(ds_tile()), Shape::kDsBytes,
                 cute::cast_smem_ptr_to_uint(other_ds_full()));
  }

  FA_DEVICE RingState<Traits::kNumDoutStages> dout_at() const { return {stage_.count}; }
  // Of dS^T, own and other.
  FA_DEVICE RingState<Shape::kClusterSize> ds_at() const { return {stage_.count}; }
  FA_DEVICE uint8_t* ds_tile() { return smem_.exchange.ds[ds_at().index()]; }
  FA_DEVICE uint64_t* other_ds_full() { return &control_.other_ds.full[ds_at().index()]; }

  FA_DEVICE static void write(uint8_t* tile, const Packed& packed) {
    stage_fragment<Shape::kTileKeys, Shape::kSwizzleBytesDs>(cute::cast_smem_ptr_to_uint(tile), 0, packed);
  }

  template <int kDepth, int kSwizzleBytes>
  FA_DEVICE void issue_product(Scores& result, const uint8_t* keys, const uint8_t* queries) {
    fence_fragment(result);
    cute::warpgroup_arrive();
    issue_transposed_scores<Traits, kDepth, kSwizzleBytes>(result, cute::cast_smem_ptr_to_uint(keys),
                                                           cute::cast_smem_ptr_to_uint(queries));
    cute::warpgroup_commit_batch();
  }

  // The warpgroup's columns of a tile of kRows rows and 16-bit elements, of which it has kColumns.
  template <int kRows, int kColumns>
  FA_DEVICE uint32_t own_columns(const uint8_t* tile) const {
    return cute::cast_smem_ptr_to_uint(tile) + warpgroup_ * kRows * kColumns * Shape::kElementBytes;
  }

  FA_DEVICE void issue_dv() {
    fence_fragment(dv);
    cute::warpgroup_arrive();
    issue_key_gradient<Traits, typename Traits::DvMma, Shape::kSwizzleBytesV>(
        dv, cute::cast_smem_ptr_to_uint(smem_.exchange.p),
        own_columns<Traits::kBlockM, Shape::kDvColumns>(smem_.dout[dout_at().index()]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dk(int stage) {
    fence_fragment(dk);
    cute::warpgroup_arrive();
    issue_key_gradient<Traits, typename Traits::DkMma, Shape::kSwizzleBytes>(
        dk, cute::cast_smem_ptr_to_uint(ds_tile()), own_columns<Traits::kBlockM, Shape::kDkColumns>(smem_.q[stage]));
    cute::warpgroup_commit_batch();
  }

  template <ScaleOut kScale>
  FA_DEVICE void issue_dq_part(const uint8_t* ds, uint32_t key_columns) {
    fence_fragment(dq_);
    cute::warpgroup_arrive();
    issue_dq<Traits, typename Traits::DqMma, kScale>(dq_, cute::cast_smem_ptr_to_uint(ds), key_columns);
    cute::warpgroup_commit_batch();
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  BackwardControl<Traits>& control_;
  const KeyTile& tile_;
  int warpgroup_;
  ScoreGradients<Traits> gradients_;
  DqOutput<Traits> dq_output_;
  int head_q_ = 0;
  float dq_[Shape::kDqColumns / 2];
  // With kAddsLater:
  float pending_dq_[Shape::kDqColumns / 2];
  int pending_head_ = 0, pending_block_ = 0;
  RingState<Traits::kNumStages> stage_;
};

}  // namespace fa
