#include "forward.h"

#include <tvm/ffi/extra/c_env_api.h>

#include <algorithm>

#include "check.h"
#include "device_guard.h"
#include "tensor_map.h"
#include "tile_counters.h"

namespace fa {
namespace {

void fill_lse(ForwardParams& params, const TensorView& lse) {
  params.lse = reinterpret_cast<float*>(data_address(lse));
  params.lse_batch_stride = lse.ndim() == 3 ? lse.stride(0) : 0;
  params.lse_head_stride = lse.stride(-2);
}

void fill_out(ForwardParams& params, const RowTensor& out) {
  params.out = reinterpret_cast<void*>(out.address);
  params.out_batch_stride = out.batch > 1 ? out.batch_stride : 0;
  params.out_row_stride = out.rows > 1 ? out.row_stride : 0;
  params.out_head_stride = out.heads > 1 ? out.head_stride : 0;
}

void fill_index_tensors(ForwardParams& params, const ForwardTensors& tensors) {
  params.cu_seqlens_q = index_pointer(tensors.cu_seqlens_q);
  params.cu_seqlens_k = index_pointer(tensors.cu_seqlens_k);
  params.seqused_q = index_pointer(tensors.seqused_q);
  params.seqused_k = index_pointer(tensors.seqused_k);
}

// The sequence lengths of packed sides are options.
void fill_sizes(ForwardParams& params, const CheckedTensors& checked) {
  params.batch = checked_int32("batch", checked.batch, 0);
  params.heads_q = checked_int32("heads of q", checked.q.heads, 0);
  int32_t heads_kv = checked_int32("heads of k", checked.k.heads, 0);
  params.heads_per_kv = Divisor::of(heads_kv == 0 ? 1 : std::max(params.heads_q / heads_kv, 1));
  params.head_dim_v = checked_int32("columns of v", checked.v.columns, 1);
  params.row_bound_q = checked_int32("rows of q", checked.q.rows, 0);
  params.row_bound_k = checked_int32("rows of k", checked.k.rows, 0);
  if (params.cu_seqlens_q == nullptr) params.seqlen_q = params.row_bound_q;
  if (params.cu_seqlens_k == nullptr) params.seqlen_k = params.row_bound_k;
}

void check_packing(const ForwardParams& params, int64_t heads_kv) {
  int packed_heads = params.packing.heads.value;
  FA_CHECK(heads_kv == 0 || params.heads_q / heads_kv % packed_heads == 0, ValueError)
      << "packed_heads is " << packed_heads << "; required is that the " << params.heads_q << " heads of q for "
      << heads_kv << " of k make groups of so many";
}

Packing make_packing(int64_t packed_heads) {
  int32_t heads = checked_int32("packed_heads", packed_heads, 1);
  FA_CHECK(heads <= kWarpgroupRows, ValueError)
      << "packed_heads is " << heads << "; supported are at most " << kWarpgroupRows << " heads together";
  return Packing::of(heads);
}

void fill_options(ForwardParams& params, const ForwardOptions& options) {
  constexpr int64_t kUnlimited = -1;
  params.seqlen_q = checked_int32("max_seqlen_q", options.max_seqlen_q, 0);
  params.seqlen_k = checked_int32("max_seqlen_k", options.max_seqlen_k, 0);
  params.packing = make_packing(options.packed_heads);
  params.num_value_passes = checked_int32("num_value_passes", options.num_value_passes, 1);
  params.heads_per_section = checked_int32("heads_per_section", options.heads_per_section, 1);
  params.least_heads_in_last_section =
      checked_int32("least_heads_in_last_section", options.least_heads_in_last_section, 0);
  params.score_scale = static_cast<float>(options.score_scale);
  params.exp2_scale = static_cast<float>(options.exp2_scale);
  params.window_left = checked_int32("window_left", options.window_left, kUnlimited);
  params.window_right = checked_int32("window_right", options.window_right, kUnlimited);
  params.attention_chunk = checked_int32("attention_chunk", options.attention_chunk, 0);
}

// As many rows of several heads as fit in the place of the box.
TensorMapBox packed(TensorMapBox box, const Packing& packing) {
  uint32_t heads = static_cast<uint32_t>(packing.heads.value);
  return {box.columns, box.rows / heads, heads};
}

// Where there is no key at all, q's map stands in for those of k and v: a tensor without elements has no address to
// encode, and the kernel loads nothing through them but prefetches the maps themselves.
void encode_maps(ForwardParams& params, const CheckedTensors& checked, const ForwardKernel& kernel) {
  encode_tensor_map(checked.q, packed(kernel.q_box, params.packing), params.q);
  encode_tensor_map(checked.out, packed(kernel.o_box, params.packing), params.o);
  params.k = params.v = params.q;
  if (!checked.k.empty()) encode_tensor_map(checked.k, kernel.k_box, params.k);
  if (!checked.v.empty()) encode_tensor_map(checked.v, kernel.v_box, params.v);
}

}  // namespace

ForwardLauncher::ForwardLauncher(int64_t handle, const ForwardOptions& options)
    : num_ctas_(static_cast<uint32_t>(checked_int32("num_ctas", options.num_ctas, 0))) {
  fill_options(params_, options);
  if (num_ctas_ == 0) return;
  kernel_ = &Registry<ForwardKernel>::instance().find(handle);
  uint32_t cluster_size = kernel_->kernel.traits().cluster_size;
  FA_CHECK(num_ctas_ % cluster_size == 0, ValueError)
      << "num_ctas is " << num_ctas_ << "; required is a multiple of the cluster size, " << cluster_size;
}

float* ForwardLauncher::promoted_out(const OptionalTensor& tensor) const {
  if (!tensor.has_value()) return nullptr;
  int64_t needed = int64_t{num_ctas_} * kernel_->promoted_floats;
  FA_CHECK(tensor.value().numel() >= needed, ValueError)
      << "promoted_out has " << tensor.value().numel() << " elements; required are at least " << needed;
  return reinterpret_cast<float*>(data_address(tensor.value()));
}

void ForwardLauncher::operator()(const ForwardTensors& tensors) const {
  CheckedTensors checked = check_forward_tensors(tensors);
  ForwardParams params = params_;
  fill_lse(params, tensors.lse);
  fill_out(params, checked.out);
  fill_index_tensors(params, tensors);
  fill_sizes(params, checked);
  check_packing(params, checked.k.heads);
  if (kernel_ == nullptr || checked.out.empty() || checked.batch == 0) return;
  params.promoted_out = promoted_out(tensors.promoted_out);

  int ordinal = tensors.q.device().device_id;
  encode_maps(params, checked, *kernel_);
  DeviceGuard guard(ordinal);
  kernel_->kernel.prepare(ordinal);
  CUstream stream = static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, ordinal));
  params.tile_counter = next_tile_counter(ordinal, stream);
  kernel_->kernel.launch(num_ctas_, &params, stream);
}

}  // namespace fa
