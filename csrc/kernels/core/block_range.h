// Which keys a query row may see, and which key blocks a tile of rows must visit.
#pragma once

#include "enums.h"
#include "platform.h"

namespace fa {

struct KeyRange {
  int begin, end;  // keys [begin, end)
};

// Key blocks [begin, end) hold a visible key; those in [full_begin, full_end) are visible to every row of the
// tile, so that they need no masking.
struct BlockRange {
  int begin, full_begin, full_end, end;

  FA_HOST_DEVICE bool empty() const { return begin >= end; }
  FA_HOST_DEVICE bool is_full(int n_block) const { return n_block >= full_begin && n_block < full_end; }
  // The same, but for an empty range block 0, as one to be masked.
  FA_HOST_DEVICE BlockRange at_least_one() const { return empty() ? BlockRange{0, 0, 0, 1} : *this; }
};

// Row i stands at key position p = i + len_k - len_q: the last query row is aligned with the last key.
template <Mask kMask>
struct Visibility {
  int len_q, len_k;
  int window_left, window_right;  // keys; negative: unlimited (kLocal only)
  int attention_chunk;            // keys; 0: none (kLocal only)

  FA_HOST_DEVICE KeyRange keys(int row) const {
    const int position = row + len_k - len_q;
    if constexpr (kMask == Mask::kFull) return {0, len_k};
    if constexpr (kMask == Mask::kCausal) return {0, max_of(0, min_of(len_k, position + 1))};
    int begin = window_left < 0 ? 0 : max_of(0, position - window_left);
    int end = window_right < 0 ? len_k : min_of(len_k, position + window_right + 1);
    if (attention_chunk > 0) {
      // Positions before the first key (len_q > len_k) are negative; their chunk still starts at a multiple.
      const int remainder = position % attention_chunk;
      const int chunk_begin = position - (remainder < 0 ? remainder + attention_chunk : remainder);
      begin = max_of(begin, chunk_begin);
      end = min_of(end, chunk_begin + attention_chunk);
    }
    return {begin, max_of(begin, end)};
  }

  // Of a block of `block_m` queries. Both ends of keys() grow with the row, so its first and last row bound all others.
  template <int kBlockN>
  FA_HOST_DEVICE BlockRange blocks(int m_block, int block_m) const {
    const KeyRange first = keys(m_block * block_m);
    const KeyRange last = keys(min_of(len_q, (m_block + 1) * block_m) - 1);
    const int begin = first.begin / kBlockN;
    const int end = max_of(begin, ceil_div(last.end, kBlockN));
    const int full_begin = min_of(max_of(begin, ceil_div(last.begin, kBlockN)), end);
    const int full_end = max_of(full_begin, min_of(end, first.end / kBlockN));
    return {begin, full_begin, full_end, end};
  }

  // Rows [begin, end) see the key: both ends of keys() grow with the row.
  FA_HOST_DEVICE KeyRange rows(int key) const {
    const int shift = len_k - len_q;  // row = position - shift
    int begin = 0, end = len_q;
    if constexpr (kMask == Mask::kCausal) begin = max_of(0, key - shift);
    if constexpr (kMask == Mask::kLocal) {
      if (window_right >= 0) begin = max_of(begin, key - window_right - shift);
      if (window_left >= 0) end = min_of(end, key + window_left - shift + 1);
      if (attention_chunk > 0) {
        const int chunk_begin = key / attention_chunk * attention_chunk;
        begin = max_of(begin, chunk_begin - shift);
        end = min_of(end, chunk_begin + attention_chunk - shift);
      }
    }
    begin = min_of(begin, len_q);
    return {begin, max_of(begin, end)};
  }

  // Query blocks that see a key of the block. Rows that do not exist have no weight, so that the last query block may
  // be full; keys that do not exist must be masked.
  template <int kBlockM, int kBlockN>
  FA_HOST_DEVICE BlockRange query_blocks(int n_block) const {
    const KeyRange first = rows(n_block * kBlockN);
    const KeyRange last = rows(min_of(len_k, (n_block + 1) * kBlockN) - 1);
    const int begin = first.begin / kBlockM;
    const int end = max_of(begin, ceil_div(last.end, kBlockM));
    const int full_begin = min_of(max_of(begin, ceil_div(last.begin, kBlockM)), end);
    const int last_full = first.end == len_q ? ceil_div(len_q, kBlockM) : first.end / kBlockM;
    const bool whole = (n_block + 1) * kBlockN <= len_k;
    return {begin, full_begin, whole ? max_of(full_begin, min_of(end, last_full)) : full_begin, end};
  }
};

}  // namespace fa
