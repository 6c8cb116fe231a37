"""`Call`: a case with its tensors, so that one test repeats or captures a forward pass as well as both passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .cases import Case, GradientCase
from .gradients import Incoming, check_gradients, differentiate, make_incoming
from .harness import Tensors, check, make_tensors, run

Results = tuple[torch.Tensor, ...]


@dataclasses.dataclass
class Call:
    """A forward pass, whose results are (out, lse), or of a `GradientCase` both passes: (dq, dk, dv)."""

    case: Case
    tensors: Tensors
    incoming: Incoming | None

    def run(self) -> Results:
        if self.incoming is None:
            return run(self.case, self.tensors)
        return differentiate(self.case, self.tensors, self.incoming)

    def check(self, results: Results) -> None:
        if self.incoming is None:
            check(self.case, self.tensors, *results)
        else:
            check_gradients(self.case, self.tensors, self.incoming, results)

    @property
    def adds_in_any_order(self) -> bool:
        """Whether the first result, dq, may differ in its last bits from run to run; the others have one writer."""
        return isinstance(self.case, GradientCase) and not self.case.deterministic

    def inputs(self) -> list[torch.Tensor]:
        """What `run` reads."""
        parts = [self.tensors] if self.incoming is None else [self.tensors, self.incoming]
        values = [getattr(part, field.name) for part in parts for field in dataclasses.fields(part)]
        return [value for value in values if value is not None]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor], case: Case) -> Call:
        """The call of `case` whose inputs are those of this one, each changed."""
        parts = [None if part is None else _map(change, part) for part in (self.tensors, self.incoming)]
        return Call(case, *parts)


def _map(change: Callable[[torch.Tensor], torch.Tensor], part: Tensors | Incoming) -> Tensors | Incoming:
    values = [getattr(part, field.name) for field in dataclasses.fields(part)]
    return type(part)(*(None if value is None else change(value) for value in values))


def make_call(case: Case, device: str | torch.device = "cuda") -> Call:
    """Random inputs; what belongs to no sequence is poisoned."""
    tensors = make_tensors(case, device)
    return Call(case, tensors, make_incoming(case, tensors) if isinstance(case, GradientCase) else None)
