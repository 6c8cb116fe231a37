"""Kernel configurations: everything that is fixed when a kernel is compiled.

One frozen dataclass per kernel family. Every field becomes one constant of the generated
``struct Traits`` and one part of the cache key, so a field can be neither forgotten nor
mapped by hand. Quantities that follow from the fields are properties here and
``constexpr`` values in ``csrc/kernels``; generated ``static_assert``s tie the two together.

This module knows tiles, never tensors; it imports neither torch nor CUDA.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Iterable

#: Dynamic shared memory one CTA may use on sm_90 (bytes).
MAX_SMEM_BYTES = 232_448
#: Shared memory set aside for barriers and tile coordinates; the kernels' shared-memory plans assert that they fit.
CONTROL_SMEM_BYTES = 1024
#: Rows of the accumulator that one warpgroup owns (the M of ``wgmma.m64nNk16``).
WARPGROUP_ROWS = 64
#: Depth of a product, the K of ``wgmma.m64nNk16``.
MMA_DEPTH = 16
#: Threads of a warpgroup.
WARPGROUP_THREADS = 128
#: Tile widths that kernels exist for, of q and k as of v; a head dim runs in the smallest that holds it.
HEAD_DIM_TILES = (64, 96, 128, 192, 256)
#: Keys after which a kernel moves its output to a second level of accumulation (csrc/kernels/fwd/promotion.cuh).
PROMOTION_KEYS = 2**18
#: Registers a consumer thread needs beside its S, P and O fragments (addresses, row statistics, loop state).
FRAGMENT_REGISTER_MARGIN = 24
#: Registers of a thread of each role after setmaxnreg, by the number of consumer warpgroups.
PRODUCER_REGISTERS = {1: 56, 2: 24, 3: 32, 4: 32}
CONSUMER_REGISTERS = {1: 256, 2: 240, 3: 160, 4: 112}


class ConfigError(ValueError):
    """A configuration that cannot be built; the text says which rule it breaks."""


class KernelEnum(enum.Enum):
    """An enum with a twin in ``csrc/kernels/core/enums.h``; the value is the twin's enumerator."""

    @property
    def cpp(self) -> str:
        """The C++ spelling, e.g. ``Mask::kCausal``."""
        return f"{type(self).__name__}::{self.value}"

    @property
    def slug(self) -> str:
        """The lower-case word used in kernel names, e.g. ``causal``."""
        return self.name.lower()


class Dtype(KernelEnum):
    """Element type of q, k, v and out."""

    FP16 = "kFp16"
    BF16 = "kBf16"

    @property
    def num_bytes(self) -> int:
        return 2


class Mask(KernelEnum):
    """Which keys a query may see. CAUSAL is bottom-right aligned; LOCAL is a window and/or a chunk."""

    FULL = "kFull"
    CAUSAL = "kCausal"
    LOCAL = "kLocal"


class SeqLayout(KernelEnum):
    """DENSE: all sequences have the tensor's length. VARLEN: lengths are read from device memory."""

    DENSE = "kDense"
    VARLEN = "kVarlen"


class Score(KernelEnum):
    """What happens to q.k before the softmax. SCALED: nothing but the scale. SOFTCAP: c * tanh(scale * s / c)."""

    SCALED = "kScaled"
    SOFTCAP = "kSoftcap"


class Schedule(KernelEnum):
    """How softmax hides behind the tensor cores.

    INTRA_WARPGROUP: the QK product of the next key block runs while PV of the last one does, and the
    softmax runs beside PV. PING_PONG: the warpgroups take turns at the tensor cores, and the softmax of one runs
    beside products of others alone; P gives its registers to the next block's scores. BOTH: a warpgroup overlaps its
    own work as with INTRA_WARPGROUP, and they take turns.
    """

    INTRA_WARPGROUP = "kIntraWarpgroup"
    PING_PONG = "kPingPong"
    BOTH = "kBoth"


class Rescale(KernelEnum):
    """When the accumulated output is brought to a new maximum of its row.

    EAGER: at every key block. LAZY: when the maximum has grown by more than 8 in the base-2 exponent since the last
    time, which a branch finds out. LAZY pays where the output is wide. ON_OVERFLOW: when the exponentials of a block
    add up to 2^15; the maximum of a block that all rows see as a whole is not even looked for, and its scores are
    computed a second time if it turns out to be needed. The result is exact in each case.
    """

    EAGER = "kEager"
    LAZY = "kLazy"
    ON_OVERFLOW = "kOnOverflow"


class OutputBuffer(KernelEnum):
    """Where the output tile is staged for its TMA store: in shared memory of its OWN, or WITH_Q in q's.

    NONE: it goes straight from registers to memory, for tiles that leave no room. With OWN and NONE a tile's last
    product overlaps with the next tile's first.
    """

    OWN = "kOwn"
    WITH_Q = "kWithQ"
    NONE = "kNone"


