"""tests.gpu.first_run: a step that hangs or crashes costs that step alone."""

from __future__ import annotations

import sys

import pytest
from tests.gpu import first_run
from tests.gpu.cases import GradientCase

from flash_attn_3.backward_plan import backward_tile
from flash_attn_3.config import Score

#: Steps of a process that takes them as a file of outcomes says; "hang" and "crash" are what it does.
SCRIPT = """
import sys, time
outcomes = {outcomes!r}
for number in range(int(sys.argv[1]), len(outcomes)):
    print(f"begin {{number}}", flush=True)
    if outcomes[number] == "hang":
        time.sleep(60)
    if outcomes[number] == "crash":
        sys.exit(7)
    print(f"{{number}} {{outcomes[number]}}", flush=True)
    if outcomes[number].startswith("failed"):
        sys.exit(1)
"""


@pytest.mark.parametrize(
    ("outcomes", "found"),
    [
        (["", ""], ["", ""]),
        (["", "wrong: by 3", ""], ["", "wrong: by 3", ""]),
        (["failed: a fault", ""], ["failed: a fault", ""]),
        (["", "crash", "crash", ""], ["", "crashed with exit code 7", "crashed with exit code 7", ""]),
        (["hang", "", "hang"], ["hung: nothing for 3 s", "", "hung: nothing for 3 s"]),
    ],
    ids=str,
)
def test_steps(outcomes, found):
    command = (sys.executable, "-c", SCRIPT.format(outcomes=outcomes))
    assert list(first_run.take_steps(command, len(outcomes), 3.0)) == list(enumerate(found))


def test_a_process_that_prints_more(capsys):
    """Warnings of libraries, say; numbers alone do not count."""
    command = (sys.executable, "-c", "print('0'); print('1 0'); print('begin 0'); print('0 ')")
    assert list(first_run.take_steps(command, 1, 10.0)) == [(0, "")]


def test_every_way_of_the_backward_pass():
    cases = [case for case in first_run.STEPS.values() if isinstance(case, GradientCase)]
    ways = {(tile.split, tile.dq_path, tile.block_m, tile.block_n) for tile in map(_tile, cases)}
    assert len(ways) == 4  # (128, 128) and (192, 128) share one, but not how many products they have at once
    assert {case.deterministic for case in cases} == {False, True}


def _tile(case: GradientCase):
    return backward_tile(case.head_dim, case.dv, Score.SCALED)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(first_run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a Hopper GPU"):
        first_run.main([])
