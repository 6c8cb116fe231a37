// A stand-in for libcuda.so.1 with two devices: it does nothing, logs every call as one line of JSON, and
// fails where it is told to. Contexts, kernels and streams are plain numbers.
#include <cuda.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/bwd/params.h"
#include "kernels/params.h"
#include "tensor_map_rules.h"

namespace {

constexpr int kNumDevices = 2;
constexpr uintptr_t kContextBase = 0x100;  // context of device d: kContextBase + d

std::ostringstream call_log;
std::string taken_log;
std::map<std::string, CUresult> failures;
size_t params_size = 0;  // 0: that of the family
constexpr int kDriverRelease = 13000;
int driver_release = kDriverRelease;
uint64_t num_maps = 0;
uintptr_t next_memory = 0x100000;
bool capturing = false;
thread_local std::vector<CUcontext> contexts;
// Symbols of all kernels; kernel number n, counted from 1, has the n-th. Those of backward passes begin with "bwd".
std::vector<std::string> symbols;

CUresult finish(const std::string& call, const std::string& fields = "") {
  call_log << "{\"call\": \"" << call << '"' << (fields.empty() ? "" : ", ") << fields << "}\n";
  auto failure = failures.find(call);
  return failure == failures.end() ? CUDA_SUCCESS : failure->second;
}

template <typename T>
std::string field(const char* name, T value) {
  std::ostringstream text;
  text << '"' << name << "\": " << +value;
  return text.str();
}

template <typename T>
std::string list(const char* name, const T* values, int count) {
  std::ostringstream text;
  text << '"' << name << "\": [";
  for (int i = 0; i < count; ++i) text << (i == 0 ? "" : ", ") << +values[i];
  text << ']';
  return text.str();
}

int current_device() {
  return contexts.empty() || contexts.back() == nullptr
             ? -1
             : static_cast<int>(reinterpret_cast<uintptr_t>(contexts.back()) - kContextBase);
}

// The encoded map is its number, counted from 1: it shows which map arrives in which parameter.
uint64_t map_number(const CUtensorMap& map) { return map.opaque[0]; }

uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

const std::string& symbol_of(const void* kernel) { return symbols[address(kernel) - 1]; }

bool is_backward(const std::string& symbol) { return symbol.rfind("bwd", 0) == 0; }

std::string params_fields(const fa::ForwardParams& p) {
  std::ostringstream text;
  text << field("q", map_number(p.q)) << ", " << field("k", map_number(p.k)) << ", " << field("v", map_number(p.v))
       << ", " << field("o", map_number(p.o)) << ", " << field("out", address(p.out)) << ", "
       << list("out_strides", std::array{p.out_batch_stride, p.out_row_stride, p.out_head_stride}.data(), 3) << ", "
       << field("promoted_out", address(p.promoted_out)) << ", " << field("lse", address(p.lse)) << ", "
       << field("lse_batch_stride", p.lse_batch_stride) << ", " << field("lse_head_stride", p.lse_head_stride) << ", "
       << field("tile_counter", address(p.tile_counter)) << ", " << field("cu_seqlens_q", address(p.cu_seqlens_q))
       << ", " << field("cu_seqlens_k", address(p.cu_seqlens_k)) << ", " << field("seqused_q", address(p.seqused_q))
       << ", " << field("seqused_k", address(p.seqused_k)) << ", " << field("batch", p.batch) << ", "
       << field("heads_q", p.heads_q) << ", " << field("heads_per_kv", p.heads_per_kv.value) << ", "
       << field("head_dim_v", p.head_dim_v) << ", " << field("seqlen_q", p.seqlen_q) << ", "
       << field("seqlen_k", p.seqlen_k) << ", " << field("row_bound_q", p.row_bound_q) << ", "
       << field("row_bound_k", p.row_bound_k) << ", " << field("packed_heads", p.packing.heads.value) << ", "
       << field("num_value_passes", p.num_value_passes) << ", " << field("heads_per_section", p.heads_per_section)
       << ", " << field("least_heads_in_last_section", p.least_heads_in_last_section) << ", "
       << field("score_scale", p.score_scale) << ", " << field("exp2_scale", p.exp2_scale) << ", "
       << field("window_left", p.window_left) << ", " << field("window_right", p.window_right) << ", "
       << field("attention_chunk", p.attention_chunk);
  return text.str();
}

std::string rows_fields(const char* name, const fa::HeadRows& rows) {
  int64_t values[] = {static_cast<int64_t>(address(rows.data)), rows.batch_stride, rows.row_stride, rows.head_stride};
  return list(name, values, 4);
}

std::string params_fields(const fa::BackwardParams& p) {
  std::ostringstream text;
  text << field("q", map_number(p.q)) << ", " << field("dout", map_number(p.dout)) << ", "
       << field("k", map_number(p.k)) << ", " << field("v", map_number(p.v)) << ", " << field("dk", map_number(p.dk))
       << ", " << field("dv", map_number(p.dv)) << ", " << rows_fields("out", p.out) << ", "
       << rows_fields("dout_rows", p.dout_rows) << ", " << rows_fields("dq_rows", p.dq_rows) << ", "
       << rows_fields("dk_rows", p.dk_rows) << ", " << rows_fields("dv_rows", p.dv_rows) << ", "
       << field("lse", address(p.lse)) << ", " << field("dlse", address(p.dlse)) << ", "
       << list("lse_strides", std::array{p.lse_batch_stride, p.lse_head_stride}.data(), 2) << ", "
       << list("dlse_strides", std::array{p.dlse_batch_stride, p.dlse_head_stride}.data(), 2) << ", "
       << field("delta", address(p.delta)) << ", " << field("lse_log2", address(p.lse_log2)) << ", "
       << field("dq_blocks", address(p.dq_blocks)) << ", " << field("dq_turns", address(p.dq_turns)) << ", "
       << field("key_parts", address(p.key_parts)) << ", "
       << list("rows_strides", std::array{p.rows_batch_stride, p.rows_head_stride}.data(), 2) << ", "
       << field("tile_counter", address(p.tile_counter)) << ", " << field("cu_seqlens_q", address(p.cu_seqlens_q))
       << ", " << field("cu_seqlens_k", address(p.cu_seqlens_k)) << ", " << field("seqused_q", address(p.seqused_q))
       << ", " << field("seqused_k", address(p.seqused_k)) << ", " << field("batch", p.batch) << ", "
       << field("heads_q", p.heads_q) << ", " << field("heads_kv", p.heads_kv) << ", " << field("head_dim", p.head_dim)
       << ", " << field("head_dim_v", p.head_dim_v) << ", " << field("seqlen_q", p.seqlen_q) << ", "
       << field("seqlen_k", p.seqlen_k) << ", " << field("row_bound_q", p.row_bound_q) << ", "
       << field("row_bound_k", p.row_bound_k) << ", " << field("num_m_blocks", p.num_m_blocks) << ", "
       << field("num_n_blocks", p.num_n_blocks) << ", " << field("num_query_blocks", p.num_query_blocks) << ", "
       << field("num_key_blocks", p.num_key_blocks) << ", " << field("group_parts", p.group_parts) << ", "
       << field("num_tiles", p.num_tiles) << ", " << field("heads_per_section", p.heads_per_section) << ", "
       << field("least_heads_in_last_section", p.least_heads_in_last_section) << ", "
       << field("softmax_scale", p.softmax_scale) << ", " << field("score_scale", p.score_scale) << ", "
       << field("exp2_scale", p.exp2_scale) << ", " << field("window_left", p.window_left) << ", "
       << field("window_right", p.window_right) << ", " << field("attention_chunk", p.attention_chunk);
  return text.str();
}

}  // namespace

