// One consumer warpgroup's work on a tile: 64 keys against all query blocks that see them.
//
// Scores are kept transposed, keys as rows, so that P^T and dS^T are operands of dV and dK straight from registers.
// Only dS goes through shared memory, for dQ, to which all warpgroups' keys contribute.
#pragma once

#include "../core/score.cuh"
#include "products.cuh"
#include "stage.cuh"
#include "turn.cuh"

namespace fa {

template <class Traits>
class KeyTileMma {
 public:
  using Shape = BackwardShape<Traits>;

  float dk[Traits::kHeadDim / 2];   // 64 x head_dim, without the softmax scale
  float dv[Traits::kHeadDimV / 2];  // 64 x head_dim_v

  FA_DEVICE KeyTileMma(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup)
      : params_(params), smem_(smem), control_(smem.control), tile_(tile), warpgroup_(warpgroup) {}

  FA_DEVICE void run() {
    clear_fragment(dk);
    clear_fragment(dv);
    Barrier::wait(&control_.k_full, 0);
    Barrier::wait(&control_.v_full, 0);
    const int group = params_.heads_q / params_.heads_kv;
    for (int head = 0; head < group; ++head) {
      head_q_ = tile_.head_kv * group + head;
      int m_block = tile_.blocks.begin;
      if constexpr (Traits::kMask != Mask::kFull) run_blocks<BlockKind::kEdge>(m_block, tile_.blocks.full_begin);
      run_blocks<BlockKind::kFull>(m_block, tile_.blocks.full_end);
      run_blocks<BlockKind::kEdge>(m_block, tile_.blocks.end);
    }
    finish_adding();
  }

 private:
  using Scores = float[Traits::kBlockM / 2];
  using Packed = uint32_t[Traits::kBlockM / 4];
  enum class BlockKind { kFull, kEdge };

  static constexpr bool kSoftcap = Traits::kScore == Score::kSoftcap;
  static constexpr bool kOrdered = Traits::kAccumulation == Accumulation::kOrdered;
  // A pair's weight in dS is its probability, times the softcap's slope. In full precision weights take block_m / 2
  // registers until dS is known; where there are none to spare, P as it is rounded for dV takes their place.
  static constexpr bool kRoundsWeights = Traits::kBlockM > 64;
  static_assert(!(kRoundsWeights && kSoftcap), "a rounded P has lost the slope");

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }

  template <BlockKind kKind>
  FA_DEVICE void run_blocks(int& m_block, int end) {
#pragma unroll 1
    for (; m_block < end; ++m_block) step<kKind>(m_block);
  }

  template <BlockKind kKind>
  FA_DEVICE void step(int m_block) {
    const int stage = stage_.index();
    Scores scores, dscores;
    Packed p;
    issue_scores(scores, stage);
    issue_dscores(dscores, stage);
    cute::warpgroup_wait<1>();
    fence_fragment(scores);
    to_probabilities<kKind>(m_block, scores, p, stage);
    issue_dv(p, stage);
    cute::warpgroup_wait<1>();
    fence_fragment(dscores);
    to_score_gradients(scores, p, dscores, stage);
    share();
    float dq[Shape::kDqFloats / Shape::kNumConsumerWarpgroups / kWarpgroupThreads];
    issue_dq_product(dq);
    issue_dk(stage);
    cute::warpgroup_wait<1>();
    fence_fragment(dv);
    fence_fragment(dq);
    if (leads()) control_.dout.release(stage_);
    add_dq(dq, m_block);
    // Once in a step nothing is in flight: ptxas serialises products that stay in flight from step to step.
    cute::warpgroup_wait<0>();
    fence_fragment(dk);
    fence_fragment(ds_);
    if (leads()) control_.q.release(stage_);
    stage_.advance();
    ds_stage_ ^= 1;
  }

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

  FA_DEVICE void issue_dscores(Scores& dscores, int stage) {
    control_.dout.wait_full(stage_);
    fence_fragment(dscores);
    cute::warpgroup_arrive();
    issue_transposed_scores<Traits, Traits::kHeadDimV, Shape::kSwizzleBytesV>(
        dscores, key_rows(smem_.v, Shape::kSwizzleBytesV), cute::cast_smem_ptr_to_uint(smem_.dout[stage]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dv(Packed& p, int stage) {
    fence_fragment(dv);
    fence_fragment(p);
    cute::warpgroup_arrive();
    issue_key_gradient<Traits, typename Traits::DvMma, Shape::kSwizzleBytesV>(
        dv, p, cute::cast_smem_ptr_to_uint(smem_.dout[stage]));
    cute::warpgroup_commit_batch();
  }

  FA_DEVICE void issue_dk(int stage) {
    fence_fragment(dk);
    fence_fragment(ds_);
    cute::warpgroup_arrive();
    issue_key_gradient<Traits, typename Traits::DkMma, Shape::kSwizzleBytes>(
        dk, ds_, cute::cast_smem_ptr_to_uint(smem_.q[stage]));
    cute::warpgroup_commit_batch();
  }

  // P^T = exp2(S^T - lse). Leaves the weights of dS in `scores`.
  template <BlockKind kKind>
  FA_DEVICE void to_probabilities(int m_block, Scores& scores, Packed& p, int stage) {
    const float* lse = smem_.lse_log2[stage] + fragment_column();
    KeyRange queries[kRowsPerThread];
    if constexpr (kKind == BlockKind::kEdge) seeing_queries(m_block, queries);
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; i += 2) {
      // Pair by pair: slopes of all scores together would need more registers than there are.
      float probability[2], slope[2] = {1.f, 1.f};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float score = scores[i + j];
        if constexpr (kSoftcap) {
          score = tanh_approx(score * params_.score_scale);
          slope[j] = 1.f - score * score;
        }
        float exponent = fmaf(score, params_.exp2_scale, -lse[register_column(i + j)]);
        if (kKind == BlockKind::kEdge && !sees(queries, i + j)) exponent = -INFINITY;
        probability[j] = exp2_approx(exponent);
        scores[i + j] = kSoftcap ? probability[j] * slope[j] : probability[j];
      }
      p[i / 2] = pack<Traits::kDtype>(probability[0], probability[1]);
    }
  }

  // The queries that see the thread's two keys, relative to its first column, so that tests compare with constants.
  FA_DEVICE void seeing_queries(int m_block, KeyRange (&queries)[kRowsPerThread]) const {
    const int first_query = m_block * Traits::kBlockM + fragment_column();
    const int first_key = tile_.n_block * Traits::kBlockN + warpgroup_ * kWarpgroupRows + fragment_row();
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int key = first_key + 8 * r;
      const KeyRange rows = visibility<Traits>(params_, tile_).rows(key);
      queries[r] = {key < tile_.k.length ? rows.begin - first_query : Traits::kBlockM, rows.end - first_query};
    }
  }

