// TMA tensor maps of q, k, v and out: their geometry, and its encoding by the driver.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

#include "row_tensor.h"

namespace fa {

// What cuTensorMapEncodeTiled is told of a tensor. Dimensions, innermost first: {column, head, row, origin,
// batch}.
//
// Row and origin step by the same stride and the base lies `bound` rows before the tensor, so that
//   address(row, origin) = base + (row + origin) * row stride = tensor + (row + origin - bound) * row stride.
// Row r of a sequence of `len` rows that starts at row `offset` of the tensor has row = bound - len + r and
// origin = offset + len. Its address is that of tensor row offset + r, and row < bound if and only if r <
// len: the hardware itself drops what lies past the end of every sequence, also where another sequence
// follows.
struct TensorMapGeometry {
  uint64_t base;                    // byte address; may lie outside the tensor's memory
  std::array<uint64_t, 5> sizes;    // {columns, heads, bound, bound + 1, batch}
  std::array<uint64_t, 4> strides;  // bytes, of head, row, origin and batch
};

// The geometry of a tensor that is not empty; bound is its number of rows. A pure function: needs no driver.
// Throws ValueError, naming the tensor, for addresses and strides that TMA does not support.
TensorMapGeometry tensor_map_geometry(const RowTensor& tensor);

// The part of a tensor that one TMA instruction moves: `columns` columns of `rows` rows of `heads` heads; in shared
// memory the heads of a row are neighbours.
struct TensorMapBox {
  uint32_t columns;  // 64 or 32: rows of 128 or 64 bytes in shared memory, swizzled in that width
  uint32_t rows;
  uint32_t heads = 1;
};

// Encodes on the host; out-of-bounds elements read as zero. Throws ValueError if the driver refuses. Into `map` itself:
// the driver requires its alignment, which GCC 12 does not give to a temporary that a function returns.
void encode_tensor_map(const RowTensor& tensor, const TensorMapBox& box, CUtensorMap& map);

}  // namespace fa
