"""What the measuring process does with a job, on the CPU's model of the kernels; and how a kernel is launched."""

import pytest
import torch

from flash_attn_3 import cpu_backend
from flash_attn_3.config import Dtype, Mask, Score, SeqLayout
from flash_attn_3.heuristics import plan_forward
from flash_attn_3.launch import cuda_forward, forward_problem
from flash_attn_3.signature import ForwardOptions, forward_signature
from flash_attn_3.tile_table import ForwardTile, TileChoice, TileKey
from flash_attn_3.tune import launch, worker
from flash_attn_3.tune.job import Audit, Job, Variant
from flash_attn_3.tune.shapes import TuneShape

KEY = TileKey(64, 64, Mask.CAUSAL, Score.SCALED)
SHAPE = TuneShape(KEY, batch=2, seqlen=70, heads=2)
BLOCK_NS = (32, 48, 64)


@pytest.fixture
def events(monkeypatch):
    """`events(spoil)` is what a job of three variants reports; `spoil(block_n, out, lse)` may bend a result."""
    timed = []

    def run(spoil=lambda block_n, out, lse: None) -> list[tuple[str, dict]]:
        def prepare(kernel, problem, plan, softcap, tensors):
            def call():
                q, k, v, out, lse = tensors
                assert out.isnan().all() and lse.isnan().all(), "a result must not be left over from the last variant"
                cpu_backend.forward(plan, problem, q, k, v, out, lse, None, None, None, None, q.shape[-1] ** -0.5, 0.0)
                spoil(plan.config.block_n, out, lse)

            return call

        monkeypatch.setattr(worker, "prepare", prepare)
        monkeypatch.setattr(worker, "_load", lambda *_: None)
        monkeypatch.setattr(worker, "_num_sms", lambda: 132)
        monkeypatch.setattr(worker, "_time", lambda job, calls, emit: timed.extend(calls))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        variants = tuple(Variant(TileChoice(None, ForwardTile(128, n), 1), "", "") for n in BLOCK_NS)
        found: list[tuple[str, dict]] = []
        job = Job(SHAPE, variants, None, warm_up=1, turns=(1,), drop_behind=0.1)
        worker.measure(job, lambda event, **fields: found.append((event, fields)), device="cpu")
        return found

    run.timed = timed
    return run


def test_every_variant_is_announced_then_checked(events):
    found = events()
    assert [event for event, _ in found] == ["launching", "checked"] * 3 + ["done"]
    assert [fields["variant"] for _, fields in found[:-1]] == [0, 0, 1, 1, 2, 2]
    assert all(0 < fields["relative_error"] < 1e-2 for event, fields in found if event == "checked")
    assert events.timed == [0, 1, 2]


def test_a_wrong_variant_is_not_timed(events):
    def spoil(block_n, out, lse):
        if block_n == 48:
            out[0, 5, 0] = float("nan")

    found = events(spoil)
    assert ("failed", {"variant": 1, "reason": "out has rows that were not written, or are not finite"}) in found
    assert events.timed == [0, 2]


def test_a_launch_that_is_refused_costs_the_variant(events):
    def spoil(block_n, out, lse):
        if block_n == 32:
            raise ValueError("num_ctas is wrong")

    found = events(spoil)
    assert found[1] == ("failed", {"variant": 0, "reason": "cannot be launched: ValueError: num_ctas is wrong"})
    assert events.timed == [1, 2]


def test_a_device_that_is_lost_ends_the_process(events, monkeypatch):
    def spoil(block_n, out, lse):
        def lost():
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise ValueError("what is seen first")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        events(spoil)


class _Timer:
    """Stands in for `TurnTimer`: block n takes n ms."""

    def __init__(self, calls, announce):
        self.announce = announce
        self.rounds = []

    def warm_up(self, launches):
        self.rounds.append(("warm-up", launches))

    def round(self, names, turns):
        for name in names:
            self.announce(name)
        self.rounds.append((sorted(names), turns))
        return {name: 1.0 + int(name) / 10 for name in names}


def test_slow_variants_are_left_out_after_the_first_round_but_never_the_present_one(monkeypatch):
    """Times 1.0, 1.1, 1.2 and 1.3, of which the last is the present choice; 15 % behind is too slow."""
    timers = []
    monkeypatch.setattr(
        worker, "TurnTimer", lambda *arguments, **options: timers.append(_Timer(*arguments, **options)) or timers[-1]
    )
    choice = TileChoice(None, ForwardTile(128, 64), 1)
    variants = tuple(Variant(choice, str(number), "", is_present=number == 3) for number in range(4))
    job = Job(SHAPE, variants, None, warm_up=2, turns=(1, 5, 6), drop_behind=0.15)
    found = []
    worker._time(job, dict.fromkeys(range(4)), lambda event, **fields: found.append((event, fields)))
    left = ["0", "1", "3"]
    assert timers[0].rounds == [("warm-up", 2), (["0", "1", "2", "3"], 1), (left, 5), (left, 6)]
    rounds = [fields["ms"] for event, fields in found if event == "round"]
    assert [sorted(ms) for ms in rounds] == [["0", "1", "2", "3"], left, left]
    assert ("launching", {"variant": 2}) in found


