#include "backward.h"

#include <tvm/ffi/extra/c_env_api.h>

#include "call_check.h"
#include "device_guard.h"
#include "kernels/core/seqlen.h"
#include "tile_counters.h"

namespace fa {
namespace {

HeadRows head_rows(const RowTensor& tensor) {
  return {reinterpret_cast<void*>(tensor.address), tensor.batch > 1 ? tensor.batch_stride : 0,
          tensor.rows > 1 ? tensor.row_stride : 0, tensor.heads > 1 ? tensor.head_stride : 0};
}

void fill_rows(BackwardParams& params, const CheckedBackwardTensors& checked) {
  params.out = head_rows(checked.out);
  params.dout_rows = head_rows(checked.dout);
  params.dq_rows = head_rows(checked.dq);
  params.dk_rows = head_rows(checked.dk);
  params.dv_rows = head_rows(checked.dv);
}

int64_t batch_stride(const TensorView& statistic) { return statistic.ndim() == 3 ? statistic.stride(0) : 0; }

void fill_lse(BackwardParams& params, const BackwardTensors& tensors) {
  params.lse = reinterpret_cast<const float*>(data_address(tensors.lse));
  params.lse_batch_stride = batch_stride(tensors.lse);
  params.lse_head_stride = tensors.lse.stride(-2);
  if (!tensors.dlse.has_value()) return;
  params.dlse = reinterpret_cast<const float*>(data_address(tensors.dlse.value()));
  params.dlse_batch_stride = batch_stride(tensors.dlse.value());
  params.dlse_head_stride = tensors.dlse.value().stride(-2);
}

// The statistics are softmax_d and lse_log2, one after the other. Turns come after the blocks of dq.
void fill_scratch(BackwardParams& params, const BackwardTensors& tensors, const CheckedBackwardTensors& checked,
                  const BackwardKernels& kernels) {
  int64_t rows = tensors.statistics.numel() / 2;
  params.delta = reinterpret_cast<float*>(data_address(tensors.statistics));
  params.lse_log2 = params.delta + rows;
  params.rows_head_stride = checked.scratch_rows;
  params.rows_batch_stride = tensors.cu_seqlens_q.has_value() ? 0 : checked.scratch_rows * checked.q.heads;
  params.dq_blocks = reinterpret_cast<float*>(data_address(tensors.dq_scratch));
  if (kernels.takes_turns) params.dq_turns = reinterpret_cast<int32_t*>(params.dq_blocks + rows * kernels.head_dim);
}

// Blocks of one side of one head: of each sequence, or of all packed ones together, whose lengths the device alone
// knows.
struct SideBlocks {
  int32_t of_head;
  int64_t of_all_heads;
};

SideBlocks side_blocks(const char* name, const RowTensor& side, int64_t batch, int64_t block_rows, bool packed) {
  if (packed) {
    // Block numbers times rows are 32 bits wide.
    checked_int32(name, side.rows + batch * block_rows, 0);
    int32_t blocks = num_packed_blocks(int(side.rows), int(batch), int(block_rows));
    return {blocks, blocks * side.heads};
  }
  int64_t blocks = (side.rows + block_rows - 1) / block_rows;
  return {static_cast<int32_t>(blocks), blocks * side.heads * batch};
}

void fill_sizes(BackwardParams& params, const BackwardTensors& tensors, const CheckedBackwardTensors& checked,
                const BackwardKernels& kernels) {
  params.cu_seqlens_q = index_pointer(tensors.cu_seqlens_q);
  params.cu_seqlens_k = index_pointer(tensors.cu_seqlens_k);
  params.seqused_q = index_pointer(tensors.seqused_q);
  params.seqused_k = index_pointer(tensors.seqused_k);
  params.batch = checked_int32("batch", checked.batch, 0);
  params.heads_q = checked_int32("heads of q", checked.q.heads, 0);
  params.heads_kv = checked_int32("heads of k", checked.k.heads, 0);
  params.head_dim = checked_int32("columns of q", checked.q.columns, 1);
  params.head_dim_v = checked_int32("columns of v", checked.v.columns, 1);
  params.row_bound_q = checked_int32("rows of q", checked.q.rows, 0);
  params.row_bound_k = checked_int32("rows of k", checked.k.rows, 0);
  const bool packed_q = params.cu_seqlens_q != nullptr, packed_k = params.cu_seqlens_k != nullptr;
  if (!packed_q) params.seqlen_q = params.row_bound_q;
  if (!packed_k) params.seqlen_k = params.row_bound_k;
  const SideBlocks q = side_blocks("rows of q, filled up to whole blocks", checked.q, checked.batch, kernels.block_m,
                                   packed_q),
                   k = side_blocks("rows of k, filled up to whole blocks", checked.k, checked.batch, kernels.block_n,
                                   packed_k);
  params.num_m_blocks = q.of_head;
  params.num_query_blocks = checked_int32("blocks of query rows", q.of_all_heads, 0);
  params.num_n_blocks = k.of_head;
  params.num_tiles = checked_int32("blocks of keys", k.of_all_heads * params.group_parts, 0);
  params.num_key_blocks = params.num_tiles / params.group_parts;
}

void fill_key_parts(BackwardParams& params, const BackwardTensors& tensors, const BackwardKernels& kernels) {
  if (params.group_parts == 1) return;
  FA_CHECK(params.heads_q % (int64_t{params.heads_kv} * params.group_parts) == 0, ValueError)
      << "group_parts is " << params.group_parts << "; supported are divisors of the "
      << params.heads_q / params.heads_kv << " heads of q for each head of k";
  int64_t needed = kernels.key_part_floats(params.num_tiles);
  FA_CHECK(tensors.key_parts.has_value(), ValueError)
      << "key_parts is not given; required with group_parts = " << params.group_parts;
  check_scratch("key_parts", tensors.key_parts.value(), tensors.q.device());
  FA_CHECK(tensors.key_parts.value().numel() >= needed, ValueError)
      << "key_parts has " << tensors.key_parts.value().numel() << " elements; required are at least " << needed;
  params.key_parts = reinterpret_cast<float*>(data_address(tensors.key_parts.value()));
}

void encode_maps(BackwardParams& params, const CheckedBackwardTensors& checked, const BackwardKernels& kernels) {
  encode_tensor_map(checked.q, kernels.q_box, params.q);
  encode_tensor_map(checked.dout, kernels.dout_box, params.dout);
  encode_tensor_map(checked.k, kernels.k_box, params.k);
  encode_tensor_map(checked.v, kernels.v_box, params.v);
  encode_tensor_map(checked.dk, kernels.dk_box, params.dk);
  encode_tensor_map(checked.dv, kernels.dv_box, params.dv);
}

void fill_options(BackwardParams& params, const BackwardOptions& options) {
  constexpr int64_t kUnlimited = -1;
  params.group_parts = checked_int32("group_parts", options.group_parts, 1);
  params.heads_per_section = checked_int32("heads_per_section", options.heads_per_section, 1);
  params.least_heads_in_last_section =
      checked_int32("least_heads_in_last_section", options.least_heads_in_last_section, 0);
  params.softmax_scale = static_cast<float>(options.softmax_scale);
  params.score_scale = static_cast<float>(options.score_scale);
  params.exp2_scale = static_cast<float>(options.exp2_scale);
  params.window_left = checked_int32("window_left", options.window_left, kUnlimited);
  params.window_right = checked_int32("window_right", options.window_right, kUnlimited);
  params.attention_chunk = checked_int32("attention_chunk", options.attention_chunk, 0);
}

// CTAs of each kernel; all grids are one-dimensional, so that batches and heads have no limit of their own.
struct Grids {
  uint32_t preprocess, main, postprocess;
};

uint32_t checked_ctas(const char* name, int64_t num_ctas) {
  return static_cast<uint32_t>(checked_int32(name, num_ctas, 0));
}

Grids grids(const BackwardParams& params, const BackwardKernels& kernels, int64_t num_ctas) {
  int64_t query_blocks = params.num_query_blocks;
  int64_t key_sums = params.group_parts > 1 ? params.num_key_blocks : 0;
  int64_t clearing = kernels.varlen ? int64_t{params.batch} * kUnusedRowCtas : 0;
  return {checked_ctas("blocks of query rows", query_blocks + clearing),
          params.num_tiles > 0 ? checked_ctas("num_ctas", num_ctas) : 0,
          checked_ctas("blocks of query rows and keys", query_blocks + key_sums)};
}

void launch(const Kernel& kernel, uint32_t num_ctas, const BackwardParams& params, CUstream stream) {
  if (num_ctas > 0) kernel.launch(num_ctas, &params, stream);
}

}  // namespace

BackwardLauncher::BackwardLauncher(int64_t handle, const BackwardOptions& options)
    : kernels_(&Registry<BackwardKernels>::instance().find(handle)),
      num_ctas_(checked_int32("num_ctas", options.num_ctas, 1)) {
  FA_CHECK(num_ctas_ % kernels_->cluster_size == 0, ValueError)
      << "num_ctas is " << num_ctas_ << "; supported are multiples of the cluster size, " << kernels_->cluster_size;
  fill_options(params_, options);
}

void BackwardLauncher::operator()(const BackwardTensors& tensors) const {
  CheckedBackwardTensors checked = check_backward_tensors(tensors, *kernels_);
  BackwardParams params = params_;
  fill_rows(params, checked);
  fill_lse(params, tensors);
  fill_scratch(params, tensors, checked, *kernels_);
  fill_sizes(params, tensors, checked, *kernels_);
  fill_key_parts(params, tensors, *kernels_);
  // Each CTA takes one number too many.
  checked_int32("blocks of keys and CTAs", int64_t(params.num_tiles) + num_ctas_, 0);
  Grids ctas = grids(params, *kernels_, num_ctas_);

  int ordinal = tensors.q.device().device_id;
  encode_maps(params, checked, *kernels_);
  DeviceGuard guard(ordinal);
  for (const Kernel* kernel : {&kernels_->preprocess, &kernels_->main, &kernels_->postprocess}) {
    kernel->prepare(ordinal);
  }
  CUstream stream = static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, ordinal));
  params.tile_counter = next_tile_counter(ordinal, stream);
  launch(kernels_->preprocess, ctas.preprocess, params, stream);
  launch(kernels_->main, ctas.main, params, stream);
  launch(kernels_->postprocess, ctas.postprocess, params, stream);
}

}  // namespace fa
