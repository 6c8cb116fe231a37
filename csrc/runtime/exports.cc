// The functions of this library, typed, under the names that Python calls them by.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include "backward.h"
#include "check.h"
#include "driver.h"
#include "forward.h"
#include "kernel_registry.h"
#include "tensor_map.h"

namespace fa {
namespace {

using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::String;
using tvm::ffi::Tuple;

// The extent of a box along any dimension is at most this.
constexpr int64_t kMaxBoxRows = 256;

TensorMapBox make_box(const char* columns_name, int64_t columns, const char* rows_name, int64_t rows) {
  FA_CHECK(columns == 32 || columns == 64, ValueError)
      << columns_name << " is " << columns << "; supported are 32 and 64";
  FA_CHECK(1 <= rows && rows <= kMaxBoxRows, ValueError)
      << rows_name << " is " << rows << "; supported is 1 to " << kMaxBoxRows;
  return {static_cast<uint32_t>(columns), static_cast<uint32_t>(rows)};
}

KernelTraits make_traits(String symbol, int64_t num_threads, int64_t smem_bytes, size_t params_bytes,
                         int64_t nvcc_release) {
  KernelTraits traits;
  traits.symbol = symbol;
  traits.num_threads = static_cast<uint32_t>(checked_int32("num_threads", num_threads, 1));
  traits.smem_bytes = static_cast<uint32_t>(checked_int32("smem_bytes", smem_bytes, 0));
  traits.params_bytes = params_bytes;
  traits.nvcc_release = checked_int32("nvcc_release", nvcc_release, 0);
  return traits;
}

int64_t load_forward(Bytes cubin, String symbol, int64_t num_threads, int64_t smem_bytes, int64_t qk_box_columns,
                     int64_t vo_box_columns, int64_t qo_box_rows, int64_t kv_box_rows, int64_t promoted_floats,
                     int64_t cluster_size, int64_t nvcc_release) {
  KernelTraits traits = make_traits(symbol, num_threads, smem_bytes, sizeof(ForwardParams), nvcc_release);
  traits.cluster_size = static_cast<uint32_t>(checked_int32("cluster_size", cluster_size, 1));
  int32_t checked_floats = checked_int32("promoted_floats", promoted_floats, 0);
  TensorMapBox q_box = make_box("qk_box_columns", qk_box_columns, "qo_box_rows", qo_box_rows);
  TensorMapBox k_box = make_box("qk_box_columns", qk_box_columns, "kv_box_rows", kv_box_rows);
  TensorMapBox v_box = make_box("vo_box_columns", vo_box_columns, "kv_box_rows", kv_box_rows);
  TensorMapBox o_box = make_box("vo_box_columns", vo_box_columns, "qo_box_rows", qo_box_rows);
  CUlibrary library = load_library(traits.symbol, cubin.data(), traits.nvcc_release);
  return Registry<ForwardKernel>::instance().add(std::unique_ptr<const ForwardKernel>(
      new ForwardKernel{Kernel(std::move(traits), library), checked_floats, q_box, k_box, v_box, o_box}));
}

// A function of the tensors alone. It lives as long as somebody holds it, and the kernel for good.
Function forward_launcher(int64_t handle, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_ctas,
                          int64_t packed_heads, int64_t num_value_passes, int64_t heads_per_section,
                          int64_t least_heads_in_last_section, double score_scale, double exp2_scale,
                          int64_t window_left, int64_t window_right, int64_t attention_chunk) {
  ForwardLauncher launcher(
      handle, {max_seqlen_q, max_seqlen_k, num_ctas, packed_heads, num_value_passes, heads_per_section,
               least_heads_in_last_section, score_scale, exp2_scale, window_left, window_right, attention_chunk});
  auto launch = [launcher](TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse,
                           OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_q,
                           OptionalTensor seqused_k, OptionalTensor promoted_out) {
    launcher({q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, promoted_out});
  };
  return Function::FromTyped(launch, "forward");
}

// The kernels' names are the symbol, and the symbol with _preprocess and _postprocess behind it.
int64_t load_backward(Bytes cubin, String symbol, int64_t num_threads, int64_t smem_bytes, int64_t preprocess_threads,
                      int64_t postprocess_threads, int64_t head_dim, int64_t head_dim_v, int64_t block_m,
                      int64_t block_n, int64_t cluster_size, int64_t num_dq_parts, int64_t qk_box_columns,
                      int64_t vo_box_columns, int64_t key_gradient_rows, bool varlen, bool takes_turns,
                      int64_t nvcc_release) {
  checked_int32("head_dim", head_dim, 1);
  checked_int32("head_dim_v", head_dim_v, 1);
  TensorMapBox q_box = make_box("qk_box_columns", qk_box_columns, "block_m", block_m);
  TensorMapBox dout_box = make_box("vo_box_columns", vo_box_columns, "block_m", block_m);
  checked_int32("cluster_size", cluster_size, 1);
  checked_int32("num_dq_parts", num_dq_parts, 1);
  int64_t tile_keys = block_n / cluster_size;
  TensorMapBox k_box = make_box("qk_box_columns", qk_box_columns, "block_n", tile_keys);
  TensorMapBox v_box = make_box("vo_box_columns", vo_box_columns, "block_n", tile_keys);
  TensorMapBox dk_box = make_box("qk_box_columns", qk_box_columns, "key_gradient_rows", key_gradient_rows);
  TensorMapBox dv_box = make_box("vo_box_columns", vo_box_columns, "key_gradient_rows", key_gradient_rows);
  CUlibrary library = load_library(symbol, cubin.data(), checked_int32("nvcc_release", nvcc_release, 0));
  auto kernel = [&](const char* suffix, int64_t threads, int64_t smem, int64_t ctas = 1) {
    KernelTraits traits =
        make_traits(std::string(symbol) + suffix, threads, smem, sizeof(BackwardParams), nvcc_release);
    traits.cluster_size = static_cast<uint32_t>(ctas);
    return Kernel(std::move(traits), library);
  };
  return Registry<BackwardKernels>::instance().add(std::unique_ptr<const BackwardKernels>(new BackwardKernels{
      kernel("_preprocess", preprocess_threads, 0), kernel("", num_threads, smem_bytes, cluster_size),
      kernel("_postprocess", postprocess_threads, 0), head_dim, head_dim_v, block_m, block_n, cluster_size,
      num_dq_parts, varlen, takes_turns, q_box, dout_box, k_box, v_box, dk_box, dv_box}));
}

// As forward_launcher.
Function backward_launcher(int64_t handle, int64_t group_parts, int64_t num_ctas, int64_t heads_per_section,
                           int64_t least_heads_in_last_section, double softmax_scale, double score_scale,
                           double exp2_scale, int64_t window_left, int64_t window_right, int64_t attention_chunk) {
  BackwardLauncher launcher(
      handle, {group_parts, num_ctas, heads_per_section, least_heads_in_last_section, softmax_scale, score_scale,
               exp2_scale, window_left, window_right, attention_chunk});
  auto launch = [launcher](TensorView dout, TensorView q, TensorView k, TensorView v, TensorView out, TensorView lse,
                           OptionalTensor dlse, TensorView statistics, TensorView dq, TensorView dk, TensorView dv,
                           OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_q,
                           OptionalTensor seqused_k, TensorView dq_scratch, OptionalTensor key_parts) {
    launcher({dout, q, k, v, out, lse, dlse, statistics, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
              dq_scratch, key_parts});
  };
  return Function::FromTyped(launch, "backward");
}

int64_t num_sms(int64_t device) {
  return device_attribute(checked_int32("device", device, 0), CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
}

Tuple<int64_t, int64_t> compute_capability(int64_t device) {
  int ordinal = checked_int32("device", device, 0);
  return Tuple<int64_t, int64_t>(device_attribute(ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
                                 device_attribute(ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
}

// {base, sizes[5], strides[4]} of a tensor's map; 3-dimensional tensors are packed. For tests: needs no
// driver.
Array<int64_t> geometry(String name, TensorView tensor) {
  Layout layout = tensor.ndim() == 3 ? Layout::kPacked : Layout::kDense;
  TensorMapGeometry map = tensor_map_geometry(make_row_tensor(name.c_str(), tensor, layout));
  Array<int64_t> values{static_cast<int64_t>(map.base)};
  for (uint64_t size : map.sizes) values.push_back(static_cast<int64_t>(size));
  for (uint64_t stride : map.strides) values.push_back(static_cast<int64_t>(stride));
  return values;
}

}  // namespace
}  // namespace fa

TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_load, fa::load_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_load, fa::load_backward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward_launcher, fa::forward_launcher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(backward_launcher, fa::backward_launcher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_sms, fa::num_sms);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(compute_capability, fa::compute_capability);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tensor_map_geometry, fa::geometry);
