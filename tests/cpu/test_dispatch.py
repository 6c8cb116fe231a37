"""The way from a call to a launch, with stand-ins for the GPU, the compiler and the kernel.

Fake tensors stand for CUDA tensors: they have a shape, a dtype and a device, which is all that this way reads.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpu_calls import random_qkv
from flash_attn_3 import compiler, dispatch, launch, runtime, validation
from flash_attn_3.config import Mask, SeqLayout
from flash_attn_3.errors import KernelNotBuiltError, UnsupportedDeviceError
from flash_attn_3.signature import ForwardOptions, OptionalTensors, forward_signature
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

DEVICE = torch.device("cuda", 1)
BF16, FP16, INT32 = torch.bfloat16, torch.float16, torch.int32
LOG2_E = math.log2(math.e)
HANDLE = 77


@dataclasses.dataclass
class FakeHopper:
    """A Hopper GPU with index 1 whose kernels only note down what they are launched with."""

    launches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: What the next launches raise.
    error: Exception | None = None

    def forward_launcher(self, handle: int, **options: Any):
        names = ("q", "k", "v", "out", "lse", *OptionalTensors._fields[:4], "promoted_out")

        def run(*tensors: torch.Tensor | None) -> None:
            if self.error is not None:
                raise self.error
            self.launches.append({"handle": handle, **options, **dict(zip(names, tensors, strict=True))})

        return run


@pytest.fixture
def hopper(monkeypatch) -> Iterator[FakeHopper]:
    machine = FakeHopper()
    monkeypatch.setattr(runtime, "compute_capability", {1: (9, 0)}.__getitem__)
    monkeypatch.setattr(runtime, "num_sms", {1: 114}.__getitem__)
    monkeypatch.setattr(compiler, "get_kernel", lambda config: config)
    monkeypatch.setattr(runtime, "load_kernel", lambda kernel: HANDLE)
    monkeypatch.setattr(runtime, "forward_launcher", machine.forward_launcher)
    monkeypatch.setattr(dispatch, "_launches", {})
    with FakeTensorMode():
        yield machine


@pytest.fixture
def preparations(hopper, monkeypatch) -> list:
    """The signatures that had to be prepared."""
    prepared = []

    def prepare(call):
        prepared.append(call)
        return launch.prepare_forward(call)

    monkeypatch.setattr(dispatch, "prepare_forward", prepare)
    return prepared


def empty(*shape: int, dtype: torch.dtype = BF16, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def qkv(lengths=(300, 500), heads=(4, 2), head_dims=(64, 64), batch=2, dtype=BF16) -> list[torch.Tensor]:
    (sq, sk), (h, hk), (d, dv) = lengths, heads, head_dims
    return [empty(*shape, dtype=dtype) for shape in ((batch, sq, h, d), (batch, sk, hk, d), (batch, sk, hk, dv))]


def lengths_of(batch: int, **others: torch.Tensor) -> OptionalTensors:
    return OptionalTensors(empty(batch + 1, dtype=INT32), empty(batch + 1, dtype=INT32), **others)


# -- launches ----------------------------------------------------------------------------------------------


def test_launch_of_a_dense_call(hopper):
    q, k, v = qkv(head_dims=(64, 128))
    out, lse = dispatch.forward(q, k, v)
    (launched,) = hopper.launches
    assert all(launched[name] is x for name, x in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items())
    assert [launched[name] for name in OptionalTensors._fields[:4]] == [None] * 4
    assert (out.shape, out.dtype, out.device) == ((2, 300, 4, 128), BF16, DEVICE)
    assert (lse.shape, lse.dtype, lse.device) == ((2, 4, 300), torch.float32, DEVICE)
    assert out.stride() == (300 * 4 * 128, 4 * 128, 128, 1) and lse.stride() == (4 * 300, 300, 1)
    assert launched["handle"] == HANDLE
    assert (launched["max_seqlen_q"], launched["max_seqlen_k"]) == (300, 500)
    assert launched["num_value_passes"] == 1
    assert launched["packed_heads"] == 1
    assert launched["heads_per_section"] == 8
    assert launched["score_scale"] == 1.0
    assert launched["exp2_scale"] == pytest.approx(64**-0.5 * LOG2_E)
    assert (launched["window_left"], launched["window_right"], launched["attention_chunk"]) == (-1, -1, 0)


def test_scratch_of_very_long_sequences(hopper):
    dispatch.forward(*qkv(lengths=(100, 2**18)))
    dispatch.forward(*qkv(lengths=(100, 2**18 + 1)))
    short, long = (launched["promoted_out"] for launched in hopper.launches)
    assert short is None
    # 2 sequences of 4 heads of two tiles: 64 rows of 64 columns, and two rows' references for each of 128 threads.
    assert (long.shape, long.dtype, long.device) == ((16 * (64 * 64 + 2 * 128),), torch.float32, DEVICE)


def test_number_of_ctas(hopper):
    dispatch.forward(*qkv())
    assert hopper.launches[0]["num_ctas"] == 2 * 4 * math.ceil(300 / 64)


def test_short_sequences_pack_heads(hopper):
    dispatch.forward(*qkv(lengths=(30, 500)))
    assert hopper.launches[0]["packed_heads"] == 2  # 60 rows in one tile of 64, in place of two times 30
    assert hopper.launches[0]["num_ctas"] == 2 * 2


def test_launch_with_every_option(hopper):
    q, k, v = empty(60_000, 4, 64), empty(100_000, 2, 64), empty(100_000, 2, 512)
    extras = lengths_of(200, seqused_q=empty(200, dtype=INT32), seqused_k=empty(200, dtype=INT32))
    options = ForwardOptions(300, 500, 0.5, False, (40, 10), 64, 20.0, 1, None, 14)
    out, lse = dispatch.forward(q, k, v, extras, options)
    (launched,) = hopper.launches
    assert all(launched[name] is x for name, x in extras._asdict().items() if x is not None)
    assert (out.shape, lse.shape) == ((60_000, 4, 512), (4, 60_000))
    assert (launched["max_seqlen_q"], launched["max_seqlen_k"]) == (300, 500)
    assert launched["num_ctas"] == 100, "114 multiprocessors less the margin"
    assert launched["num_value_passes"] == 2
    assert launched["score_scale"] == pytest.approx(0.5 / 20.0)
    assert launched["exp2_scale"] == pytest.approx(20.0 * LOG2_E)
    assert (launched["window_left"], launched["window_right"], launched["attention_chunk"]) == (40, 10, 64)


def test_kernel_of_a_call(hopper, monkeypatch):
    configs = []
    monkeypatch.setattr(compiler, "get_kernel", configs.append)
    extras = OptionalTensors(seqused_k=empty(2, dtype=INT32))
    dispatch.forward(*qkv(), extras, ForwardOptions(causal=True))
    (config,) = configs
    assert (config.mask, config.seq_layout) == (Mask.CAUSAL, SeqLayout.VARLEN)


def test_a_given_out_is_written(hopper):
    q, k, v = qkv()
    out = empty(2, 300, 4, 64)
    assert dispatch.forward(q, k, v, out=out)[0] is out
    assert hopper.launches[0]["out"] is out


def test_strided_rows_are_not_copied(hopper):
    q = empty(2, 300, 4, 64)
    k = torch.empty_strided((2, 500, 2, 64), (128_000, 256, 128, 1), dtype=BF16, device=DEVICE)
    dispatch.forward(q, k, k)
    (launched,) = hopper.launches
    assert launched["k"] is k and launched["v"] is k


# -- what is remembered ------------------------------------------------------------------------------------


def test_equal_calls_share_a_launch(preparations, hopper, monkeypatch):
    """Equal calls pay neither for the rules nor for the plan again."""
    for softcap in (0.0, 0, 0.0):
        dispatch.forward(*qkv(), options=ForwardOptions(softcap=softcap))
    assert len(preparations) == 1
    assert len(hopper.launches) == 3
    monkeypatch.setattr(validation, "check_forward", None)
    dispatch.forward(*qkv())


CHANGES: dict[str, dict[str, Any]] = {
    "q": {"lengths": (301, 500)},
    "k": {"lengths": (300, 501)},
    "heads": {"heads": (2, 2)},
    "head_dim_v": {"head_dims": (64, 128)},
    "batch": {"batch": 3},
    "dtype": {"dtype": FP16},
}
OPTION_CHANGES: dict[str, Any] = {
    "softmax_scale": 0.5,
    "causal": True,
    "window_size": (3, 3),
    "attention_chunk": 5,
    "softcap": 1.0,
    "num_splits": 0,
    "sm_margin": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_of_other_shapes_have_launches_of_their_own(name, preparations):
    dispatch.forward(*qkv())
    dispatch.forward(*qkv(**CHANGES[name]))
    assert len(preparations) == 2


@pytest.mark.parametrize("name", OPTION_CHANGES)
def test_other_options_have_launches_of_their_own(name, preparations):
    for options in (ForwardOptions(), ForwardOptions(**{name: OPTION_CHANGES[name]})):
        dispatch.forward(*qkv(), options=options)
    assert len(preparations) == 2


def test_every_kind_of_lengths_has_launches_of_its_own(preparations):
    """Among them: another number of sequences in tensors of the same sizes, and another maximum."""
    q, k, v = empty(600, 4, 64), empty(600, 2, 64), empty(600, 2, 64)
    batched_q, batched_k = empty(1, 600, 4, 64), empty(1, 600, 2, 64)
    one, two = empty(2, dtype=INT32), empty(3, dtype=INT32)
    used = empty(1, dtype=INT32)
    calls = [
        (q, k, v, OptionalTensors(one, one), ForwardOptions(600, 600)),
        (q, k, v, OptionalTensors(two, two), ForwardOptions(600, 600)),
        (q, k, v, OptionalTensors(one, one), ForwardOptions(500, 600)),
        (q, k, v, OptionalTensors(one, one), ForwardOptions(600, 500)),
        (q, k, v, OptionalTensors(one, one, seqused_q=used), ForwardOptions(600, 600)),
        (q, k, v, OptionalTensors(one, one, seqused_k=used), ForwardOptions(600, 600)),
        (q, batched_k, batched_k, OptionalTensors(one), ForwardOptions(600, 600)),
        (batched_q, k, v, OptionalTensors(cu_seqlens_k=one), ForwardOptions(600, 600)),
        (batched_q, batched_k, batched_k, OptionalTensors(), ForwardOptions(600, 600)),
    ]
    for call in calls * 2:
        dispatch.forward(*call)
    assert preparations == [forward_signature(*call) for call in calls]


def test_devices_have_launches_of_their_own(preparations, monkeypatch):
    monkeypatch.setattr(runtime, "compute_capability", lambda device: (9, 0))
    monkeypatch.setattr(runtime, "num_sms", {0: 132, 1: 114}.__getitem__)
    for device in ("cuda:0", "cuda:1"):
        dispatch.forward(*(x.to(device) for x in qkv()))
    assert [call.q.device.index for call in preparations] == [0, 1]


def test_the_oldest_launch_is_forgotten(preparations, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_LAUNCHES", 2)
    for length in (10, 20, 30, 20, 30, 10):
        dispatch.forward(*qkv((length, 40)))
    assert [call.q.shape[1] for call in preparations] == [10, 20, 30, 10]


WRONG_TENSORS = {
    "k_dtype": (lambda: {"k": empty(2, 500, 2, 64, dtype=FP16)}, TypeError, "k: got dtype torch.float16"),
    "v_device": (lambda: {"v": empty(2, 500, 2, 64, device="cpu")}, ValueError, "v: got device cpu"),
    "out_dtype": (lambda: {"out": empty(2, 300, 4, 64, dtype=FP16)}, TypeError, "out: got dtype torch.float16"),
    "seqused_q_shape": (lambda: {"seqused_q": empty(3, dtype=INT32)}, ValueError, "seqused_q: got shape"),
    "seqused_k_dtype": (
        lambda: {"seqused_k": empty(2, dtype=torch.int64)},
        TypeError,
        "seqused_k: got dtype torch.int64",
    ),
    "seqused_k_list": (lambda: {"seqused_k": [1, 2]}, TypeError, "seqused_k: got a list; it must be a torch.Tensor"),
    "q_sparse": (lambda: {"q": torch.zeros(2, 300, 4, 64, dtype=BF16).to_sparse()}, TypeError, "q: got a tensor of"),
    "k_array": (lambda: {"k": np.empty((2, 500, 2, 64))}, TypeError, "k: got a ndarray; it must be a torch.Tensor"),
    "k_descale_shape": (lambda: {"k_descale": empty(3, 2, dtype=torch.float32)}, ValueError, "k_descale: got shape"),
}


@pytest.mark.parametrize(("change", "error", "text"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_meet_the_same_words_on_a_remembered_launch(change, error, text, hopper):
    """A launch is found by less than what makes a call valid; the runtime then refuses, and the rules say why."""

    def call(**tensors):
        extras = {"seqused_q": empty(2, dtype=INT32), "seqused_k": empty(2, dtype=INT32)}
        arguments = dict(zip("qkv", qkv(), strict=True)) | {"out": empty(2, 300, 4, 64)} | extras | tensors
        q, k, v, out = (arguments.pop(name) for name in ("q", "k", "v", "out"))
        dispatch.forward(q, k, v, OptionalTensors(**arguments), out=out)

    call()
    hopper.error = error("the runtime's own words")
    for _ in range(2):
        with pytest.raises(error) as caught:
            call(**change())
        assert str(caught.value).startswith(text)
    hopper.error = None
    call()
    assert len(hopper.launches) == 2


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_what_breaks_no_rule_is_told_by_the_runtime(kind, hopper):
    """A misaligned address, say, or an error of the driver."""
    hopper.error = kind("the runtime's own words")
    with pytest.raises(kind, match=r"^the runtime's own words$"):
        dispatch.forward(*qkv())


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_gpu_that_is_not_hopper(hopper, monkeypatch, capability):
    monkeypatch.setattr(runtime, "compute_capability", lambda device: capability)
    with pytest.raises(UnsupportedDeviceError) as caught:
        dispatch.forward(*qkv())
    assert all(word in str(caught.value) for word in ("cuda:1", "{}.{}".format(*capability), "Hopper"))
    assert hopper.launches == []


def test_a_failed_kernel_is_asked_for_again(hopper, monkeypatch):
    def fail(config):
        raise KernelNotBuiltError(config.name)

    with monkeypatch.context() as broken:
        broken.setattr(compiler, "get_kernel", fail)
        with pytest.raises(KernelNotBuiltError):
            dispatch.forward(*qkv())
    dispatch.forward(*qkv())
    assert len(hopper.launches) == 1


def test_sm_margin_is_held_against_the_device(hopper):
    with pytest.raises(ValueError, match="sm_margin: got 114; it must be less than the device's 114"):
        dispatch.forward(*qkv(), options=ForwardOptions(sm_margin=114))


# -- nothing to compute ------------------------------------------------------------------------------------


NO_QUERIES = [(0, (5, 7), (4, 2)), (2, (0, 7), (4, 2)), (2, (0, 0), (4, 2)), (2, (5, 7), (0, 2))]


@pytest.mark.parametrize(("batch", "lengths", "heads"), NO_QUERIES)
def test_no_queries(batch, lengths, heads):
    """N5."""
    tensors = random_qkv(lengths, heads=heads, batch=batch)
    out, lse = flash_attn_func(*tensors, return_attn_probs=True)
    assert (out.shape, lse.shape) == (tensors[0].shape, (batch, heads[0], lengths[0]))


@pytest.mark.parametrize(("batch", "lengths", "heads"), NO_QUERIES)
def test_no_queries_on_a_gpu(hopper, batch, lengths, heads):
    """N5: no kernel is launched for an empty output; with nobody to check the tensors, every call is judged."""
    q, k, v = qkv(lengths, heads, batch=batch)
    out, lse = dispatch.forward(q, k, v)
    assert (out.shape, lse.shape) == (q.shape, (batch, heads[0], lengths[0]))
    assert hopper.launches == []
    with pytest.raises(TypeError, match="k: got dtype"):
        dispatch.forward(q, k.half(), v)


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys(causal):
    """N5, N9: out is 0 and lse -inf."""
    q, k, v = random_qkv((5, 0), heads=(4, 2), batch=2)
    out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys_on_a_gpu(hopper, causal):
    """N5, N9: it is the kernel that writes out and lse: it knows which rows exist."""
    dispatch.forward(*qkv((5, 0)), options=ForwardOptions(causal=causal))
    assert len(hopper.launches) == 1


def test_no_keys_by_max_seqlen():
    q, k, v = random_qkv((5, 6), packed=True)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([[0, 5], [0, 0]], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, 5, 0, return_attn_probs=True)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_problem_of_a_call():
    """The planner sees what was asked, normalised."""
    q, k, v = random_qkv((20, 30), heads=(6, 3), head_dims=(40, 72), batch=2)
    options = ForwardOptions(window_size=(100, 100), softcap=1.0, sm_margin=32)
    problem = launch.forward_problem(forward_signature(q, k, v, options=options), 132)
    assert dataclasses.astuple(problem)[1:8] == (2, 20, 30, 6, 3, 40, 72)
    assert problem.mask.mask is Mask.FULL
    assert problem.num_sms == 100
