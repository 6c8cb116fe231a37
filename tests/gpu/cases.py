"""`Case`: one attention call, described without tensors, so that tests and the list of kernels they need share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch

from flash_attn_3.backward_config import Accumulation
from flash_attn_3.backward_plan import BackwardProblem, plan_backward
from flash_attn_3.config import Dtype, ForwardConfig, KernelConfig, Score, SeqLayout
from flash_attn_3.heuristics import forward_config
from flash_attn_3.problem import HOPPER_SMS, ForwardProblem, normalize_mask
from flash_attn_3.tile_table import ForwardTile
from flash_attn_3.tune.candidates import label

#: Multiprocessors that small calls are left with: so few that CTAs have several tiles.
FEW_SMS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. Lengths (rows): `seqlen_*` of a dense side; `lens_*` of a side given by cu_seqlens; `used_*` = seqused.

    `head_dim_v` 0 means `head_dim`. `spare_*` rows are stored after the last sequence of a cu_seqlens side.
    `nan_keys`: rows of k, counted through all sequences, that begin with NaN in the first head.
    """

    head_dim: int = 128
    head_dim_v: int = 0
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    seqlen_q: int = 256
    seqlen_k: int = 256
    heads_q: int = 4
    heads_kv: int = 2
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    softcap: float = 0.0
    softmax_scale: float | None = None
    lens_q: tuple[int, ...] | None = None
    lens_k: tuple[int, ...] | None = None
    used_q: tuple[int, ...] | None = None
    used_k: tuple[int, ...] | None = None
    spare_q: int = 0
    spare_k: int = 0
    nan_keys: tuple[int, ...] = ()
    seed: int = 0
    #: Whether all multiprocessors serve the call even if it is small, and its tiles have few rows then.
    all_sms: bool = False

    @property
    def dv(self) -> int:
        return self.head_dim_v or self.head_dim

    @property
    def num_sequences(self) -> int:
        """Sequences of the call, whichever way they are given."""
        lens = self.lens_q if self.lens_q is not None else self.lens_k
        return self.batch if lens is None else len(lens)

    @property
    def is_varlen(self) -> bool:
        return any(lens is not None for lens in (self.lens_q, self.lens_k, self.used_q, self.used_k))

    @property
    def max_seqlen_q(self) -> int:
        return self.seqlen_q if self.lens_q is None else max(self.lens_q, default=0)

    @property
    def max_seqlen_k(self) -> int:
        return self.seqlen_k if self.lens_k is None else max(self.lens_k, default=0)

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    def sm_margin(self, num_sms: int = HOPPER_SMS) -> int:
        """What leaves a small call so few of a GPU's multiprocessors that it is served like a large one."""
        sizes = (forward_config(self._problem(sms)).block_m for sms in (num_sms, FEW_SMS))
        return 0 if self.all_sms or num_sms <= FEW_SMS or len(set(sizes)) == 1 else num_sms - FEW_SMS

    def problem(self) -> ForwardProblem:
        """The planner's view of this call."""
        return self._problem(HOPPER_SMS - self.sm_margin())

    def _problem(self, num_sms: int) -> ForwardProblem:
        mask = normalize_mask(self.causal, self.window_size, self.attention_chunk, self.max_seqlen_q, self.max_seqlen_k)
        return ForwardProblem(
            dtype={torch.bfloat16: Dtype.BF16, torch.float16: Dtype.FP16}[self.dtype],
            batch=self.num_sequences,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.dv,
            mask=mask,
            score=Score.SOFTCAP if self.softcap else Score.SCALED,
            seq_layout=SeqLayout.VARLEN if self.is_varlen else SeqLayout.DENSE,
            num_sms=num_sms,
        )

    def kernel_config(self) -> ForwardConfig:
        """The kernel that serves this call."""
        return forward_config(self.problem())

    def kernel_configs(self) -> list[KernelConfig]:
        """All kernels that a test of this call needs."""
        return [self.kernel_config()]

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        """A short test id: only what differs from the defaults."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            words.append(f"{_SHORT_NAMES.get(field.name, field.name)}{_shown(value)}")
        return "-".join(words) or "default"


@dataclasses.dataclass(frozen=True)
class GradientCase(Case):
    """One call whose results are differentiated; ``with_dlse``: not out alone, but the log-sum-exp, too."""

    deterministic: bool = False
    with_dlse: bool = False

    def kernel_configs(self) -> list[KernelConfig]:
        accumulation = Accumulation.ORDERED if self.deterministic else Accumulation.UNORDERED
        return [self.kernel_config(), plan_backward(BackwardProblem(self.problem(), accumulation)).config]


_SHORT_NAMES = {
    "head_dim": "d",
    "head_dim_v": "dv",
    "dtype": "",
    "batch": "b",
    "seqlen_q": "sq",
    "seqlen_k": "sk",
    "heads_q": "hq",
    "heads_kv": "hk",
    "window_size": "window",
    "attention_chunk": "chunk",
    "softmax_scale": "scale",
    "lens_q": "lensq",
    "lens_k": "lensk",
    "used_q": "usedq",
    "used_k": "usedk",
    "spare_q": "spareq",
    "spare_k": "sparek",
    "nan_keys": "nank",
    "with_dlse": "dlse",
}


def _shown(value: object) -> str:
    if value is True:
        return ""
    if isinstance(value, torch.dtype):
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[value]
    if isinstance(value, ForwardTile):
        return label(value).replace(" ", "")
    if isinstance(value, tuple):
        shown = ",".join(map(str, value[:4]))
        return shown if len(value) <= 4 else f"{shown}..x{len(value)}"
    return str(value)


@dataclasses.dataclass(frozen=True)
class MaskOptions:
    """The mask arguments of a call, with a name for test ids."""

    name: str
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0

    @property
    def options(self) -> dict[str, object]:
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "attention_chunk": self.attention_chunk,
        }


FULL = MaskOptions("full")
CAUSAL = MaskOptions("causal", causal=True)
WINDOW = MaskOptions("window", window_size=(33, 15))
LEFT_WINDOW = MaskOptions("left_window", causal=True, window_size=(150, -1))
CHUNK = MaskOptions("chunk", causal=True, attention_chunk=100)

#: One mask for each kernel, and two more ways into the local one.
MASKS = (FULL, CAUSAL, WINDOW, LEFT_WINDOW, CHUNK)
#: One mask for each kernel.
KERNEL_MASKS = (FULL, CAUSAL, WINDOW)


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Run the test, whose parameter is `case`, for each of these."""
    return pytest.mark.parametrize("case", list(cases), ids=str)