# -- auditing --------------------------------------------------------------------------------------------------------

SERVED = [(dtype, layout) for dtype in Dtype for layout in SeqLayout]


def _audit(monkeypatch, spoil=lambda config, out, lse: None) -> list[tuple[str, dict]]:
    """What an audit reports of a kernel for each dtype and layout, on the CPU's model of them."""

    def prepare(kernel, problem, plan, softcap, tensors, cu_seqlens):
        def call():
            *_, out, lse = tensors
            scales = (tensors[0].shape[-1] ** -0.5, softcap)
            cpu_backend.forward(plan, problem, *tensors, *cu_seqlens, None, None, *scales)
            spoil(plan.config, out, lse)

        return call

    monkeypatch.setattr(worker, "prepare", prepare)
    monkeypatch.setattr(worker, "_load", lambda *_: None)
    monkeypatch.setattr(worker, "_num_sms", lambda: 132)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    choice = TileChoice(None, ForwardTile(128, 64), 1)
    found: list[tuple[str, dict]] = []
    variants = tuple(Variant(choice, "", "", False, *served) for served in SERVED)
    worker.audit(Audit(KEY, variants, None), lambda event, **fields: found.append((event, fields)), device="cpu")
    return found


def test_an_audit_launches_each_dtype_and_layout(monkeypatch):
    launched = []
    found = _audit(monkeypatch, lambda config, out, lse: launched.append((config.dtype, config.seq_layout)))
    assert [event for event, _ in found] == ["launching", "audited"] * 4 + ["done"]
    assert [fields["variant"] for _, fields in found[:-1]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert launched == [served for served in SERVED for _ in range(4)]


def test_an_audit_names_the_call_that_a_kernel_fails_on(monkeypatch):
    def spoil(config, out, lse):
        if config.seq_layout is SeqLayout.VARLEN and config.dtype is Dtype.FP16:
            out.nan_to_num_()

    failures = [fields for event, fields in _audit(monkeypatch, spoil) if event == "failed"]
    reason = "NaN in a key, heads packed never: out is NaN in other rows than it should be"
    assert failures == [{"variant": SERVED.index((Dtype.FP16, SeqLayout.VARLEN)), "reason": reason}]


def test_a_launch_that_an_audit_cannot_make_is_a_failure(monkeypatch):
    def spoil(config, out, lse):
        if config.dtype is Dtype.BF16:
            raise ValueError("num_ctas is wrong")

    reasons = [fields["reason"] for event, fields in _audit(monkeypatch, spoil) if event == "failed"]
    assert reasons == ["cannot be launched: ValueError: num_ctas is wrong"] * 2


# -- launching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("mask", Mask)
def test_a_kernel_is_launched_as_the_package_launches_it(mask, score, monkeypatch):
    """The same launch as that of a call of the public functions, which the runtime's tests know to be right."""
    shape = TuneShape(TileKey(64, 64, mask, score), batch=2, seqlen=70, heads=2)
    launches = []

    def forward_launcher(handle, **options):
        return lambda *tensors: launches.append((handle, options, tensors))

    monkeypatch.setattr("flash_attn_3.runtime.load_kernel", lambda kernel: kernel)
    monkeypatch.setattr("flash_attn_3.runtime.forward_launcher", forward_launcher)
    monkeypatch.setattr("flash_attn_3.compiler.get_kernel", lambda config: config)
    q, k, v, out = (torch.zeros(2, 70, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(4))
    lse = torch.zeros(2, 2, 70, device="meta")
    window = (shape.mask.window_left, shape.mask.window_right)
    options = ForwardOptions(window_size=window, softcap=shape.softcap)
    call = forward_signature(q, k, v, options=options)
    problem = forward_problem(call, 132)
    assert problem == shape.problem(132)
    plan = plan_forward(problem)
    cuda_forward(plan.config, problem, plan, call.scale, call.softcap)(q, k, v, out, lse, *(None,) * 5)
    launch.prepare(plan.config, problem, plan, shape.softcap, (q, k, v, out, lse))()
    expected, found = launches
    assert found[:2] == expected[:2]
    assert all(a is b for a, b in zip(expected[2], found[2], strict=True))