def column_chunk_bytes(width: int, dtype: Dtype) -> int:
    """Width of the column chunks, and of the swizzle, of a tile in shared memory that has ``width`` columns."""
    return 128 if width * dtype.num_bytes % 128 == 0 else 64


class KernelConfig:
    """What all kernel families share: a stable key and a readable name."""

    FAMILY: str

    def key(self) -> str:
        """Hex digest over the family and every field (name and value)."""
        text = self.FAMILY + "".join(
            f";{field.name}={self._plain(getattr(self, field.name))}" for field in dataclasses.fields(self)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def check_rules(self, rules: Iterable[tuple[bool, str, str]]) -> None:
        """Raise `ConfigError` on the first of (whether it holds, the field, what is allowed) that does not hold."""
        for holds, field, allowed in rules:
            if not holds:
                value = getattr(self, field)
                shown = value.name if isinstance(value, enum.Enum) else value
                raise ConfigError(f"{field}={shown} is not supported; it must be {allowed}")

    @staticmethod
    def _plain(value: object) -> str:
        return value.name if isinstance(value, enum.Enum) else repr(value)


def _head_dim_rules(head_dim: int, head_dim_v: int) -> list[tuple[bool, str, str]]:
    """For the tile widths of forward kernels."""
    *most, last = HEAD_DIM_TILES
    allowed = f"{', '.join(map(str, most))} or {last}"
    return [
        (head_dim in HEAD_DIM_TILES, "head_dim", allowed),
        (head_dim_v in HEAD_DIM_TILES, "head_dim_v", allowed),
    ]


def head_dims_slug(head_dim: int, head_dim_v: int) -> str:
    """The tile widths as kernel names have them: d128, or d192x128."""
    return f"d{head_dim}" if head_dim == head_dim_v else f"d{head_dim}x{head_dim_v}"


@dataclasses.dataclass(frozen=True)
class ForwardConfig(KernelConfig):
    """One forward kernel.

    Shapes: a CTA holds ``block_m`` query rows (64 per consumer warpgroup) and streams key blocks of
    ``block_n`` rows through ``num_stages`` shared-memory stages. ``head_dim`` and ``head_dim_v`` are tile
    widths: smaller head dims run inside them, TMA fills the rest with zeros. Of 16 exponentials,
    ``polynomial_exp2_of_16`` are computed on the FMA pipes rather than by the exponential unit. ``cluster_size`` CTAs
    work on neighbouring query blocks, and load each key block once for all of them.
    """

    FAMILY = "fwd"

    dtype: Dtype
    head_dim: int
    head_dim_v: int
    mask: Mask
    seq_layout: SeqLayout
    score: Score
    block_m: int
    block_n: int
    num_stages: int = 2
    schedule: Schedule = Schedule.BOTH
    rescale: Rescale = Rescale.EAGER
    output_buffer: OutputBuffer = OutputBuffer.OWN
    num_q_stages: int = 2
    polynomial_exp2_of_16: int = 0
    cluster_size: int = 1

    # -- derived; the C++ twins are in csrc/kernels/core/traits.cuh ------------------------------------

    @property
    def num_consumer_warpgroups(self) -> int:
        return self.block_m // WARPGROUP_ROWS

    @property
    def num_threads(self) -> int:
        """Consumers plus one producer warpgroup."""
        return WARPGROUP_THREADS * (self.num_consumer_warpgroups + 1)

    @property
    def producer_registers(self) -> int:
        return self._register_split[0]

    @property
    def consumer_registers(self) -> int:
        return self._register_split[1]

    @property
    def _register_split(self) -> tuple[int, int]:
        """Of a producer and a consumer thread. A producer that shares its copies with a cluster needs more."""
        if self.num_consumer_warpgroups == 2 and self.cluster_size > 1:
            return 40, 232
        return PRODUCER_REGISTERS[self.num_consumer_warpgroups], CONSUMER_REGISTERS[self.num_consumer_warpgroups]

    @property
    def swizzle_bytes(self) -> int:
        """Width of one shared-memory column chunk of q and k: 128 bytes, or 64 where head_dim is no multiple of 64."""
        return column_chunk_bytes(self.head_dim, self.dtype)

    @property
    def swizzle_bytes_v(self) -> int:
        """The same for v and out."""
        return column_chunk_bytes(self.head_dim_v, self.dtype)

    @property
    def _column_chunks(self) -> tuple[int, int]:
        """Column chunks of a block of keys, and of one of values."""
        num_bytes = self.dtype.num_bytes
        return self.head_dim * num_bytes // self.swizzle_bytes, self.head_dim_v * num_bytes // self.swizzle_bytes_v

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of one CTA: q, k and v stages, the output tile, control words."""
        elements = self.num_q_stages * self.block_m * self.head_dim
        elements += self.num_stages * self.block_n * (self.head_dim + self.head_dim_v)
        if self.output_buffer is OutputBuffer.OWN:
            elements += self.block_m * self.head_dim_v
        return elements * self.dtype.num_bytes + CONTROL_SMEM_BYTES

    @property
    def half_keys(self) -> int:
        """Keys of a tile's first block that a warpgroup takes where its rows see no more: half, in whole products."""
        return -(-self.block_n // 2 // MMA_DEPTH) * MMA_DEPTH

    @property
    def promoted_floats(self) -> int:
        """Floats of scratch that a CTA needs for sequences of more than PROMOTION_KEYS keys: the output tile, and two
        rows' softmax references for each consumer thread."""
        return self.block_m * self.head_dim_v + 2 * WARPGROUP_THREADS * self.num_consumer_warpgroups

    @property
    def fragment_registers(self) -> int:
        """Registers per consumer thread for S (fp32), P (16 bit, packed) and O (fp32).

        With PING_PONG S and P take turns, too, at the same registers.
        """
        scores, probabilities = self.block_n // 2, self.block_n // 4
        together = scores if self.schedule is Schedule.PING_PONG else scores + probabilities
        return together + self.head_dim_v // 2

    @property
    def register_margin(self) -> int:
        """Registers per consumer thread beside the fragments.

        Where S and P share theirs ptxas needs some in which to bring P to its place, and for the branches of LAZY and
        ON_OVERFLOW. How many was found by compiling: with fewer kernels spill, or their products are serialised.
        """
        if self.schedule is not Schedule.PING_PONG:
            return FRAGMENT_REGISTER_MARGIN
        others = 16 if self.num_consumer_warpgroups < 4 else 24
        return others + self.block_n // 8 + (0 if self.rescale is Rescale.EAGER else 2)

    @property
    def name(self) -> str:
        """A readable name, unique per configuration; also the kernel's symbol."""
        parts = [
            self.FAMILY,
            self.dtype.slug,
            head_dims_slug(self.head_dim, self.head_dim_v),
            self.mask.slug,
            self.seq_layout.slug,
            self.score.slug,
            f"m{self.block_m}n{self.block_n}s{self.num_stages}",
            self.schedule.slug,
            self.rescale.slug,
            f"o_{self.output_buffer.slug}",
            f"q{self.num_q_stages}",
            f"p{self.polynomial_exp2_of_16}",
            f"c{self.cluster_size}",
        ]
        return "_".join(parts)

    def validate(self) -> None:
        """Raise `ConfigError` naming the field, its value and the rule, if this kernel cannot be built."""
        rules = [
            *_head_dim_rules(self.head_dim, self.head_dim_v),
            (self.block_m in (64, 128, 192, 256), "block_m", "64, 128, 192 or 256 (one to four consumer warpgroups)"),
            (16 <= self.block_n <= 256 and self.block_n % 16 == 0, "block_n", "a multiple of 16 in [16, 256]"),
            (2 <= self.num_stages <= 8, "num_stages", "in [2, 8]"),
            (
                self.schedule is Schedule.INTRA_WARPGROUP or self.num_consumer_warpgroups >= 2,
                "schedule",
                "INTRA_WARPGROUP when block_m is 64: turns need two warpgroups",
            ),
            (
                self.output_buffer is not OutputBuffer.WITH_Q or self.head_dim_v <= self.head_dim,
                "output_buffer",
                "OWN when head_dim_v exceeds head_dim: the output tile does not fit in q's memory",
            ),
            (0 <= self.polynomial_exp2_of_16 <= 8, "polynomial_exp2_of_16", "in [0, 8]"),
            (self.num_q_stages in (1, 2), "num_q_stages", "1 or 2"),
            (self.cluster_size in (1, 2), "cluster_size", "1 or 2"),
            (
                self.cluster_size == 1 or self.mask is Mask.FULL,
                "cluster_size",
                "1 when mask is not FULL: neighbouring query blocks see other keys",
            ),
            (
                self.cluster_size == 1 or min(self._column_chunks) >= 2,
                "cluster_size",
                "1 when k or v is one column chunk: each CTA of a cluster loads its share of the chunks",
            ),
            (
                self.num_q_stages == 1 or self.output_buffer is not OutputBuffer.WITH_Q,
                "num_q_stages",
                "1 when output_buffer is WITH_Q: no second q is loaded before the output is stored",
            ),
        ]
        self.check_rules(rules)
        if self.smem_bytes > MAX_SMEM_BYTES:
            raise ConfigError(
                f"shared memory: {self.smem_bytes} bytes required by {self.name}, {MAX_SMEM_BYTES} supported; "
                "reduce block_n, num_stages or block_m, or set output_buffer=WITH_Q"
            )
        needed = self.fragment_registers + self.register_margin
        if needed > self.consumer_registers:
            raise ConfigError(
                f"registers: {needed} per consumer thread required by {self.name}, "
                f"{self.consumer_registers} supported with {self.num_consumer_warpgroups} warpgroups; reduce block_n"
            )
