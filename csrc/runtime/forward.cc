#include "forward.h"

#include <tvm/ffi/extra/c_env_api.h>

#include "check.h"
#include "device_guard.h"
#include "kernel_registry.h"
#include "kernels/params.h"
#include "tensor_map.h"
#include "tile_counters.h"

namespace fa {
namespace {

const int32_t* index_pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? reinterpret_cast<const int32_t*>(data_address(tensor.value())) : nullptr;
}

void fill_lse(ForwardParams& params, const TensorView& lse) {
  params.lse = reinterpret_cast<float*>(data_address(lse));
  params.lse_batch_stride = lse.ndim() == 3 ? lse.stride(0) : 0;
  params.lse_head_stride = lse.stride(-2);
}

void fill_sizes(ForwardParams& params, const ForwardTensors& tensors, const CheckedTensors& checked,
                const ForwardOptions& options) {
  params.batch = checked_int32("batch", checked.batch, 0);
  params.heads_q = checked_int32("heads of q", checked.q.heads, 0);
  params.heads_kv = checked_int32("heads of k", checked.k.heads, 0);
  params.row_bound_q = checked_int32("rows of q", checked.q.rows, 0);
  params.row_bound_k = checked_int32("rows of k", checked.k.rows, 0);
  params.seqlen_q =
      tensors.cu_seqlens_q.has_value() ? checked_int32("max_seqlen_q", options.max_seqlen_q, 0) : params.row_bound_q;
  params.seqlen_k =
      tensors.cu_seqlens_k.has_value() ? checked_int32("max_seqlen_k", options.max_seqlen_k, 0) : params.row_bound_k;
}

void fill_options(ForwardParams& params, const ForwardOptions& options) {
  constexpr int64_t kUnlimited = -1;
  params.num_value_passes = checked_int32("num_value_passes", options.num_value_passes, 1);
  params.heads_per_section = checked_int32("heads_per_section", options.heads_per_section, 1);
  params.score_scale = static_cast<float>(options.score_scale);
  params.exp2_scale = static_cast<float>(options.exp2_scale);
  params.window_left = checked_int32("window_left", options.window_left, kUnlimited);
  params.window_right = checked_int32("window_right", options.window_right, kUnlimited);
  params.attention_chunk = checked_int32("attention_chunk", options.attention_chunk, 0);
}

// Where there is no key at all, q's map stands in for those of k and v: a tensor without elements has no address to
// encode, and the kernel loads nothing through them but prefetches the maps themselves.
void encode_maps(ForwardParams& params, const CheckedTensors& checked, const KernelTraits& traits) {
  params.q = encode_tensor_map(checked.q, traits.q_box);
  params.o = encode_tensor_map(checked.out, traits.o_box);
  params.k = checked.k.empty() ? params.q : encode_tensor_map(checked.k, traits.k_box);
  params.v = checked.v.empty() ? params.q : encode_tensor_map(checked.v, traits.v_box);
}

}  // namespace

void forward(int64_t handle, const ForwardTensors& tensors, const ForwardOptions& options) {
  CheckedTensors checked = check_forward_tensors(tensors);
  ForwardParams params{};
  fill_lse(params, tensors.lse);
  params.cu_seqlens_q = index_pointer(tensors.cu_seqlens_q);
  params.cu_seqlens_k = index_pointer(tensors.cu_seqlens_k);
  params.seqused_q = index_pointer(tensors.seqused_q);
  params.seqused_k = index_pointer(tensors.seqused_k);
  fill_sizes(params, tensors, checked, options);
  fill_options(params, options);
  uint32_t num_ctas = static_cast<uint32_t>(checked_int32("num_ctas", options.num_ctas, 0));
  if (checked.out.empty() || checked.batch == 0 || num_ctas == 0) return;

  const Kernel& kernel = find_kernel(handle);
  FA_CHECK(num_ctas % kernel.traits().cluster_size == 0, ValueError)
      << "num_ctas is " << num_ctas << "; required is a multiple of the cluster size, " << kernel.traits().cluster_size;
  int ordinal = tensors.q.device().device_id;
  encode_maps(params, checked, kernel.traits());
  DeviceGuard guard(ordinal);
  kernel.prepare(ordinal);
  CUstream stream = static_cast<CUstream>(TVMFFIEnvGetStream(kDLCUDA, ordinal));
  params.tile_counter = next_tile_counter(ordinal, stream);
  kernel.launch(num_ctas, &params, stream);
}

}  // namespace fa
