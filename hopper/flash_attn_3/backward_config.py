"""Configurations of the backward kernels: what is fixed when one is compiled. See `config` for the conventions."""

from __future__ import annotations

import dataclasses

from .config import (
    CONSUMER_REGISTERS,
    CONTROL_SMEM_BYTES,
    MAX_SMEM_BYTES,
    PRODUCER_REGISTERS,
    WARPGROUP_ROWS,
    WARPGROUP_THREADS,
    ConfigError,
    Dtype,
    KernelConfig,
    KernelEnum,
    Mask,
    Score,
    SeqLayout,
    column_chunk_bytes,
    head_dims_slug,
)

#: Tile widths of the backward pass, of q and k as of v; a head dim runs in the smallest that holds it.
BACKWARD_HEAD_DIM_TILES = (64, 128, 192, 256)
FP32_BYTES = 4
_SMEM_ALIGNMENT = 1024
#: Columns of dq that a warpgroup with all columns of dk and dv makes at once.
_MAX_DQ_SLICE_COLUMNS = 64


class Accumulation(KernelEnum):
    """In which order the blocks that share a gradient add their parts in fp32.

    UNORDERED: as they come, so that the last bits differ from run to run. ORDERED: always the same way, so that
    gradients are bitwise equal.
    """

    UNORDERED = "kUnordered"
    ORDERED = "kOrdered"


class WarpgroupSplit(KernelEnum):
    """How the two consumer warpgroups share a tile.

    KEYS: 64 keys each, with all columns of their dk and dv. COLUMNS: the same 64 keys, with half of the columns each,
    for head dims whose gradients do not fit into the registers of one warpgroup; with a ``block_n`` of 128 a cluster of
    two CTAs has 64 keys each.
    """

    KEYS = "kKeys"
    COLUMNS = "kColumns"


class DqPath(KernelEnum):
    """How a warpgroup's part of dq gets from registers to the sums in memory.

    STAGED: through shared memory, by the copy engine. DIRECT: by vector reductions from registers, where there is no
    room for that. Where there is, the planner always chooses STAGED; which one is faster has not been measured.
    """

    STAGED = "kStaged"
    DIRECT = "kDirect"


def max_columns_by_keys(score: Score) -> int:
    """Columns of dk and dv together that one warpgroup's registers hold beside a step's products of 64 queries.

    More of them fit beside one product than beside both; but a softcap needs both at once.
    """
    return 256 if score is Score.SOFTCAP else 320


