"""The tuner's measuring process: it may hang or crash, and the sweep goes on. Also what travels to it."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3.config import Dtype, Mask, Rescale, Score, SeqLayout
from flash_attn_3.tile_table import ForwardTile, TileChoice, TileKey
from flash_attn_3.tune import process
from flash_attn_3.tune.candidates import default_axes, feasible_tiles
from flash_attn_3.tune.job import Audit, Job, Variant, job_from_plain, job_to_plain
from flash_attn_3.tune.process import Measured, Worker, WorkerError
from flash_attn_3.tune.shapes import TuneShape
from flash_attn_3.tune.suspects import Suspects

FAKE = Path(__file__).with_name("fake_tune_worker.py")
KEY = TileKey(128, 128, Mask.CAUSAL, Score.SCALED)


def _variant(block_n: int, is_present: bool = False) -> Variant:
    return Variant(TileChoice(None, ForwardTile(128, block_n), 1), "source", "build", is_present)


PRESENT, GOOD, BAD = _variant(128, is_present=True), _variant(96), _variant(80)


def _job(*variants: Variant, rounds: int = 2) -> Job:
    return Job(TuneShape.of(KEY, 1024), variants, None, warm_up=1, turns=(1,) * rounds, drop_behind=0.15)


@pytest.fixture
def fake(tmp_path):
    """`fake(script)` is a worker that behaves by the script; `fake.starts()` counts how often it was started."""
    log = tmp_path / "log"
    workers = []

    def make(script: dict, timeout: float = 20.0) -> Worker:
        path = tmp_path / "script.json"
        path.write_text(json.dumps({**script, "log": str(log)}))
        workers.append(Worker(timeout, (sys.executable, str(FAKE), str(path))))
        return workers[-1]

    make.starts = lambda: len(log.read_text().splitlines())
    yield make
    for worker in workers:
        worker.__exit__()


def test_times_of_what_is_right(fake):
    with fake({"96": {"ms": 0.5}, "80": {"wrong": "relative error 1"}}) as worker:
        measured = worker.measure(_job(PRESENT, GOOD, BAD, rounds=3), Suspects())
        assert measured.rounds_ms == {PRESENT: [1.0] * 3, GOOD: [0.5] * 3}
        assert measured.errors == {PRESENT: 0.003, GOOD: 0.003}
        assert measured.failed == {BAD: "relative error 1"}
        assert measured.abandoned is None
        worker.measure(_job(PRESENT, GOOD), Suspects())
        assert (worker.device, worker.versions) == ("fake GPU", {"torch": "none"})
    assert fake.starts() == 1, "one process serves many shapes"


@pytest.mark.parametrize("stage", ["check", "round"])
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("crash_in", "crashed with exit code 7"),
        ("raise_in", "crashed: AcceleratorError: illegal address"),
        ("hang_in", "hung: reported nothing for 2 s"),
    ],
)
def test_a_variant_that_kills_the_process_costs_itself(fake, behaviour, reason, stage):
    worker = fake({"80": {behaviour: stage}}, timeout=2.0)
    measured = worker.measure(_job(PRESENT, BAD, GOOD), Suspects())
    assert measured.failed == {BAD: reason}
    assert measured.rounds_ms == {PRESENT: [1.0, 1.0], GOOD: [1.0, 1.0]}, "only rounds of the process that survived"
    assert fake.starts() == 2
    assert worker.measure(_job(PRESENT, GOOD), Suspects()).abandoned is None
    assert fake.starts() == 2, "the survivor goes on"


def test_the_present_choice_may_be_the_one_that_crashes(fake):
    measured = fake({"128": {"crash_in": "check"}}).measure(_job(PRESENT, GOOD), Suspects())
    assert measured.failed == {PRESENT: "crashed with exit code 7"}
    assert list(measured.rounds_ms) == [GOOD]


def test_nothing_is_measured_when_only_the_present_choice_is_left(fake):
    assert fake({}).measure(_job(PRESENT), Suspects()) == Measured()
    measured = fake({"80": {"crash_in": "check"}}).measure(_job(PRESENT, BAD), Suspects())
    assert (measured.rounds_ms, measured.failed) == ({}, {BAD: "crashed with exit code 7"})


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"unfit": "NaN in a key"}, "NaN in a key"),
        ({"crash_in": "audit"}, "crashed with exit code 7"),
        ({"hang_in": "audit"}, "hung: reported nothing for 2 s"),
    ],
)
def test_audits(fake, behaviour, reason):
    measured = fake({"80": behaviour}, timeout=2.0).measure(Audit(KEY, (BAD, GOOD), None), Suspects())
    assert measured == Measured(failed={BAD: reason})


def test_a_crash_with_no_kernel_running_gives_up_the_shape(fake):
    measured = fake({"crashes_before_any": True}).measure(_job(PRESENT, GOOD), Suspects())
    assert measured.abandoned == "crashed with exit code 3, with no kernel running"
    assert not measured.rounds_ms and not measured.failed


def test_a_shape_is_given_up_after_many_crashes(fake, monkeypatch):
    """None of which has a value in common with another one but those with which a kernel ran."""
    monkeypatch.setattr(process, "MOST_RESTARTS", 3)
    block_ns = range(16, 128, 16)
    script = {str(n): {"crash_in": "check"} for n in block_ns} | {"8": {"ms": 1.0}}
    measured = fake(script).measure(_job(_variant(8), *map(_variant, block_ns)), Suspects())
    assert len(measured.failed) == 4 == fake.starts()
    assert measured.abandoned == "4 kernels hung or crashed"


def _lazy(block_n: int) -> Variant:
    tile = ForwardTile(128, block_n, rescale=Rescale.LAZY)
    return Variant(TileChoice(None, tile, 1), "source", "build")


def test_a_value_that_kernels_die_of_costs_two_of_them(fake):
    """And not the shape: the others are measured. Nor does it cost another shape anything."""
    lazy = [_lazy(block_n) for block_n in range(144, 256, 16)]
    worker = fake({str(v.choice.tile.block_n): {"crash_in": "check"} for v in lazy})
    suspects = Suspects()
    measured = worker.measure(_job(PRESENT, *lazy, GOOD), suspects)
    assert measured.abandoned is None and set(measured.rounds_ms) == {PRESENT, GOOD}
    reasons = [measured.failed[variant] for variant in lazy]
    assert reasons[:2] == ["crashed with exit code 7"] * 2
    assert set(reasons[2:]) == {"left out: 2 tiles with rescale=lazy hung or crashed, none was right"}
    assert fake.starts() == 3
    assert set(worker.measure(_job(PRESENT, GOOD, *lazy[2:]), suspects).failed) == set(lazy[2:])
    assert fake.starts() == 3


def test_a_value_that_one_kernel_was_right_with_is_not_suspected(fake):
    lazy = [_lazy(block_n) for block_n in (144, 160, 176, 192)]
    measured = fake({"160": {"hang_in": "check"}, "192": {"crash_in": "check"}}, timeout=2.0).measure(
        _job(PRESENT, *lazy), Suspects()
    )
    assert set(measured.failed) == {lazy[1], lazy[3]} and set(measured.rounds_ms) == {PRESENT, lazy[0], lazy[2]}


def test_the_present_choice_is_never_left_out(fake):
    suspects = Suspects()
    for tile in (ForwardTile(128, 32), ForwardTile(128, 48)):
        suspects.died(tile)
    measured = fake({}).measure(_job(PRESENT, GOOD, _lazy(144)), suspects)
    assert set(measured.failed) == {GOOD, _lazy(144)}, "not the present one, which shares its rows with the dead"


def test_a_process_that_does_not_start(fake):
    with pytest.raises(WorkerError, match=r"does not start: crashed with exit code 5"):
        fake({"dies_at_start": True}).measure(_job(PRESENT, GOOD), Suspects())


def test_the_real_process_says_why_it_cannot_measure_here():
    """Without a GPU the worker ends with torch's own reason; with one, it starts."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(WorkerError, match="does not start: crashed: "), Worker(20.0) as worker:
        worker.measure(_job(PRESENT, GOOD), Suspects())


@given(st.data())
def test_jobs_travel_unchanged(data):
    key = TileKey(
        *data.draw(st.sampled_from([(64, 64), (192, 128)])), *map(data.draw, map(st.sampled_from, (Mask, Score)))
    )
    tiles = st.sampled_from(feasible_tiles(key, default_axes()))
    choices = st.builds(TileChoice, st.none() | st.integers(1, 2**20), tiles, st.integers(1, 2**40))
    kernels = st.sampled_from(Dtype), st.sampled_from(SeqLayout)
    variants = st.builds(Variant, choices, st.text(), st.text(), st.booleans(), *kernels)
    job = Job(
        shape=TuneShape.of(key, data.draw(st.integers(1, 2**17))),
        variants=tuple(data.draw(st.lists(variants, max_size=5))),
        kernels=data.draw(st.none() | st.text()),
        warm_up=data.draw(st.integers(0, 3)),
        turns=tuple(data.draw(st.lists(st.integers(1, 9)))),
        drop_behind=data.draw(st.floats(0, 1)),
    )
    audit = Audit(key, job.variants, job.kernels)
    for sent in (job, audit):
        assert job_from_plain(json.loads(json.dumps(job_to_plain(sent)))) == sent
