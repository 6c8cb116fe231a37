"""Print the names of all kernels that the GPU tests launch, one per line: what to build before the tests run.

    python -m tests.gpu.kernel_manifest > kernels.txt

The names come from the tests themselves: every `Case` among a collected test's parameters is a call it makes. Those of
`first_run` are among them.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
from collections.abc import Iterable, Iterator

import pytest

from .cases import Case
from .first_run import STEPS


def _cases_in(value: object) -> Iterator[Case]:
    if isinstance(value, Case):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _cases_in(element)


class _Collector:
    """A pytest plugin that keeps the cases of the collected tests."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
            self.cases.extend(_cases_in(list(parameters)))


def collect_cases() -> list[Case]:
    """Every call that the GPU tests and `first_run` make. Raises RuntimeError if collection fails."""
    collector = _Collector()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["--collect-only", "-q", str(pathlib.Path(__file__).parent)], plugins=[collector])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"the GPU tests cannot be collected:\n{output.getvalue()[-4000:]}")
    return [*collector.cases, *STEPS.values()]


def kernel_names(cases: Iterable[Case]) -> list[str]:
    """The distinct kernels behind these calls, sorted."""
    return sorted({config.name for case in cases for config in case.kernel_configs()})


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}\n" for name in kernel_names(collect_cases())))