extern "C" {

// -- what the tests call
// ---------------------------------------------------------------------------------------------

void fake_reset() {
  call_log.str("");
  failures.clear();
  params_size = 0;
  driver_release = kDriverRelease;
  num_maps = 0;
  capturing = false;
  contexts.clear();
}

void fake_fail(const char* call, int result) { failures[call] = static_cast<CUresult>(result); }

void fake_set_params_size(size_t size) { params_size = size; }

// The CUDA release that the driver says it is of: 13000 is 13.0.
void fake_set_driver_release(int release) { driver_release = release; }

// Whether streams that are asked say that they are captured.
void fake_set_capturing(int value) { capturing = value != 0; }

// Makes the context of a device current on this thread; -1: none.
void fake_set_device(int device) {
  contexts.clear();
  if (device >= 0) contexts.push_back(reinterpret_cast<CUcontext>(kContextBase + device));
}

int fake_current_device() { return current_device(); }

const char* fake_take_log() {
  taken_log = call_log.str();
  call_log.str("");
  return taken_log.c_str();
}

// -- the driver
// ------------------------------------------------------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = driver_release;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** name) {
  *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_FAKE";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "a fake error";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < kNumDevices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetCount(int* count) {
  *count = kNumDevices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132 + device;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(kContextBase + device);
  return finish("cuDevicePrimaryCtxRetain", field("device", device));
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = contexts.empty() ? nullptr : contexts.back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return *device >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  contexts.push_back(context);
  return finish("cuCtxPushCurrent", field("device", current_device()));
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = contexts.back();
  contexts.pop_back();
  return finish("cuCtxPopCurrent");
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  static thread_local CUstreamCaptureMode current = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::swap(current, *mode);
  return finish("cuThreadExchangeStreamCaptureMode", field("mode", static_cast<int>(current)));
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return finish("cuStreamIsCapturing");
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  *stream = reinterpret_cast<CUstream>(3);
  return finish("cuStreamCreate");
}

