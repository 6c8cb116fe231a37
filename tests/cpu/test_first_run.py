"""tests.gpu.first_run: a step that hangs or crashes costs that step alone; and the steps it has."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from tests.gpu import first_run, kernel_manifest
from tests.gpu.cases import Case, GradientCase
from tests.gpu.tiles import TileCase, cases_along_axes

from flash_attn_3.backward_plan import backward_tile
from flash_attn_3.config import Mask, Rescale, Score
from flash_attn_3.heuristics import tile_key
from flash_attn_3.tile_table import forward_tiles
from flash_attn_3.tune.candidates import default_axes

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


def test_every_call_by_every_value_of_every_axis():
    """Of tiles that can be built, and with no more than two fields beside the value that are not the table's."""
    for what, options in first_run.CALLS.items():
        steps = first_run.STEPS.items()
        cases = [case for name, case in steps if name.startswith("tile with") and name.endswith(f", {what}")]
        present = [forward_tiles().choices[tile_key(Case(128, **options).problem())][-1].tile]
        for name, values in default_axes().items():
            assert {getattr(tile, name) for tile in [case.tile for case in cases] + present} == set(values), name
        for case in cases:
            assert isinstance(case, TileCase)
            case.kernel_config().validate()
            tables = forward_tiles().choices[tile_key(case.problem())][-1].tile
            assert 1 <= sum(x != y for x, y in zip(*map(dataclasses.astuple, (case.tile, tables)), strict=True)) <= 3
            assert case.causal or "causal" not in options or case.tile.cluster_size == 2


def test_the_manifest_has_its_kernels(monkeypatch):
    monkeypatch.setattr(kernel_manifest.pytest, "main", lambda *arguments, **options: pytest.ExitCode.OK)
    names = kernel_manifest.kernel_names(kernel_manifest.collect_cases())
    assert {config.name for case in first_run.STEPS.values() for config in case.kernel_configs()} == set(names)


def test_a_case_along_an_axis_is_the_call_by_another_tile():
    call = Case(64, lens_q=(3, 5), lens_k=(7, 9), window_size=(2, 1), softcap=1.0, seed=5)
    case = cases_along_axes(call)["rescale=on_overflow"]
    config, expected = case.kernel_config(), call.kernel_config()
    assert config.rescale is Rescale.ON_OVERFLOW and config.mask is Mask.LOCAL
    assert (config.dtype, config.score, config.seq_layout) == (expected.dtype, expected.score, expected.seq_layout)
    assert {field.name: getattr(case, field.name) for field in dataclasses.fields(Case)} == dataclasses.asdict(call)


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(first_run.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a Hopper GPU"):
        first_run.main([])
