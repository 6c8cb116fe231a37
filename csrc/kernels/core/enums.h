// The axes of a kernel configuration; twins of the enums in hopper/flash_attn_3/config.py.
#pragma once

namespace fa {

enum class Dtype { kFp16, kBf16 };
enum class Mask { kFull, kCausal, kLocal };
enum class SeqLayout { kDense, kVarlen };
enum class Score { kScaled, kSoftcap };
enum class Accumulation { kUnordered, kOrdered };
enum class WarpgroupSplit { kKeys, kColumns };
enum class DqPath { kStaged, kDirect };
enum class Schedule { kIntraWarpgroup, kPingPong, kBoth };
enum class Rescale { kEager, kLazy, kOnOverflow };
enum class OutputBuffer { kOwn, kWithQ, kNone };

}  // namespace fa