CUresult cuStreamDestroy(CUstream) { return finish("cuStreamDestroy"); }

CUresult cuStreamSynchronize(CUstream) { return finish("cuStreamSynchronize"); }

CUresult cuMemAlloc(CUdeviceptr* memory, size_t size) {
  *memory = next_memory;
  next_memory += size;
  return finish("cuMemAlloc",
                field("device", current_device()) + ", " + field("size", size) + ", " + field("memory", *memory));
}

CUresult cuMemsetD32Async(CUdeviceptr memory, unsigned value, size_t count, CUstream) {
  return finish("cuMemsetD32Async",
                field("memory", memory) + ", " + field("value", value) + ", " + field("count", count));
}

CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
  *library = reinterpret_cast<CUlibrary>(1);
  return finish("cuLibraryLoadData");
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* symbol) {
  symbols.push_back(symbol);
  *kernel = reinterpret_cast<CUkernel>(symbols.size());
  return finish("cuLibraryGetKernel");
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  *function = reinterpret_cast<CUfunction>(kernel);
  return finish("cuKernelGetFunction", field("device", current_device()));
}

CUresult cuKernelGetParamInfo(CUkernel kernel, size_t, size_t* offset, size_t* size) {
  *offset = 0;
  *size = is_backward(symbol_of(kernel)) ? sizeof(fa::BackwardParams) : sizeof(fa::ForwardParams);
  if (params_size != 0) *size = params_size;
  return finish("cuKernelGetParamInfo");
}

CUresult cuKernelSetAttribute(CUfunction_attribute, int value, CUkernel, CUdevice device) {
  return finish("cuKernelSetAttribute", field("value", value) + ", " + field("device", device));
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (!is_legal_map(map, rank, address, sizes, strides, box, element_strides)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof(*map));
  map->opaque[0] = ++num_maps;
  return finish("cuTensorMapEncodeTiled",
                field("type", static_cast<int>(type)) + ", " + field("base", reinterpret_cast<uintptr_t>(address)) +
                    ", " + list("sizes", sizes, rank) + ", " + list("strides", strides, rank - 1) + ", " +
                    list("box", box, rank) + ", " + list("element_strides", element_strides, rank) + ", " +
                    field("interleave", static_cast<int>(interleave)) + ", " +
                    field("swizzle", static_cast<int>(swizzle)) + ", " + field("fill", static_cast<int>(fill)));
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  const std::string& symbol = symbol_of(function);
  const std::string params = is_backward(symbol) ? params_fields(*static_cast<const fa::BackwardParams*>(arguments[0]))
                                                 : params_fields(*static_cast<const fa::ForwardParams*>(arguments[0]));
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  }
  unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  return finish("cuLaunchKernelEx", "\"symbol\": \"" + symbol + "\", " + list("grid", grid, 3) + ", " +
                                        list("block", block, 3) + ", " + field("smem", config->sharedMemBytes) + ", " +
                                        field("stream", reinterpret_cast<uintptr_t>(config->hStream)) + ", " +
                                        field("cluster", cluster) + ", " + field("device", current_device()) +
                                        ", \"params\": {" + params + "}");
}

}  // extern "C"
