"""Configurations of the backward kernels: what is fixed when one is compiled. See `config` for the conventions."""

from __future__ import annotations

import dataclasses

from .config import Dtype, KernelConfig, KernelEnum, Mask, Score, SeqLayout, head_dim_rules, head_dims_slug


class Accumulation(KernelEnum):
    """In which order the blocks that share a gradient add their parts in fp32.

    UNORDERED: as they come, so that the last bits differ from run to run. ORDERED: always the same way, so that
    gradients are bitwise equal.
    """

    UNORDERED = "kUnordered"
    ORDERED = "kOrdered"


@dataclasses.dataclass(frozen=True)
class BackwardConfig(KernelConfig):
    """One backward kernel.

    Shapes: a CTA holds ``block_n`` keys with their values and streams the query blocks of ``block_m`` rows that see
    them. ``head_dim`` and ``head_dim_v`` are tile widths, as in `config.ForwardConfig`.
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
            self.accumulation.slug,
            f"m{self.block_m}n{self.block_n}",
        ]
        return "_".join(parts)

    def validate(self) -> None:
        """Raise `ConfigError` naming the field, its value and the rule, if this kernel cannot be built."""
        rules = [
            *head_dim_rules(self.head_dim, self.head_dim_v),
            (16 <= self.block_m <= 128 and self.block_m % 16 == 0, "block_m", "a multiple of 16 in [16, 128]"),
            (16 <= self.block_n <= 128 and self.block_n % 16 == 0, "block_n", "a multiple of 16 in [16, 128]"),
        ]
        self.check_rules(rules)
