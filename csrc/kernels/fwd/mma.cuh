// One consumer warpgroup's work on its tiles: 64 query rows each, against all key blocks they may see.
#pragma once

#include "../core/mask.cuh"
#include "../core/score.cuh"
#include "../core/softmax.cuh"
#include "../core/warp_mma.cuh"
#include "../core/wgmma.cuh"
#include "load.cuh"
#include "promotion.cuh"
#include "smem.cuh"

namespace fa {

// For each tile: start(), unless the finish() of the tile before has done that already; run(); finish().
//
// Key blocks run from the last to the first. QK of a block goes with PV of the block before, also across the border
// between two tiles; the softmax of the block runs beside that PV, or, with Schedule::kPingPong, behind it.
//
// A tile may visit blocks that only other warpgroups need; these are skipped. Of the first block half may be enough.
//
// With Rescale::kOnOverflow a full block is tried without its maximum, and keys stay until each warp knows that it will
// not need them again.
//
// Tiles lie in shared memory; they are read again where they are needed rather than kept in registers.
template <class Traits>
class TileMma {
 public:
  using Shape = ForwardShape<Traits>;

  // The result of the last tile that was finished.
  float out[Traits::kHeadDimV / 2];  // 64 x head_dim_v, fp32, to be multiplied by `normalizer`
  float normalizer[kRowsPerThread];
  float lse[kRowsPerThread];

  FA_DEVICE TileMma(const ForwardParams& params, ForwardSmem<Traits>& smem, int warpgroup)
      : turn_{warpgroup}, params_(params), smem_(smem), control_(smem.control), promoted_(params) {}

  FA_DEVICE void begin(const WorkTile& first) {
    turn_.begin();
    if constexpr (Shape::kOverlapsTiles) clear_unused_rows();
    if (Shape::kOverlapsTiles && first.exists()) skip_blocks(blocks_before(first));
  }
  FA_DEVICE void end() { turn_.end(); }

  // QK and softmax of the tile's first block, with nothing beside them.
  FA_DEVICE void start(const WorkTile& tile) {
    // The values of these blocks come behind q, which waits for the output of the tile before where that lies over it.
    if constexpr (!Shape::kOverlapsTiles) skip_blocks(blocks_before(tile));
    softmax_ = {};
    control_.q[turn_.warpgroup].wait_full(q_stage_);
    if constexpr (!Shape::kOverlapsTiles) clear_unused_rows();  // the output of the tile before lay over them
    if (starts_half(tile)) {
      first_block<HalfScores>(tile);
    } else {
      first_block<Scores>(tile);
    }
  }

  // All further blocks.
  FA_DEVICE void run(const WorkTile& tile) {
    clear_fragment(out);
    const BlockRange& range = needed(tile);
    int n_block = range.end - 2;
    if (starts_half(tile)) {
      Scores scores;
      step<BlockKind::kEdge, Shape::kHalfKeys>(tile, n_block, scores, softmax_);
      correct_output();
      pack_fragment<Traits::kDtype>(p_, scores);
      --n_block;
    }
    // One loop for each kind of block: a branch inside a step keeps the compiler from ordering its instructions well.
    if constexpr (Traits::kMask != Mask::kFull) run_blocks<BlockKind::kEdge>(tile, n_block, range.full_end);
    run_full_blocks(tile, n_block);
    if constexpr (Traits::kMask == Mask::kLocal) {
      run_blocks<BlockKind::kEdge>(tile, n_block, range.begin);
      if (ends_early(tile)) {
        // Now: the producer announces no tile before it has loaded these blocks.
        last_values();
        skip_blocks(blocks_behind(tile));
      }
    }
  }