  // Whether the pair of register `i` see each other. A query that does not exist may seem to: it has no weight anyway.
  FA_DEVICE static bool sees(const KeyRange (&queries)[kRowsPerThread], int i) {
    const KeyRange seeing = queries[register_row(i)];
    return register_column(i) >= seeing.begin && (Traits::kMask != Mask::kLocal || register_column(i) < seeing.end);
  }

  // dS^T = weights * (dP^T - delta).
  FA_DEVICE void to_score_gradients(const Scores& weights, const Packed& p, Scores& dscores, int stage) {
    const float* delta = smem_.delta[stage] + fragment_column();
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; i += 2) {
      float2 weight = make_float2(weights[i], weights[i + 1]);
      if constexpr (kRoundsWeights) weight = unpack<Traits::kDtype>(p[i / 2]);
      dscores[i] = weight.x * (dscores[i] - delta[register_column(i)]);
      dscores[i + 1] = weight.y * (dscores[i + 1] - delta[register_column(i + 1)]);
    }
    pack_fragment<Traits::kDtype>(ds_, dscores);
  }

  // Writes this warpgroup's rows of dS^T, and waits for the others'. The buffer was last read two steps ago, by
  // products that all warpgroups had waited for when they met one step ago.
  FA_DEVICE void share() {
    stage_fragment<Traits::kBlockN, Shape::kSwizzleBytesDs>(cute::cast_smem_ptr_to_uint(smem_.ds[ds_stage_]),
                                                            warpgroup_ * kWarpgroupRows, ds_);
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(Shape::kNumConsumerWarpgroups * kWarpgroupThreads, uint32_t(kTurnBarrier));
  }

  template <int kSize>
  FA_DEVICE void issue_dq_product(float (&dq)[kSize]) {
    uint32_t ds = cute::cast_smem_ptr_to_uint(smem_.ds[ds_stage_]);
    uint32_t k = cute::cast_smem_ptr_to_uint(smem_.k);
    if constexpr (Shape::kSplitsDqRows) {
      ds += warpgroup_ * Traits::kBlockN * Shape::kSwizzleBytesDs;
    } else {
      k += warpgroup_ * (Shape::kDqColumns * 2 / Shape::kSwizzleBytes) * Traits::kBlockN * Shape::kSwizzleBytes;
    }
    fence_fragment(dq);
    cute::warpgroup_arrive();
    issue_dq<Traits>(dq, ds, k);
    cute::warpgroup_commit_batch();
  }

  // Adds to the block of dq in memory, in the order of the accumulators (postprocess.cuh brings it back into rows).
  template <int kSize>
  FA_DEVICE void add_dq(const float (&dq)[kSize], int m_block) {
    finish_adding();
    sync_warpgroup(warpgroup_);
    float4* buffer = reinterpret_cast<float4*>(smem_.dq[warpgroup_]) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      buffer[i / 4 * kWarpgroupThreads] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    if (leads()) {
      constexpr int kFloats = kSize * kWarpgroupThreads;
      const int64_t row = tile_.scratch_row + head_q_ * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
      if constexpr (kOrdered) wait_turn(row / Traits::kBlockM, m_block);
      bulk_reduce_add(params_.dq_blocks + row * Traits::kHeadDim + warpgroup_ * kFloats,
                      cute::cast_smem_ptr_to_uint(smem_.dq[warpgroup_]), kFloats * 4);
      cute::tma_store_arrive();
    }
  }

  // Until the copy engine has read the buffer; with an order of additions until it has added, for the next in line.
  FA_DEVICE void finish_adding() {
    if (!leads()) return;
    if constexpr (kOrdered) {
      turn().pass_on();
    } else {
      cute::tma_store_wait<0>();
    }
  }

  FA_DEVICE DqTurn turn() { return DqTurn(control_.turn[warpgroup_]); }

  FA_DEVICE void wait_turn(int64_t scratch_block, int m_block) {
    const BlockRange keys =
        visibility<Traits>(params_, tile_).template blocks<Traits::kBlockM, Traits::kBlockN>(m_block, Packing{0});
    turn().wait(params_.dq_turns + scratch_block * Shape::kNumConsumerWarpgroups + warpgroup_,
                tile_.n_block - keys.begin);
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  BackwardControl<Traits>& control_;
  const KeyTile& tile_;
  int warpgroup_;
  int head_q_ = 0;
  Packed ds_;  // A operand of dK
  RingState<Traits::kNumStages> stage_;
  int ds_stage_ = 0;
};

}  // namespace fa