@dataclasses.dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """The kernels of one backward pass: before, in and after its main loop.

    Shapes: a CTA of the main kernel, or a cluster of them, holds ``block_n`` keys with their values, shared by its
    consumer warpgroups as ``split`` says, and streams the query blocks of ``block_m`` rows that see them through
    ``num_stages`` shared-memory stages of q and ``num_dout_stages`` of dout. ``head_dim`` and ``head_dim_v`` are tile
    widths, as in `config.ForwardConfig`.
    """

    FAMILY = "bwd"

    dtype: Dtype
    head_dim: int
    head_dim_v: int
    mask: Mask
    seq_layout: SeqLayout
    score: Score
    accumulation: Accumulation
    split: WarpgroupSplit
    dq_path: DqPath
    block_m: int
    block_n: int
    num_stages: int = 2
    num_dout_stages: int = 2

    # -- derived; the C++ twins are in csrc/kernels/bwd/smem.cuh ---------------------------------------

    @property
    def num_consumer_warpgroups(self) -> int:
        return 2 if self.split is WarpgroupSplit.COLUMNS else self.block_n // WARPGROUP_ROWS

    @property
    def cluster_size(self) -> int:
        """CTAs that share a tile."""
        return self.block_n // WARPGROUP_ROWS if self.split is WarpgroupSplit.COLUMNS else 1

    @property
    def tile_keys(self) -> int:
        """Keys of the tile that one CTA has."""
        return self.block_n // self.cluster_size

    @property
    def num_threads(self) -> int:
        """Of the main kernel: consumers plus one producer warpgroup."""
        return WARPGROUP_THREADS * (self.num_consumer_warpgroups + 1)

    @property
    def producer_registers(self) -> int:
        return PRODUCER_REGISTERS[self.num_consumer_warpgroups]

    @property
    def consumer_registers(self) -> int:
        return CONSUMER_REGISTERS[self.num_consumer_warpgroups]

    @property
    def dk_columns(self) -> int:
        """Columns of dk that one warpgroup has."""
        return self.head_dim // 2 if self.split is WarpgroupSplit.COLUMNS else self.head_dim

    @property
    def dv_columns(self) -> int:
        """Columns of dv that one warpgroup has."""
        return self.head_dim_v // 2 if self.split is WarpgroupSplit.COLUMNS else self.head_dim_v

    @property
    def scores_together(self) -> bool:
        """Whether the accumulators leave a warpgroup registers for S, dP and dS at once."""
        return self.dk_columns + self.dv_columns <= 256

    @property
    def num_dq_parts(self) -> int:
        """Parts of a block of dq that are made and added by one warpgroup each."""
        return self.num_consumer_warpgroups * self.cluster_size

    @property
    def takes_turns(self) -> bool:
        """Whether additions to a part of dq wait for others: in order for all before, else for the first, a store."""
        return self.accumulation is Accumulation.ORDERED or self.dq_path is DqPath.STAGED

    @property
    def dq_columns(self) -> int:
        """Columns of a block of dq that one warpgroup makes: all, of its share of the rows, or its share, of all."""
        return self.head_dim if self.block_m > WARPGROUP_ROWS else self.head_dim // self.num_dq_parts

    @property
    def dq_slice_columns(self) -> int:
        """Columns of its part of dq that a warpgroup makes at once."""
        if self.split is WarpgroupSplit.COLUMNS:
            return self.dq_columns
        return min(self.dq_columns, _MAX_DQ_SLICE_COLUMNS)

    @property
    def dq_rest_columns(self) -> int:
        """Columns of the second slice, if there is one."""
        return self.dq_columns - self.dq_slice_columns

    @property
    def dq_staged_bytes(self) -> int:
        """Shared memory that dq passes through; none where it goes to memory from registers."""
        if self.dq_path is DqPath.DIRECT:
            return 0
        return self.num_consumer_warpgroups * WARPGROUP_ROWS * self.dq_slice_columns * FP32_BYTES

    @property
    def swizzle_bytes(self) -> int:
        """Width of one shared-memory column chunk of q and k; a warpgroup's columns of dk and dq are whole chunks."""
        return column_chunk_bytes(self.dq_columns, self.dtype)

    @property
    def swizzle_bytes_v(self) -> int:
        """The same for v and dout."""
        return column_chunk_bytes(self.dv_columns, self.dtype)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of the main kernel's CTA.

        k and v, q and dout stages, what warpgroups and CTAs exchange, dq, statistics, control.
        """
        keys, size = self.tile_keys, self.cluster_size
        elements = keys * (self.head_dim + self.head_dim_v)
        elements += self.block_m * (self.num_stages * self.head_dim + self.num_dout_stages * self.head_dim_v)
        elements += (1 + size * size) * keys * self.block_m  # two dS, or P and dS, or P and two dS of each CTA
        elements += keys * self.head_dim // 2 * (size - 1)  # columns of the other CTA's keys
        rest = (self.num_stages + self.num_dout_stages) * self.block_m * FP32_BYTES + CONTROL_SMEM_BYTES
        whole_rest = -(-rest // _SMEM_ALIGNMENT) * _SMEM_ALIGNMENT
        return elements * self.dtype.num_bytes + self.dq_staged_bytes + whole_rest

    # -- the kernels before and after the main one -----------------------------------------------------

    @property
    def preprocess_threads(self) -> int:
        return 2 * WARPGROUP_THREADS

    @property
    def postprocess_threads(self) -> int:
        """A warpgroup for each part of a block of dq."""
        return WARPGROUP_THREADS * self.num_dq_parts

    @property
    def preprocess_symbol(self) -> str:
        return f"{self.name}_preprocess"

    @property
    def postprocess_symbol(self) -> str:
        return f"{self.name}_postprocess"

    @property
    def name(self) -> str:
        """A readable name, unique per configuration; also the main kernel's symbol."""
        parts = [
            self.FAMILY,
            self.dtype.slug,
            head_dims_slug(self.head_dim, self.head_dim_v),
            self.mask.slug,
            self.seq_layout.slug,
            self.score.slug,
            self.accumulation.slug,
            self.split.slug,
            self.dq_path.slug,
            f"m{self.block_m}n{self.block_n}s{self.num_stages}d{self.num_dout_stages}",
        ]
        return "_".join(parts)

    def validate(self) -> None:
        """Raise `ConfigError` naming the field, its value and the rule, if these kernels cannot be built."""
        columns = self.head_dim + self.head_dim_v
        by_keys = self.split is WarpgroupSplit.KEYS
        softcap = self.score is Score.SOFTCAP
        rules = [
            (self.head_dim in BACKWARD_HEAD_DIM_TILES, "head_dim", f"one of {BACKWARD_HEAD_DIM_TILES}"),
            (self.head_dim_v in BACKWARD_HEAD_DIM_TILES, "head_dim_v", f"one of {BACKWARD_HEAD_DIM_TILES}"),
            (
                not by_keys or columns <= max_columns_by_keys(self.score),
                "split",
                "COLUMNS for head dims of more columns than the registers of one warpgroup hold",
            ),
            (by_keys or self.dq_path is DqPath.DIRECT, "dq_path", "DIRECT where warpgroups split columns"),
            (self.block_m in (64, 128), "block_m", "64 or 128"),
            (
                self.block_m == 64 or (by_keys and columns <= 128),
                "block_m",
                "64 for more columns than the registers hold beside 128 queries",
            ),
            (self.block_n == 128 or (self.block_n == 64 and not by_keys), "block_n", "128, or 64 with COLUMNS"),
            (
                by_keys or self.dq_columns % 32 == 0,
                "block_n",
                "such that each warpgroup makes whole chunks of 32 columns of dq",
            ),
            (
                self.block_m == 64 or not softcap,
                "block_m",
                "64 with a softcap: its slope takes the registers of the other rows",
            ),
            (2 <= self.num_stages <= 8, "num_stages", "in [2, 8]"),
            (1 <= self.num_dout_stages <= 8, "num_dout_stages", "in [1, 8]"),
        ]
        self.check_rules(rules)
        if self.smem_bytes > MAX_SMEM_BYTES:
            raise ConfigError(
                f"shared memory: {self.smem_bytes} bytes required by {self.name}, {MAX_SMEM_BYTES} supported; "
                "reduce num_stages or block_m"
            )