  // PV of the tile's last block, and beside it, where that can be, the start of the tile `next`. Returns whether it was
  // started. Leaves the tile's result in `out`, `normalizer` and `lse`.
  FA_DEVICE bool finish(const WorkTile& tile, const WorkTile& next) {
    OnlineSoftmax<Traits::kRescale> next_softmax;
    const bool ended = ends_early(tile);
    const int skipped = Shape::kOverlapsTiles && next.exists() ? blocks_before(next) : 0;
    const bool starts_next = Shape::kOverlapsTiles && next.exists() && skipped == 0 && !ended;
    if (Shape::kOverlapsTiles && !kReleasesQEarly && releases()) control_.q[turn_.warpgroup].release(q_stage_);
    q_stage_.advance();
    if (starts_next && starts_half(next)) {
      finish_beside<HalfScores>(next, next_softmax);
    } else if (starts_next) {
      finish_beside<Scores>(next, next_softmax);
    } else {
      if (!ended) last_values();
      skip_blocks(skipped);
    }
    if (first_full_block(tile) - needed(tile).full_begin >= promoted_.blocks()) {
      promoted_.add_promoted(out, softmax_.reference);
    }
    softmax_.finish(params_.exp2_scale, normalizer, lse);
    softmax_ = next_softmax;
    return starts_next;
  }

  // Frees q's only buffer. Nobody may read the output that was staged in it any more.
  FA_DEVICE void release_q_with_output() {
    static_assert(Traits::kOutputBuffer == OutputBuffer::kWithQ);
    static_assert(Traits::kNumQStages == 1);
    if (leads()) control_.q[turn_.warpgroup].release({0});
  }

  // Tiles that were finished.
  FA_DEVICE uint32_t num_tiles() const { return q_stage_.count; }

 private:
  static constexpr bool kReleasesQEarly = Shape::kOverlapsTiles && Traits::kNumQStages == 1;

  using Scores = float[Traits::kBlockN / 2];
  using HalfScores = float[Shape::kHalfKeys / 2];
  using Softmax = OnlineSoftmax<Traits::kRescale>;

  // Whether every row of the tile sees every key of the block; kFirst: to be found out.
  enum class BlockKind { kFull, kEdge, kFirst };

  // Whether the maximum of a block is looked for only when it turns out to be needed.
  template <BlockKind kKind>
  static constexpr bool kTriesWithoutMaximum = Traits::kRescale == Rescale::kOnOverflow && kKind == BlockKind::kFull;

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }
  // Whether this thread frees key buffers and q.
  FA_DEVICE static bool releases() { return threadIdx.x % (kWarpgroupThreads / Shape::kReleasesPerWarpgroup) == 0; }

  // Blocks that the warpgroup's rows need, and how many are visited for others before and behind them: the last keys
  // come first.
  FA_DEVICE const BlockRange& needed(const WorkTile& tile) const { return tile.needed[turn_.warpgroup]; }
  FA_DEVICE int blocks_before(const WorkTile& tile) const { return tile.visited.end - needed(tile).end; }
  FA_DEVICE int blocks_behind(const WorkTile& tile) const { return needed(tile).begin - tile.visited.begin; }

  // Whether the tile goes on without the warpgroup: only where a window ends on the left.
  FA_DEVICE bool ends_early(const WorkTile& tile) const {
    return Traits::kMask == Mask::kLocal && blocks_behind(tile) > 0;
  }

