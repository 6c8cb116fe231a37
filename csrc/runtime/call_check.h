// Argument checks that forward and backward passes share.
#pragma once

#include "check.h"
#include "row_tensor.h"

namespace fa {

// Sequences of a call. Throws ValueError for cu_seqlens_q that is no vector of at least one element.
int64_t batch_size(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, const RowTensor& q,
                   const RowTensor& k);

// Throws ValueError unless the number of q's heads is a multiple of k's.
void check_heads(const RowTensor& q, const RowTensor& k);

// Throws ValueError if two rows share memory, which a tensor that is written must not have.
void check_no_stride_0(const RowTensor& written);

// Throws unless the tensor is fp32, as a row's statistics are, with a contiguous last dimension.
void check_statistic(const char* name, const TensorView& tensor);

// Throws unless the tensor is fp32 and contiguous, and lies on q's device.
void check_scratch(const char* name, const TensorView& tensor, DLDevice device_of_q);

// Throws unless those that are given are int32 vectors of batch + 1 or batch elements on q's device.
void check_index_tensors(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                         const OptionalTensor& seqused_q, const OptionalTensor& seqused_k, int64_t batch,
                         DLDevice device_of_q);

}  // namespace fa
