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

_FP32_BYTES = 4


class Accumulation(KernelEnum):
    """In which order the blocks that share a gradient add their parts in fp32.

    UNORDERED: as they come, so that the last bits differ from run to run. ORDERED: always the same way, so that
    gradients are bitwise equal.
    """

    UNORDERED = "kUnordered"
    ORDERED = "kOrdered"


@dataclasses.dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """The kernels of one backward pass: before, in and after its main loop.

    Shapes: a CTA of the main kernel holds ``block_n`` keys with their values (64 per consumer warpgroup) and streams
    the query blocks of ``block_m`` rows that see them through ``num_stages`` shared-memory stages. ``head_dim`` and
    ``head_dim_v`` are tile widths, as in `config.ForwardConfig`.
    """

    FAMILY = "bwd"

    dtype: Dtype
    head_dim: int
    head_dim_v: int
    mask: Mask
    seq_layout: SeqLayout
    score: Score
    accumulation: Accumulation
    block_m: int
    block_n: int
    num_stages: int = 2

    # -- derived; the C++ twins are in csrc/kernels/bwd/smem.cuh ---------------------------------------

    @property
    def num_consumer_warpgroups(self) -> int:
        return self.block_n // WARPGROUP_ROWS

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
    def dq_columns(self) -> int:
        """Columns of a block of dq that one warpgroup makes: all, of its share of the rows, or its share, of all."""
        return self.head_dim if self.block_m > WARPGROUP_ROWS else self.head_dim // self.num_consumer_warpgroups

    @property
    def swizzle_bytes(self) -> int:
        """Width of one shared-memory column chunk of q and k; a warpgroup's columns of dq are whole chunks of k."""
        return column_chunk_bytes(self.dq_columns, self.dtype)

    @property
    def swizzle_bytes_v(self) -> int:
        """The same for v and dout."""
        return column_chunk_bytes(self.head_dim_v, self.dtype)

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of the main kernel's CTA: k, v, q and dout stages, two dS, dq, statistics, control."""
        elements = self.block_n * (self.head_dim + self.head_dim_v)
        elements += self.num_stages * self.block_m * (self.head_dim + self.head_dim_v)
        elements += 2 * self.block_m * self.block_n
        floats = self.block_m * self.head_dim + 2 * self.num_stages * self.block_m
        return elements * self.dtype.num_bytes + floats * _FP32_BYTES + CONTROL_SMEM_BYTES

    # -- the kernels before and after the main one -----------------------------------------------------

    @property
    def preprocess_threads(self) -> int:
        return 2 * WARPGROUP_THREADS

    @property
    def postprocess_threads(self) -> int:
        """As many as the main kernel has consumers."""
        return WARPGROUP_THREADS * self.num_consumer_warpgroups

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
            f"m{self.block_m}n{self.block_n}s{self.num_stages}",
        ]
        return "_".join(parts)

    def validate(self) -> None:
        """Raise `ConfigError` naming the field, its value and the rule, if these kernels cannot be built."""
        rules = [
            (self.head_dim in (64, 128), "head_dim", "64 or 128"),
            (self.head_dim_v in (64, 128), "head_dim_v", "64 or 128"),
            (self.block_m in (64, 128), "block_m", "64 or 128"),
            (self.block_n == 128, "block_n", "128 (two consumer warpgroups)"),
            (
                self.block_m == 64 or self.score is Score.SCALED,
                "block_m",
                "64 with a softcap: its slope takes the registers of the other rows",
            ),
            (2 <= self.num_stages <= 8, "num_stages", "in [2, 8]"),
        ]
        self.check_rules(rules)
        if self.smem_bytes > MAX_SMEM_BYTES:
            raise ConfigError(
                f"shared memory: {self.smem_bytes} bytes required by {self.name}, {MAX_SMEM_BYTES} supported; "
                "reduce num_stages or block_m"
            )