  // Blocks that are there for other warpgroups. A buffer can be freed only after it was filled, or its `empty` would
  // count for the use before, and after all threads have seen that, or one might wait for it while it is filled again.
  // The turns go round with all warpgroups.
  FA_DEVICE void skip_blocks(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      control_.k.wait_full(k_stage_);
      turn_.wait();
      turn_.pass_on();
      const RingState<Traits::kNumStages> v_stage{k_stage_.count};
      control_.v.wait_full(v_stage);
      sync_warpgroup(turn_.warpgroup);
      release_k();
      release_v(v_stage);
    }
  }

  // Of q. What lies there would decide, with kOnOverflow, whether the other rows of a warp are computed a second time:
  // that takes time, and the last bits of the result would not be those of an equal call.
  FA_DEVICE void clear_unused_rows() {
    if (Traits::kRescale != Rescale::kOnOverflow || params_.packing.used_rows() == kWarpgroupRows) return;
#pragma unroll 1
    for (auto& q : smem_.q) {
      clear_rows_from<kWarpgroupRows, Shape::kSwizzleBytes>(params_.packing.used_rows(), q[turn_.warpgroup]);
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(turn_.warpgroup);
  }

  // Whether the warpgroup's rows see no more of its first block than HalfScores hold. Never of its only one, so that
  // all values are of whole blocks but those of a first block.
  FA_DEVICE bool starts_half(const WorkTile& tile) const {
    if (Shape::kHalfKeys == Traits::kBlockN || needed(tile).end - needed(tile).begin < 2) return false;
    const int last_position = min_of(tile.q.length, first_position<Traits>(params_, tile, turn_.warpgroup + 1)) - 1;
    const int end = tile_visibility<Traits>(params_, tile).keys(last_position).end;
    return end <= (needed(tile).end - 1) * Traits::kBlockN + Shape::kHalfKeys;
  }

  template <class FirstScores>
  FA_DEVICE void first_block(const WorkTile& tile) {
    const int n_block = needed(tile).end - 1;
    FirstScores scores;
    control_.k.wait_full(k_stage_);
    turn_.wait();
    issue_scores(scores);
    turn_.pass_on();
    cute::warpgroup_wait<0>();
    fence_fragment(scores);
    release_keys(tile, n_block);
    to_probabilities<BlockKind::kFirst>(tile, n_block, scores, softmax_);
    pack_fragment<Traits::kDtype>(p_, scores);
  }

  // Down to block `begin`.
  template <BlockKind kKind>
  FA_DEVICE void run_blocks(const WorkTile& tile, int& n_block, int begin) {
#pragma unroll 1
    for (; n_block >= begin; --n_block) {
      Scores scores;
      step<kKind>(tile, n_block, scores, softmax_);
      if constexpr (!kTriesWithoutMaximum<kKind>) correct_output();
      pack_fragment<Traits::kDtype>(p_, scores);
    }
  }

  FA_DEVICE void run_full_blocks(const WorkTile& tile, int& n_block) {
    for (;;) {
      run_blocks<BlockKind::kFull>(tile, n_block, max_of(needed(tile).full_begin, n_block + 1 - promoted_.blocks()));
      if (n_block < needed(tile).full_begin) return;
      const bool first = n_block + promoted_.blocks() == first_full_block(tile);
      if (!first) promoted_.add_promoted(out, softmax_.reference);
      promoted_.promote(out, softmax_.reference);
    }
  }

  // That run_full_blocks() begins with: the last one that no step of another kind took.
  FA_DEVICE int first_full_block(const WorkTile& tile) const {
    return min_of(needed(tile).end - (starts_half(tile) ? 3 : 2), needed(tile).full_end - 1);
  }

  template <class FirstScores>
  FA_DEVICE void finish_beside(const WorkTile& next, Softmax& next_softmax) {
    FirstScores scores;
    control_.q[turn_.warpgroup].wait_full(q_stage_);
    step<BlockKind::kFirst>(next, needed(next).end - 1, scores, next_softmax);
    pack_fragment<Traits::kDtype>(p_, scores);
  }

  FA_DEVICE void last_values() {
    const RingState<Traits::kNumStages> v_stage = pending_values();
    control_.v.wait_full(v_stage);
    issue_values<Traits::kBlockN>(v_stage);
    cute::warpgroup_wait<0>();
    fence_fragment(out);
    release_v(v_stage);
  }

  // QK and softmax of a block, and PV of the block before, which may be the last tile's. kValueKeys: of that one.
  template <BlockKind kKind, int kValueKeys = Traits::kBlockN, int kSize>
  FA_DEVICE void step(const WorkTile& tile, int n_block, float (&scores)[kSize], Softmax& softmax) {
    if constexpr (Traits::kSchedule == Schedule::kPingPong) {
      step_in_turn<kKind, kValueKeys>(tile, n_block, scores, softmax);
    } else {
      step_beside_values<kKind, kValueKeys>(tile, n_block, scores, softmax);
    }
  }

  // Both products together; then the softmax beside PV.
  template <BlockKind kKind, int kValueKeys, int kSize>
  FA_DEVICE void step_beside_values(const WorkTile& tile, int n_block, float (&scores)[kSize], Softmax& softmax) {
    const RingState<Traits::kNumStages> v_stage = pending_values();
    control_.k.wait_full(k_stage_);
    turn_.wait();
    issue_scores(scores);
    control_.v.wait_full(v_stage);
    issue_values<kValueKeys>(v_stage);
    turn_.pass_on();
    cute::warpgroup_wait<1>();
    fence_fragment(scores);
    if constexpr (kTriesWithoutMaximum<kKind>) {
      const Softmax before = softmax;
      const bool done = try_probabilities(tile, n_block, scores, softmax);
      finish_values(v_stage, softmax);
      if (!done) try_again(tile, n_block, scores, softmax, before);
      release_keys(tile, n_block);
    } else {
      release_keys(tile, n_block);
      to_probabilities<kKind>(tile, n_block, scores, softmax);
      finish_values(v_stage, softmax);
    }
  }

  // In the warpgroup's turn PV, then QK, one at a time, so that the scores can take P's registers; then the softmax,
  // with neither in flight, beside products of other warpgroups.
  template <BlockKind kKind, int kValueKeys, int kSize>
  FA_DEVICE void step_in_turn(const WorkTile& tile, int n_block, float (&scores)[kSize], Softmax& softmax) {
    const RingState<Traits::kNumStages> v_stage = pending_values();
    control_.k.wait_full(k_stage_);
    control_.v.wait_full(v_stage);
    turn_.wait();
    issue_values<kValueKeys>(v_stage);
    cute::warpgroup_wait<0>();
    fence_fragment(out);
    fence_fragment(p_);
    begin_fragment(scores);
    issue_scores(scores);
    turn_.pass_on();
    release_v(v_stage);
    cute::warpgroup_wait<0>();
    fence_fragment(scores);
    if constexpr (kTriesWithoutMaximum<kKind>) {
      const Softmax before = softmax;
      const bool done = try_probabilities(tile, n_block, scores, softmax);
      if (!done) try_again(tile, n_block, scores, softmax, before);
      release_keys(tile, n_block);
    } else {
      release_keys(tile, n_block);
      to_probabilities<kKind>(tile, n_block, scores, softmax);
    }
  }

  // Behind the softmax, not beside it.
  FA_DEVICE void finish_values(RingState<Traits::kNumStages> v_stage, const Softmax& softmax) {
    hold_until_known(softmax.row_sum[0] + softmax.row_sum[1]);
    cute::warpgroup_wait<0>();
    fence_fragment(out);
    fence_fragment(p_);
    release_v(v_stage);
  }

  FA_DEVICE void correct_output() {
    if (softmax_.corrects) scale_rows(out, softmax_.correction);
  }

  // Returns whether that was right, for the whole warp.
  FA_DEVICE bool try_probabilities(const WorkTile& tile, int n_block, Scores& scores, Softmax& softmax) {
    apply_hook(tile, scores, n_block);
    return softmax.template try_update<Traits::kPolynomialExp2Of16>(scores, params_.exp2_scale);
  }

  // With the maximum. `before`: what the softmax was when the block was tried without.
  FA_DEVICE void try_again(const WorkTile& tile, int n_block, Scores& scores, Softmax& softmax, const Softmax& before) {
    softmax = before;
    compute_warp_scores<Traits>(scores, q_address(), k_address());
    cutlass::arch::fence_view_async_shared();  // between these reads and the copy that overwrites what they read
    to_probabilities<BlockKind::kFull>(tile, n_block, scores, softmax);
    correct_output();
  }

  template <BlockKind kKind, int kSize>
  FA_DEVICE void to_probabilities(const WorkTile& tile, int n_block, float (&scores)[kSize], Softmax& softmax) {
    apply_hook(tile, scores, n_block);
    if (kKind == BlockKind::kEdge || (kKind == BlockKind::kFirst && !needed(tile).is_full(n_block))) {
      mask_scores(scores, tile_visibility<Traits>(params_, tile), params_.packing,
                  first_position<Traits>(params_, tile, turn_.warpgroup), n_block * Traits::kBlockN);
    }
    constexpr int kPolynomialOf16 = kKind == BlockKind::kFull ? Traits::kPolynomialExp2Of16 : 0;
    softmax.template update<kPolynomialOf16>(scores, params_.exp2_scale);
  }

  template <int kSize>
  FA_DEVICE void apply_hook(const WorkTile& tile, float (&scores)[kSize], int n_block) {
    if constexpr (Traits::kScore != Score::kScaled) {
      apply_score<Traits::kScore>(
          scores,
          {tile.batch, tile.head_q, tile.head_kv, first_position<Traits>(params_, tile, turn_.warpgroup),
           n_block * Traits::kBlockN + fragment_column()},
          params_);
    }
  }

  template <int kSize>
  FA_DEVICE void issue_scores(float (&scores)[kSize]) {
    using Mma = std::conditional_t<kSize == Traits::kBlockN / 2, typename Traits::QkMma, typename Traits::QkHalfMma>;
    fence_fragment(scores);
    cute::warpgroup_arrive();
    issue_qk<Traits, Mma>(scores, q_address(), k_address());
    cute::warpgroup_commit_batch();
  }

  template <int kKeys>
  FA_DEVICE void issue_values(RingState<Traits::kNumStages> v_stage) {
    fence_fragment(out);
    fence_fragment(p_);
    cute::warpgroup_arrive();
    issue_pv<Traits, kKeys>(out, p_, cute::cast_smem_ptr_to_uint(smem_.v[v_stage.index()]));
    cute::warpgroup_commit_batch();
  }

  // Of the warpgroup's rows of q, and of the current key block.
  FA_DEVICE uint32_t q_address() {
    return same_in_warp(cute::cast_smem_ptr_to_uint(smem_.q[q_stage_.index()][turn_.warpgroup]));
  }
  FA_DEVICE uint32_t k_address() { return cute::cast_smem_ptr_to_uint(smem_.k[k_stage_.index()]); }

  FA_DEVICE void release_k() {
    if (releases()) control_.k.release(k_stage_);
    k_stage_.advance();
  }
  FA_DEVICE void release_keys(const WorkTile& tile, int n_block) {
    release_k();
    // Nobody reads q after the tile's last QK, and its only buffer is wanted for the next tile.
    if constexpr (kReleasesQEarly) {
      const bool last = n_block == needed(tile).begin;
      if (releases() && last) control_.q[turn_.warpgroup].release(q_stage_);
    }
  }
  FA_DEVICE void release_v(RingState<Traits::kNumStages> v_stage) {
    if (leads()) control_.v.release(v_stage);
  }

  // Where the values are whose probabilities are in `p_`: those of the last keys that were freed.
  FA_DEVICE RingState<Traits::kNumStages> pending_values() const { return {k_stage_.count - 1}; }

  Turn<Traits> turn_;
  const ForwardParams& params_;
  ForwardSmem<Traits>& smem_;
  ForwardControl<Traits>& control_;
  PromotedOutput<Traits> promoted_;
  Softmax softmax_;                  // of the tile that was started last
  uint32_t p_[Traits::kBlockN / 4];  // probabilities of the last block, packed: A operand of PV
  RingState<Traits::kNumQStages> q_stage_;
  RingState<Traits::kNumStages> k_stage_;
};

}  // namespace fa
