// One consumer warpgroup's work on a tile: 64 keys against all query blocks that see them.
//
// Scores are kept transposed, keys as rows, so that P^T and dS^T are operands of dV and dK straight from registers. Only
// dS goes through shared memory, for dQ, to which all warpgroups' keys contribute.
#pragma once

#include "../core/score.cuh"
#include "products.cuh"
#include "stage.cuh"

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
    if (leads()) cute::tma_store_wait<0>();
  }

 private:
  using Scores = float[Traits::kBlockM / 2];
  using Packed = uint32_t[Traits::kBlockM / 4];
  enum class BlockKind { kFull, kEdge };

  // Unrounded probabilities take block_m / 2 registers, until dS is known.
  static constexpr bool kKeepsWeights = Traits::kBlockM <= 64;

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

  // P^T = exp2(S^T - lse). Leaves in `scores` what the gradient of a score is to be multiplied by, if there is room.
  template <BlockKind kKind>
  FA_DEVICE void to_probabilities(int m_block, Scores& scores, Packed& p, int stage) {
    const float* lse = smem_.lse_log2[stage] + fragment_column();
    float slope[Traits::kScore == Score::kSoftcap ? Traits::kBlockM / 2 : 1];
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; ++i) {
      if constexpr (Traits::kScore == Score::kSoftcap) {
        scores[i] = tanh_approx(scores[i] * params_.score_scale);
        slope[i] = 1.f - scores[i] * scores[i];
      }
      scores[i] = fmaf(scores[i], params_.exp2_scale, -lse[register_column(i)]);
    }
    if constexpr (kKind == BlockKind::kEdge) mask(m_block, scores);
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; ++i) scores[i] = exp2_approx(scores[i]);
    pack_fragment<Traits::kDtype>(p, scores);
    if constexpr (Traits::kScore == Score::kSoftcap) {
#pragma unroll
      for (int i = 0; i < Traits::kBlockM / 2; ++i) scores[i] *= slope[i];
    }
  }

  // Exponents of pairs that do not see each other become -infinity.
  FA_DEVICE void mask(int m_block, Scores& exponents) const {
    const Visibility<Traits::kMask> visibility = key_tile_visibility<Traits>(params_, tile_);
    const int query = m_block * Traits::kBlockM + fragment_column();
    const int key = tile_.n_block * Traits::kBlockN + warpgroup_ * kWarpgroupRows + fragment_row();
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; ++i) {
      const KeyRange visible = visibility.keys(query + register_column(i));
      const int k = key + 8 * register_row(i);
      if (k < visible.begin || k >= visible.end) exponents[i] = -INFINITY;
    }
  }

  // dS^T = P^T * (dP^T - delta).
  FA_DEVICE void to_score_gradients(const Scores& weights, const Packed& p, Scores& dscores, int stage) {
    const float* delta = smem_.delta[stage] + fragment_column();
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; i += 2) {
      float2 weight = make_float2(weights[i], weights[i + 1]);
      if constexpr (!kKeepsWeights) weight = unpack<Traits::kDtype>(p[i / 2]);
      dscores[i] = weight.x * (dscores[i] - delta[register_column(i)]);
      dscores[i + 1] = weight.y * (dscores[i + 1] - delta[register_column(i + 1)]);
    }
    pack_fragment<Traits::kDtype>(ds_, dscores);
  }

  // Writes this warpgroup's rows of dS^T, and waits for the others'. The buffer was last read two steps ago, by products
  // that all warpgroups had waited for when they met one step ago.
  FA_DEVICE void share() {
    stage_fragment<Traits::kBlockN, Shape::kSwizzleBytesDs>(
        cute::cast_smem_ptr_to_uint(smem_.ds[ds_stage_]), warpgroup_ * kWarpgroupRows, ds_);
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
    constexpr int kFloats = kSize * kWarpgroupThreads;
    if (leads()) cute::tma_store_wait<0>();
    sync_warpgroup(warpgroup_);
    float4* buffer = reinterpret_cast<float4*>(smem_.dq[warpgroup_]) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      buffer[i / 4 * kWarpgroupThreads] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    if (leads()) {
      const int64_t block = tile_.q.batch * params_.rows_batch_stride + head_q_ * params_.rows_head_stride +
                            tile_.padded_row + m_block * Traits::kBlockM;
      float* to = params_.dq_blocks + block * Traits::kHeadDim + warpgroup_ * kFloats;
      bulk_reduce_add(to, smem_.dq[warpgroup_], kFloats * 4);
      cute::tma_store_arrive();
    }
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
