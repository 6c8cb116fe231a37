"""The suites bwd and fwd+bwd: what they compute, check and demand, on the CPU."""

import dataclasses
import json

import pytest
import torch
from benchmarks import __main__ as command_line
from benchmarks import backward, bars, comparison, fa3, peers, report
from benchmarks.backward import Backward, ForwardBackward
from benchmarks.shapes import SETS, AttentionShape

from flash_attn_3 import backward_launch, compiler, runtime
from flash_attn_3.timing import Timing
from gradient_reference import gradients
from reference import AttentionOptions

SUITES = [Backward(), ForwardBackward()]
SMALL = [
    AttentionShape(16, False, 2, 37, 4, 2),
    AttentionShape(16, True, 2, 37, 4, 2),
    AttentionShape(24, True, 1, 33, 2, 1, head_dim_v=16),
    AttentionShape(8, False, 1, 40, 4, 2, window=(7, 0)),
    AttentionShape(8, True, 3, 25, 4, 2, lengths=(1, 25, 9)),
]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(comparison, "DEVICE", "cpu")


# -- shapes and estimates --------------------------------------------------------------------------------------------


def test_the_peers_set_was_measured_with_flash_attention_3():
    assert sum(map(len, fa3._BACKWARD.values())) == len(SETS["peers"]) == 39
    assert all(fa3.backward_ratio(shape) is not None for shape in SETS["peers"])
    assert all(fa3.backward_ratio(shape) is None for shape in SETS["b4"] + SETS["c4"])


def test_estimates_of_flash_attention_3():
    """2 x 8192, 16 heads of 128, causal: forward 625 and 543 TFLOP/s, backward 556 and 507."""
    shape = AttentionShape(128, True, 2, 8192, 16, 16)
    assert fa3.forward_ratio(shape) == 625 / 543
    assert fa3.backward_ratio(shape) == 556 / 507
    fa3_time, cudnn_time = 1 / 625 + 2.5 / 556, 1 / 543 + 2.5 / 507
    assert fa3.both_ratio(shape) == pytest.approx(cudnn_time / fa3_time)


def test_flops_as_everybody_counts_them():
    assert (Backward.flops, ForwardBackward.flops) == (2.5, 3.5)


