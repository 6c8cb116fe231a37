"""The sweep from end to end, with a stub compiler and a stand-in for the GPU: what is built, measured and written."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from flash_attn_3 import heuristics, tile_table
from flash_attn_3.config import Mask, Score
from flash_attn_3.tile_table import TABLE_FILE, ForwardTile, TileChoice, TileKey
from flash_attn_3.tune import __main__ as command_line
from flash_attn_3.tune.build import build
from flash_attn_3.tune.job import Audit
from flash_attn_3.tune.process import Measured, Worker
from flash_attn_3.tune.shapes import length_classes
from flash_attn_3.tune.sweep import Effort, KeySweep

FAKE = Path(__file__).with_name("fake_tune_worker.py")
KEY = TileKey(128, 128, Mask.CAUSAL, Score.SCALED)
TABLE = tile_table.read(TABLE_FILE)
PRESENT = TABLE.choices[KEY][-1].tile
MB = 2**20
#: Keys of 80 rows spill, those of 64 do not compile, those of 144 spill with fp16; all others are fine.
STUB = """
spilled=0
if grep -q 'kBlockN = 144;' kernel.cu && grep -q 'kFp16' kernel.cu; then spilled=4; fi
if grep -q 'kBlockN = 80;' kernel.cu; then spilled=8; fi
if grep -q 'kBlockN = 64;' kernel.cu; then echo '/home/me/x.cuh(3): error: no such tile'; exit 1; fi
echo "    16 bytes stack frame, $spilled bytes spill stores, $spilled bytes spill loads"
echo 'ptxas info    : Used 168 registers'
cat kernel.cu > kernel.cubin
"""


@pytest.fixture
def tuner(workbench, tmp_path, monkeypatch):
    """`tuner(script, *arguments)` runs the command line, with `--exhaustive` unless it is to go `in_steps`; returns its
    exit status. Files: table.json, tune.json.
    """
    workbench.write_compiler(STUB)
    tile_table.write(TABLE, tmp_path / "table.json")

    def run(script: dict, *arguments: str, in_steps: bool = False) -> int:
        (tmp_path / "script.json").write_text(json.dumps(script))
        fake = (sys.executable, str(FAKE), str(tmp_path / "script.json"))
        monkeypatch.setattr(command_line, "Worker", functools.partial(Worker, command=fake))
        files = ["--table", str(tmp_path / "table.json"), "--report", str(tmp_path / "tune.json"), "--commit", "abc"]
        small = ["--head-dim", "128", "--mask", "causal", "--block-m", "128", "--num-stages", "2", "--jobs", "2"]
        fixed = [
            "--schedule",
            "both",
            "--rescale",
            "eager",
            "--output-buffer",
            "own",
            "--num-q-stages",
            "1",
            "--polynomial-exp2-of-16",
            "0",
        ]
        return command_line.main([*files, *small, *fixed, *([] if in_steps else ["--exhaustive"]), *arguments])

    run.table = lambda: tile_table.read(tmp_path / "table.json")
    run.report = lambda: json.loads((tmp_path / "tune.json").read_text())
    run.summary = lambda: (tmp_path / "tune.md").read_text()
    return run


def _blocks(choices: tuple[TileChoice, ...]) -> list[tuple[int | None, int]]:
    return [(choice.max_seqlen_q, choice.tile.block_n) for choice in choices]


def test_a_sweep_writes_table_report_and_summary(tuner, tmp_path):
    script = {"96": {"ms": 0.8}, "112": {"ms": 0.9}, "48": {"wrong": "relative error 0.5"}}
    assert tuner(script, "--block-n", "48", "64", "80", "96", "112") == 0

    table = tuner.table()
    assert _blocks(table.choices[KEY]) == [(None, 96)]
    assert {key: group for key, group in table.choices.items() if key != KEY} == {
        key: group for key, group in TABLE.choices.items() if key != KEY
    }
    origin = table.provenance[-1]
    assert (origin["commit"], origin["device"], origin["tuned"]) == ("abc", "fake GPU", [str(KEY)])
    assert origin["command"].startswith("python -m flash_attn_3.tune --head-dim 128 --mask causal --block-m 128")
    assert str(tmp_path) not in json.dumps(origin), "a published table names no private path"

    (row,) = tuner.report()["keys"]
    by_block = {candidate["block_n"]: candidate for candidate in row["candidates"]}
    assert set(by_block) == {48, 64, 80, 96, 112, PRESENT.block_n}
    assert by_block[80]["dropped"] == "spills 16 bytes" and by_block[80]["spilled_bytes"] == 16
    assert by_block[64]["dropped"] == "does not compile: error: no such tile"
    assert [shape["stage"] for shape in row["shapes"]].count("final") == 6
    (failure,) = row["shapes"][0]["failed"]
    assert failure["reason"] == "relative error 0.5"
    assert all(not shape["failed"] for shape in row["shapes"][1:]), "what was wrong once is not tried again"
    assert [choice["replaced"] for choice in row["choices"]] == [True] * 3
    assert {choice["ratio"] for choice in row["choices"]} == {0.8}

    summary = tuner.summary()
    assert len(re.findall(r"\| d128 causal scaled \|.*\| 0\.800 \| 0\.000 \| replaced", summary)) == 3
    assert "6 in all, 1 spilled, 1 did not compile, 1 wrong, hung or crashed" in summary


def test_classes_are_decided_by_their_own_lengths(tuner):
    assert tuner({"96": {"ms": 0.8}}, "--block-n", "96", "--lengths", "512", "1024", "--class-bounds", "1024") == 0
    assert _blocks(tuner.table().choices[KEY]) == [(1024, 96), (None, PRESENT.block_n)]
    assert [choice["lengths"] for choice in tuner.report()["keys"][0]["choices"]] == ["0 < S <= 1024"]


def test_a_crash_and_a_hang_leave_the_rest(tuner):
    script = {"96": {"hang_in": "round"}, "112": {"ms": 0.9}, "144": {"crash_in": "check"}}
    assert tuner(script, "--block-n", "96", "112", "144", "--lengths", "8192", "--timeout", "2") == 0
    assert _blocks(tuner.table().choices[KEY])[-1] == (None, 112)
    reasons = [failure["reason"] for failure in tuner.report()["keys"][0]["shapes"][0]["failed"]]
    assert sorted(reasons) == ["crashed with exit code 7", "hung: reported nothing for 2 s"]


def test_a_broken_value_is_left_out_and_the_rest_decided(tuner):
    """Of four tiles with it two are tried, on one length; the report says why the others are not."""
    script = {"96": {"ms": 0.9}, "rescale=lazy": {"crash_in": "check"}}
    axes = ["--block-n", "96", "112", "128", "144", "--rescale", "eager", "lazy"]
    assert tuner(script, *axes, "--lengths", "512", "8192", "--class-bounds") == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 96)]
    first, *others = tuner.report()["keys"][0]["shapes"]
    reasons = [failure["reason"] for failure in first["failed"]]
    assert reasons.count("crashed with exit code 7") == 2 and len(reasons) == 4
    assert not any(shape["failed"] for shape in others)
    left_out = "2 left out: 2 tiles with rescale=lazy hung or crashed, none was right"
    assert f"9 in all, 2 wrong, hung or crashed, {left_out};" in tuner.summary()


def test_a_kernel_that_fails_on_one_length_is_chosen_for_none(tuner):
    script = {"96": {"ms": 0.8, "wrong_from": 8192}, "112": {"ms": 0.9}}
    assert tuner(script, "--block-n", "96", "112") == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 112)]


def test_a_tile_whose_other_kernels_spill_is_not_chosen(tuner):
    assert tuner({"144": {"ms": 0.7}, "96": {"ms": 0.8}}, "--block-n", "96", "144", "--finalists", "1") == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 96)]
    (dropped,) = [c["dropped"] for c in tuner.report()["keys"][0]["candidates"] if "dropped" in c]
    assert re.match(r"spills 8 bytes, as fwd_fp16_d128_causal_\w+", dropped)


def test_a_tile_that_is_unfit_for_other_calls_is_not_chosen(tuner):
    script = {"96": {"ms": 0.7, "unfit": "NaN in a key: out is wrong"}, "112": {"ms": 0.8}}
    assert tuner(script, "--block-n", "96", "112") == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 112)]
    (dropped,) = [c["dropped"] for c in tuner.report()["keys"][0]["candidates"] if "dropped" in c]
    assert re.fullmatch(r"unfit: NaN in a key: out is wrong, as fwd_fp16_d128_causal_dense_\w+", dropped)
    assert "1 unfit for other calls" in tuner.summary()


def test_an_audit_has_all_kernels_that_would_serve(tuner):
    """Those of one warpgroup, too."""
    script = {"112": {"ms": 0.8}, "block_m=64": {"crash_in": "audit"}}
    assert tuner(script, "--block-n", "112", "--lengths", "8192") == 0
    assert tuner.table().choices == TABLE.choices
    (dropped,) = [c["dropped"] for c in tuner.report()["keys"][0]["candidates"] if "dropped" in c]
    assert dropped.startswith("unfit: crashed with exit code 7, as fwd_fp16_d128_causal_dense_scaled_m64n112")


STEP_AXES = ["--block-n", "96", "112", "128", "--rescale", "eager", "lazy", "on_overflow", "--num-q-stages", "1", "2"]


def test_a_sweep_goes_on_from_the_fastest_until_it_stays(tuner):
    assert tuner({"96": {"ms": 0.8}}, *STEP_AXES, "--lengths", "512", "8192", "--class-bounds", in_steps=True) == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 96)]
    (row,) = tuner.report()["keys"]
    tiles = [(c["block_n"], c["rescale"], c["num_q_stages"]) for c in row["candidates"]]
    first = [(128, "eager", 2), (96, "eager", 2), (112, "eager", 2)]
    first += [(128, "lazy", 2), (128, "on_overflow", 2), (128, "eager", 1)]
    assert tiles == [*first, (96, "lazy", 2), (96, "on_overflow", 2), (96, "eager", 1)]
    heats = [shape for shape in row["shapes"] if shape["stage"] == "heat"]
    measured = [{time["candidate"] for time in shape["times"]} for shape in heats]
    assert measured == [set(range(6))] * 2 + [{0, 1, 2, 6, 7, 8}] * 2, "leaders stay, what is new comes, once a length"


@pytest.mark.parametrize(("steps", "num_tiles"), [("0", 6), ("1", 9)])
def test_steps_are_limited(tuner, steps, num_tiles):
    assert tuner({"96": {"ms": 0.8}}, *STEP_AXES, "--lengths", "8192", "--steps", steps, in_steps=True) == 0
    assert len(tuner.report()["keys"][0]["candidates"]) == num_tiles


def test_steps_take_what_was_compiled_where_nothing_can_be(tuner, tmp_path, monkeypatch):
    folder = str(tmp_path / "kernels")
    assert tuner({}, *STEP_AXES, "--compile-only", "--kernels", folder, in_steps=True) == 0
    monkeypatch.setenv("FLASH_ATTN_3_JIT", "0")
    assert tuner({"96": {"ms": 0.8}}, *STEP_AXES, "--kernels", folder, in_steps=True) == 0
    assert _blocks(tuner.table().choices[KEY]) == [(None, 96)]
    dropped = [c.get("dropped", "") for c in tuner.report()["keys"][0]["candidates"]]
    assert [why.startswith("not built") for why in dropped] == [False] * 6 + [True] * 3


def test_nothing_better_keeps_the_table_but_says_that_it_was_measured(tuner):
    assert tuner({str(PRESENT.block_n): {"ms": 0.5}}, "--block-n", "96") == 0
    table = tuner.table()
    assert table.choices == TABLE.choices
    assert table.provenance[-1]["tuned"] == [str(KEY)]


def test_what_could_not_be_measured_is_a_status_and_no_origin(tuner):
    assert tuner({"crashes_before_any": True}, "--block-n", "96") == 1
    assert tuner.table() == TABLE
    assert "no kernel running" in tuner.report()["keys"][0]["shapes"][0]["abandoned"]
    assert tuner({}, "--block-n", "96", "--time-limit", "0") == 1


def test_a_gpu_that_cannot_be_used_is_an_error(tuner, capsys):
    assert tuner({"dies_at_start": True}, "--block-n", "96") == 2
    assert "does not start" in capsys.readouterr().err


def test_parts_of_a_sweep_add_up(tuner):
    assert tuner({"96": {"ms": 0.8}}, "--block-n", "96") == 0
    assert tuner({"96": {"ms": 0.8}}, "--block-n", "96", "--mask", "full") == 0
    assert [row["key"] for row in tuner.report()["keys"]] == ["d128 causal scaled", "d128 full scaled"]
    full = TileKey(128, 128, Mask.FULL, Score.SCALED)
    assert _blocks(tuner.table().choices[KEY]) == _blocks(tuner.table().choices[full]) == [(None, 96)]
    assert tuner({"112": {"ms": 0.7}, "96": {"ms": 0.8}}, "--block-n", "112") == 0
    assert [row["key"] for row in tuner.report()["keys"]] == ["d128 full scaled", "d128 causal scaled"]
    assert _blocks(tuner.table().choices[KEY]) == [(None, 112)]


def test_kernels_compiled_elsewhere_are_measured_without_a_compiler(tuner, workbench, tmp_path, monkeypatch):
    folder = str(tmp_path / "kernels")
    assert tuner({}, "--block-n", "96", "80", "--compile-only", "--kernels", folder) == 0
    assert not (tmp_path / "tune.json").exists() and not workbench.cache.exists()
    compiled = workbench.num_compilations()
    monkeypatch.setenv("FLASH_ATTN_3_JIT", "0")
    assert tuner({"96": {"ms": 0.8}}, "--block-n", "80", "96", "112", "--kernels", folder) == 0
    assert workbench.num_compilations() == compiled == 3, "the kernels of other dtypes stay unknown"
    assert _blocks(tuner.table().choices[KEY]) == [(None, 96)]
    dropped = {c["block_n"]: c.get("dropped") for c in tuner.report()["keys"][0]["candidates"]}
    assert dropped[80] == "spills 16 bytes"
    assert dropped[112] == "not built: not among the kernels, and nothing can be compiled here"


def test_without_the_present_kernel_nothing_is_decided(tuner, tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    assert tuner({}, "--block-n", "96", "--compile-only", "--kernels", str(folder)) == 0
    (present,) = folder.glob(f"{KEY.config(PRESENT).name}-*")
    shutil.rmtree(present)
    monkeypatch.setenv("FLASH_ATTN_3_JIT", "0")
    assert tuner({"96": {"ms": 0.8}}, "--block-n", "96", "--kernels", str(folder)) == 1
    assert tuner.table() == TABLE
    assert "the kernel of the present choice is missing" in tuner.summary()


# -- what is measured ------------------------------------------------------------------------------------------------


class Recorder:
    """A measurer for which every launch is the faster the more heads it works on together."""

    def __init__(self) -> None:
        self.jobs = []

    def measure(self, job, suspects):
        if isinstance(job, Audit):
            return Measured()
        self.jobs.append(job)
        problem = job.shape.problem(132)
        heads = {v: heuristics.plan_choice(problem, v.choice).heads_per_section for v in job.variants}
        return Measured({v: [1.0 / n] * len(job.turns) for v, n in heads.items()}, dict.fromkeys(heads, 0.003))


def _sweep(workbench, key: TileKey, tiles: list[ForwardTile], **changes) -> tuple[KeySweep, Recorder]:
    workbench.write_compiler(STUB)
    options = {
        "lengths": (1024, 16384), "classes": tuple(length_classes([])), "steps": 0, "finalists": 1,
        "l2_budgets": (1, 8 * MB, 512 * MB), "warm_up": 1, "heat_turns": (2,), "rounds": 2, "turns": 3,
        "drop_behind": 0.1, "deadline": float("inf"),
    }  # fmt: skip
    recorder = Recorder()
    compile_them = functools.partial(build, folder=None, jobs=2)
    return KeySweep(key, tiles, TABLE, compile_them, recorder, Effort(**(options | changes)), None), recorder


@pytest.mark.parametrize("mask", [Mask.CAUSAL, Mask.LOCAL])
def test_budgets_are_swept_in_the_final_under_a_mask(workbench, mask):
    key = dataclasses.replace(KEY, mask=mask)
    sweep, recorder = _sweep(workbench, key, [TABLE.choices[key][-1].tile, ForwardTile(128, 96)])
    (decision,) = [decision for _, decision in sweep.run().decisions]
    heats, finals = recorder.jobs[:2], recorder.jobs[2:]
    assert all({v.choice.l2_kv_bytes for v in job.variants} == {8 * MB} for job in heats)
    assert decision.choice.l2_kv_bytes == 512 * MB, "the most heads, which is what this recorder rewards"
    for job in finals:
        problem = job.shape.problem(132)
        plans = [heuristics.plan_choice(problem, v.choice) for v in job.variants]
        assert len({(plan.config, plan.heads_per_section) for plan in plans}) == len(plans), "no launch is timed twice"
        assert sum(v.is_present for v in job.variants) == 1
    for shape in sweep.result.shapes:
        if shape.stage == "final":
            assert {1, 8 * MB, 512 * MB} == {choice.l2_kv_bytes for choice in shape.times.rounds_ms}


def test_full_launches_keep_their_budget(workbench):
    key = TileKey(128, 128, Mask.FULL, Score.SCALED)
    sweep, recorder = _sweep(workbench, key, [TABLE.choices[key][-1].tile, ForwardTile(128, 96)])
    sweep.run()
    assert {v.choice.l2_kv_bytes for job in recorder.jobs for v in job.variants} == {8 * MB}


def test_a_present_tile_that_spills_is_still_the_yardstick(workbench):
    table = tile_table.TileTable((), {**TABLE.choices, KEY: (TileChoice(None, ForwardTile(128, 80), 8 * MB),)})
    sweep, recorder = _sweep(workbench, KEY, [ForwardTile(128, 80), ForwardTile(128, 96)])
    sweep._table = table
    sweep.run()
    for job in recorder.jobs:
        assert [v.choice.tile.block_n for v in job.variants if v.is_present] == [80]