# -- the check of a result -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_scores", [64, 2**26])
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_the_reference_in_blocks_against_the_whole(shape, max_scores, monkeypatch):
    monkeypatch.setattr(backward, "MAX_SCORES", max_scores)
    what = Backward()
    inputs = what.inputs(shape, torch.bfloat16)
    whole = [torch.zeros_like(x, dtype=torch.float64) for x in inputs[:3]]
    for sequence in range(shape.batch):
        rows = [comparison.sequence_rows(x.detach(), shape, sequence)[None] for x in inputs]
        found = gradients(*rows, None, AttentionOptions(causal=shape.causal, window_size=shape.window))
        for total, gradient in zip(whole, found, strict=True):
            comparison.sequence_rows(total, shape, sequence)[:] = gradient[0]
    expected = what.checked(whole, shape)
    for actual, exact in zip(what.reference(inputs, shape), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


def test_windows_that_reach_beyond_the_diagonal_are_refused():
    shape = AttentionShape(8, False, 1, 40, 4, 2, window=(7, 3))
    with pytest.raises(ValueError, match="nothing to the right of the diagonal"):
        Backward().reference(Backward().inputs(shape, torch.bfloat16), shape)


@pytest.mark.parametrize("what", SUITES, ids=lambda what: what.suite)
@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_right_gradients_pass_and_another_masks_do_not(what, shape):
    torch.manual_seed(0)
    inputs = what.inputs(shape, torch.bfloat16)
    expected = what.reference(inputs, shape)
    for version in what.own:
        call = what.call(version, inputs, shape)
        results = [call(), call()]  # timed calls are repeated
        assert all(map(torch.equal, *results))
        found = comparison.errors(what.checked(results[0], shape), expected)
        assert not found["wrong"] and found["relative_error"] > 1e-4
    other = dataclasses.replace(shape, causal=not shape.causal, window=(-1, -1))
    results = what.call(peers.OURS, inputs, other)()
    assert comparison.errors(what.checked(results, shape), expected)["wrong"]


@pytest.mark.parametrize("which", range(3))
def test_each_of_the_gradients_counts(which):
    shape = SMALL[1]
    what = Backward()
    inputs = what.inputs(shape, torch.bfloat16)
    expected = what.reference(inputs, shape)
    results = list(expected)
    assert not comparison.errors(tuple(results), expected)["wrong"]
    for spoiled in (expected[which] * 1.02, expected[which] * float("nan")):
        results[which] = spoiled
        assert comparison.errors(tuple(results), expected)["wrong"]


@pytest.mark.parametrize("what", SUITES, ids=lambda what: what.suite)
def test_a_row_of_a_result(what, monkeypatch):
    """Ours takes 3 ms, its deterministic mode 4, flash attention 6."""
    shape = AttentionShape(64, True, 1, 64, 2, 2)
    times = {peers.OURS: 3.0, peers.DETERMINISTIC: 4.0, "flash": 6.0}

    def time_in_turns(calls, rounds):
        assert set(calls) == set(times)
        for call in calls.values():
            assert [x.shape for x in call()] == list(shape.input_shapes)
        return {name: Timing((times[name],) * rounds) for name in calls}

    monkeypatch.setattr(comparison, "time_in_turns", time_in_turns)
    row = comparison.measure_shape(what, shape, ["flash", "fa4"], torch.bfloat16, rounds=2)
    for name in times:
        assert not row["results"][name]["wrong"], name
        assert row["results"][name]["tflops"] == pytest.approx(what.flops * shape.flops / times[name] / 1e9)
    assert "unavailable" in row["results"]["fa4"]
    assert row["results"][peers.DETERMINISTIC]["repeats"] is True
    assert row["ratios"] == pytest.approx({peers.DETERMINISTIC: 4 / 3, "flash": 2.0})
    json.dumps(row)


def test_a_shape_without_kernels_is_a_failure_not_the_end_of_the_run(monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("no backward pass for this head dim")

    monkeypatch.setitem(peers.BUILDERS, peers.OURS, refuse)
    monkeypatch.setitem(peers.BUILDERS, peers.DETERMINISTIC, refuse)
    monkeypatch.setattr(
        comparison, "time_in_turns", lambda calls, rounds: {name: Timing((2.0,) * rounds) for name in calls}
    )
    row = comparison.measure_shape(Backward(), AttentionShape(8, True, 1, 16, 2, 2), ["flash"], torch.bfloat16, 1)
    assert row["ratios"] == {} and "front" not in row and row["results"]["flash"]["ms"] == 2.0
    verdicts = bars.judge("bwd", [row])
    assert [(verdict.bar, verdict.holds) for verdict in verdicts] == [("missing", False)] * 2
    assert "this package, deterministic: NotImplementedError: no backward pass" in verdicts[1].text
    table = report._pass_table({"rows": [row], "settings": {"peers": ["flash"]}})
    assert "| d8 causal 1x16 2/2 | n/a | n/a | 0 ± 0 |" in table


def test_errors_of_our_own_end_the_run(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("a fault")

    monkeypatch.setitem(peers.BUILDERS, peers.OURS, fail)
    with pytest.raises(RuntimeError, match="a fault"):
        comparison.measure_shape(Backward(), SMALL[0], [], torch.bfloat16, 1)


# -- scratch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", peers.OWN)
@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape(64, True, 2, 200, 4, 2),
        AttentionShape(128, False, 2, 200, 4, 4),
        AttentionShape(64, True, 3, 25, 4, 2, lengths=(1, 25, 9)),
    ],
    ids=lambda shape: shape.name,
)
def test_scratch_is_what_the_kernels_are_given(shape, version, monkeypatch):
    given = []
    monkeypatch.setattr(compiler, "get_kernel", lambda config: None)
    monkeypatch.setattr(runtime, "load_backward_kernels", lambda kernels: None)
    monkeypatch.setattr(runtime, "backward_launcher", lambda kernels, **sizes: lambda *tensors: given.append(tensors))
    monkeypatch.setattr(backward_launch, "_cpu_backward", backward_launch.cuda_backward)
    what = Backward()
    what.call(version, what.inputs(shape, torch.bfloat16), shape)()
    scratch = (given[0][7], *given[0][-2:])  # statistics, dq, parts of dk and dv
    assert backward.scratch_bytes(shape, torch.bfloat16, version) == sum(x.nbytes for x in scratch if x is not None)


def test_scratch_in_full_size():
    """Sixteen heads of 16384 rows: a row has 128 floats of dq and two statistics, a block of 64 two turns."""
    shape = AttentionShape(128, True, 1, 16384, 16, 16)
    assert backward.scratch_bytes(shape, torch.bfloat16, peers.OURS) == 16384 * 16 * (128 + 2 + 2 / 64) * 4


# -- bars ------------------------------------------------------------------------------------------------------------


def row(shape: AttentionShape, front: float = 1.2, deterministic: float = 0.95, **ratios: float) -> dict:
    """A result in which this package has these speeds in units of its peers', and its other mode in units of it."""
    right = {"wrong": False, "relative_error": 3e-3, "repeats": True}
    ratios = {"cudnn": 1.2, "fa4": 1.2, **ratios}
    return {
        "name": shape.name,
        "results": {name: dict(right) for name in (*peers.OWN, "cudnn", "fa4")},
        "ratios": {**ratios, peers.DETERMINISTIC: 1 / deterministic},
        "front": {"name": "fa3", "ratio": front},
    }


def failed(rows: list[dict]) -> list[str]:
    return [verdict.bar for verdict in bars.judge("bwd", rows) if not verdict.holds]


def test_all_bars_hold_at_good_speeds():
    rows = [row(shape) for shape in SETS["peers"] + SETS["c4"]]
    verdicts = bars.judge("bwd", rows)
    assert [verdict.bar for verdict in verdicts] == ["C1", "C1", "C2", "C3", "C4", "C4", "C4", "C4"]
    assert all(verdict.holds for verdict in verdicts)
    assert bars.judge("fwd+bwd", rows) == []


def test_means_over_the_front():
    shapes = SETS["peers"]
    assert failed([row(shape, front=1.151) for shape in shapes]) == []
    assert failed([row(shape, front=1.149) for shape in shapes]) == ["C2"]
    assert failed([row(shape, front=1.2 if shape.head_dim == 256 else 0.98) for shape in shapes]) == ["C1"]
    assert failed([row(shape, front=1.04) for shape in shapes]) == ["C1", "C2"]
    one_slow = [row(shape, front=0.96 if shape.seqlen == 32768 else 1.2) for shape in shapes]
    (verdict,) = [verdict for verdict in bars.judge("bwd", one_slow) if not verdict.holds]
    assert verdict.bar == "C1" and verdict.text.endswith("d128 causal 1x32768 32/8, x front: 0.960, at least 0.97")


def test_the_deterministic_mode():
    shapes = SETS["peers"]
    assert failed([row(shape, deterministic=0.921) for shape in shapes]) == []
    assert failed([row(shape, deterministic=0.919) for shape in shapes]) == ["C3"]
    short_is_free = [row(shape, deterministic=0.5 if shape.seqlen < 2048 else 0.93) for shape in shapes]
    assert failed(short_is_free) == []
    (verdict,) = [verdict for verdict in bars.judge("bwd", short_is_free) if verdict.bar == "C3"]
    assert verdict.text == "deterministic, 27 shapes with S >= 2048, geometric mean x default: 0.930, at least 0.92"


def test_a_mean_is_judged_only_over_all_of_its_shapes_and_peers():
    rows = [row(shape, front=0.5, deterministic=0.5) for shape in SETS["peers"]]
    assert failed(rows) == ["C1", "C1", "C2", "C3"]
    assert failed(rows[1:]) == ["C3"], "the first is short"
    assert failed(rows[:-1]) == []
    del rows[7]["ratios"]["fa4"]
    assert failed(rows) == ["C3"]
    del rows[-1]["ratios"][peers.DETERMINISTIC]
    assert failed(rows) == []


def test_keys_wider_than_values_against_the_better_peer():
    shape = SETS["c4"][0]
    assert failed([row(shape, cudnn=1.5, fa4=1.1)]) == []
    assert failed([row(shape, cudnn=1.5, fa4=1.09)]) == ["C4"]
    alone = row(shape, cudnn=1.05)
    del alone["ratios"]["fa4"]
    (verdict,) = bars.judge("bwd", [alone])
    assert not verdict.holds
    assert verdict.text == "d192/128 full 2x4096 128/128, x cuDNN (torch SDPA), the better of 1: 1.050, at least 1.1"
    del alone["results"]["fa4"]
    assert bars.judge("bwd", [alone]) == [], "it was not asked for"


def test_wrong_gradients_and_runs_that_differ_fail():
    result = row(SETS["c4"][0])
    result["results"][peers.OURS] |= {"wrong": True, "relative_error": 0.5}
    result["results"][peers.DETERMINISTIC]["repeats"] = False
    assert failed([result]) == ["error", "error"]


# -- report and command line -----------------------------------------------------------------------------------------


def full_result(suite: str) -> dict:
    """A result of two shapes, as the command writes it."""
    speeds = {"tflops": 500.0, "spread": 0.01, "wrong": False, "max_error": 1e-3}
    shapes = [AttentionShape(128, True, 16384 // seqlen, seqlen, 16, 16) for seqlen in (1024, 8192)]
    rows = [
        row(shape)
        | {
            "shape": dataclasses.asdict(shape),
            "results": dict.fromkeys([*peers.OWN, "cudnn"], speeds),
            "fa3_equivalent_tflops": 550.0,
            "scratch_bytes": {peers.OURS: 136_000_000, peers.DETERMINISTIC: 137_000_000},
        }
        for shape in shapes
    ]
    return {
        "suite": suite,
        "rows": rows,
        "settings": {"peers": ["cudnn"], "dtype": "torch.bfloat16"},
        "device": {"name": "NVIDIA H200"},
    }


@pytest.mark.parametrize("suite", ["bwd", "fwd+bwd"])
def test_the_report_shows_both_modes_and_the_scratch(suite):
    text = report._TABLES[suite](full_result(suite))
    assert "| this package | this package, deterministic | cuDNN (torch SDPA) |" in text
    assert "| 1.20 | 1.20 (fa3) | 1.0e-03 | 1.05 | 136 |" in text


@pytest.mark.parametrize("suite", ["bwd", "fwd+bwd"])
def test_the_plot(suite, tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(full_result(suite), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
@pytest.mark.parametrize("suite", ["bwd", "fwd+bwd"])
def test_the_suites_need_a_gpu(suite, capsys):
    assert command_line.main(["--suite", suite]) == 2
    assert "needs a Hopper GPU" in capsys.readouterr().err
