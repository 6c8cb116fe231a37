"""The way from a backward call to a launch, with a stand-in for the kernels; fake tensors stand for CUDA tensors."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cpu_calls import random_qkv
from flash_attn_3 import backward_launch, compiler, dispatch, runtime
from flash_attn_3.backward_config import Accumulation
from flash_attn_3.backward_plan import backward_head_dim_tiles
from flash_attn_3.config import Mask, Score, SeqLayout
from flash_attn_3.errors import UnsupportedDeviceError
from flash_attn_3.signature import BackwardSignature, ForwardOptions
from flash_attn_interface import flash_attn_func
from tensor_maps import Geometry

# `dispatch.backward` looks at addresses; fake tensors have none but 0.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

DEVICE = torch.device("cuda", 1)
BF16, FP16, INT32 = torch.bfloat16, torch.float16, torch.int32
NAMES = ("dout", "q", "k", "v", "out", "lse", "dlse", "statistics", "dq", "dk", "dv")
INDEX_NAMES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")


@dataclasses.dataclass
class FakeKernels:
    """Kernels that only note down what they are launched with."""

    signatures: list[BackwardSignature] = dataclasses.field(default_factory=list)
    launches: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: What the next launches raise.
    error: Exception | None = None

    def __call__(self, call, problem, plan):
        self.signatures.append(call)

        def run(*tensors: torch.Tensor | None) -> None:
            if self.error is not None:
                raise self.error
            self.launches.append({"problem": problem, "plan": plan, **dict(zip(NAMES, tensors, strict=False))})

        return run


@pytest.fixture
def hopper(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(runtime, "compute_capability", {1: (9, 0)}.__getitem__)
    monkeypatch.setattr(runtime, "num_sms", {1: 114}.__getitem__)
    monkeypatch.setattr(dispatch, "_backward_launches", {})
    with FakeTensorMode():
        yield


@pytest.fixture
def kernels(hopper, monkeypatch) -> FakeKernels:
    stand_in = FakeKernels()
    monkeypatch.setattr(backward_launch, "cuda_backward", stand_in)
    return stand_in


def empty(*shape: int, dtype: torch.dtype = BF16, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def call(
    lengths=(300, 500), heads=(4, 2), head_dims=(64, 64), batch=2, dtype=BF16, device=DEVICE
) -> dict[str, torch.Tensor | None]:
    (sq, sk), (h, hk), (d, dv) = lengths, heads, head_dims
    shapes = {
        "dout": (batch, sq, h, dv),
        "dlse": (batch, h, sq),
        "q": (batch, sq, h, d),
        "k": (batch, sk, hk, d),
        "v": (batch, sk, hk, dv),
        "out": (batch, sq, h, dv),
        "lse": (batch, h, sq),
    }
    dtypes = {"dlse": torch.float32, "lse": torch.float32}
    return {name: empty(*s, dtype=dtypes.get(name, dtype), device=device) for name, s in shapes.items()}


@pytest.fixture
def launchers(hopper, monkeypatch) -> list[dict[str, Any]]:
    """The options of every launcher that is made; each notes its calls under "calls"."""
    made = []

    def backward_launcher(handle, **options):
        made.append({"handle": handle, "calls": [], **options})
        names = (*NAMES, *INDEX_NAMES, "dq_scratch", "key_parts")
        return lambda *tensors: made[-1]["calls"].append(dict(zip(names, tensors, strict=True)))

    monkeypatch.setattr(compiler, "get_kernel", lambda config: config)
    monkeypatch.setattr(runtime, "load_backward_kernels", lambda kernels: kernels)
    monkeypatch.setattr(runtime, "backward_launcher", backward_launcher)
    return made


@pytest.mark.parametrize("head_dims", [(192, 128), (136, 136), (256, 256), (64, 136)])
def test_every_head_dim_has_kernels(head_dims, launchers):
    dispatch.backward(**call(head_dims=head_dims))
    (launcher,) = launchers
    assert (launcher["handle"].head_dim, launcher["handle"].head_dim_v) == backward_head_dim_tiles(*head_dims)
    (launched,) = launcher["calls"]
    config, rows = launcher["handle"], 2 * 4 * 320
    turns = rows // config.block_m * config.num_dq_parts if config.takes_turns else 0
    assert launched["dq_scratch"].numel() == rows * config.head_dim + turns


def test_a_first_pass_says_that_no_gpu_has_run_the_kernels(kernels):
    with pytest.warns(UserWarning, match="not yet run on a GPU"):
        dispatch.backward(**call())


def test_what_the_runtime_is_asked(launchers):
    options = ForwardOptions(window_size=(3, 5), attention_chunk=9, softcap=2.0, softmax_scale=0.5)
    tensors = call(head_dims=(64, 128))
    (dq, dk, dv), statistics = dispatch.backward(**tensors, options=options)
    (launcher,) = launchers
    (launched,) = launcher.pop("calls")
    assert launcher.pop("handle").name == "bwd_bf16_d64x128_local_dense_softcap_unordered_keys_staged_m64n128s2d2"
    assert launcher.pop("exp2_scale") == pytest.approx(2.0 * math.log2(math.e))
    assert launcher.pop("group_parts") == 2  # heads that share keys
    assert launcher.pop("num_ctas") == 4 * 2 * 2 * 2  # of 500 keys, 4 blocks
    assert launcher.pop("heads_per_section") == 2 * 2 * 2  # all
    assert launcher.pop("least_heads_in_last_section") > 4  # a window leaves the last keys to few queries
    assert launcher == {
        "softmax_scale": 0.5,
        "score_scale": 0.25,
        "window_left": 3,
        "window_right": 5,
        "attention_chunk": 9,
    }
    scratch, rows = launched.pop("dq_scratch"), 2 * 4 * 320
    assert (scratch.shape, scratch.dtype, scratch.device) == ((rows * 64 + rows // 64 * 2,), torch.float32, DEVICE)
    assert launched.pop("key_parts").shape == (4 * 2 * 2 * 2 * 128 * (64 + 128),)
    given = {**tensors, "dq": dq, "dk": dk, "dv": dv, "statistics": statistics, **dict.fromkeys(INDEX_NAMES)}
    assert launched.keys() == given.keys()
    assert all(launched[name] is x for name, x in given.items())


def test_unwanted_gradients_go_to_scratch(launchers):
    tensors = call()
    (dq, dk, dv), _ = dispatch.backward(**tensors, wanted=(False, True, False))
    (launched,) = launchers[0]["calls"]
    assert dq is dv is None and launched["dk"] is dk
    assert [launched[name].shape for name in ("dq", "dv")] == [tensors["q"].shape, tensors["v"].shape]


def test_ordered_additions_need_turns(launchers):
    dispatch.backward(**call(), deterministic=True)
    assert launchers[0]["handle"].accumulation is Accumulation.ORDERED
    (launched,) = launchers[0]["calls"]
    rows = 2 * 4 * 384
    assert launched["dq_scratch"].shape == (rows * 64 + rows // 128 * 2,)


@pytest.mark.parametrize("lengths", [(0, 500), (300, 0)], ids=str)
def test_empty_calls_need_no_kernel(lengths, hopper, monkeypatch):
    """N5: gradients of a call without queries or keys are zeros, on a device without a backward pass, too."""
    written = []
    monkeypatch.setattr(backward_launch, "_write_zeros", lambda *tensors: written.append(tensors))
    gradients, _ = dispatch.backward(**call(lengths))
    assert [x.shape for x in gradients] == [(2, lengths[0], 4, 64), *[(2, lengths[1], 2, 64)] * 2]
    assert all(any(x is tensor for tensor in written[0]) for x in gradients)


def test_launch_of_a_dense_call(kernels):
    tensors = call(head_dims=(192, 128))
    (dq, dk, dv), statistics = dispatch.backward(**tensors, options=ForwardOptions(softcap=2.0, causal=True))
    (launched,) = kernels.launches
    assert all(launched[name] is x for name, x in tensors.items())
    results = {"dq": dq, "dk": dk, "dv": dv, "statistics": statistics}
    assert all(launched[name] is x for name, x in results.items())
    for name in "qkv":
        gradient = results[f"d{name}"]
        assert (gradient.shape, gradient.dtype, gradient.device) == (tensors[name].shape, BF16, DEVICE)
        assert gradient.is_contiguous()
    assert (statistics.shape, statistics.dtype) == ((2, 2, 4, 320), torch.float32)
    config = launched["plan"].config
    assert (config.head_dim, config.head_dim_v, config.mask, config.score) == (192, 128, Mask.CAUSAL, Score.SOFTCAP)
    assert (config.seq_layout, config.accumulation) == (SeqLayout.DENSE, Accumulation.UNORDERED)
    assert launched["problem"].forward.num_sms == 114


def test_deterministic_is_an_axis_of_the_kernel(kernels):
    dispatch.backward(**call(), deterministic=True)
    assert kernels.launches[0]["plan"].config.accumulation is Accumulation.ORDERED


def test_launch_of_a_packed_call(kernels):
    tensors = {name: x.flatten(0, 1) for name, x in call().items() if "lse" not in name}
    lse, offsets = empty(4, 600, dtype=torch.float32), empty(3, dtype=INT32)
    used = empty(2, dtype=INT32)
    options = ForwardOptions(300, 500)
    _, statistics = dispatch.backward(
        **tensors, lse=lse, dlse=None, index_tensors=(offsets, offsets, used, None), options=options
    )
    (launched,) = kernels.launches
    assert launched["dlse"] is None
    assert statistics.shape == (2, 4, 896), "600 rows and 2 sequences in blocks of 128"
    assert launched["plan"].config.seq_layout is SeqLayout.VARLEN


def test_wanted_and_given_gradients(kernels):
    (dq, dk, dv), _ = dispatch.backward(**call(), wanted=(False, True, False))
    assert dq is dv is None and dk is kernels.launches[0]["dk"]
    given = (empty(2, 300, 4, 64), None, None)
    assert dispatch.backward(**call(), gradients=given)[0] is given
    assert [kernels.launches[1][name] for name in ("dq", "dk", "dv")] == [*given]


def test_equal_calls_share_a_launch(kernels):
    for _ in range(3):
        dispatch.backward(**call())
    assert (len(kernels.signatures), len(kernels.launches)) == (1, 3)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "q": ({"lengths": (301, 500)}, {}),
    "k": ({"lengths": (300, 501)}, {}),
    "heads": ({"heads": (2, 2)}, {}),
    "head_dim_v": ({"head_dims": (64, 128)}, {}),
    "batch": ({"batch": 3}, {}),
    "dtype": ({"dtype": FP16}, {}),
    "deterministic": ({}, {"deterministic": True}),
    "wanted": ({}, {"wanted": (True, False, True)}),
    "softmax_scale": ({}, {"options": ForwardOptions(softmax_scale=0.5)}),
    "causal": ({}, {"options": ForwardOptions(causal=True)}),
    "window_size": ({}, {"options": ForwardOptions(window_size=(3, 3))}),
    "attention_chunk": ({}, {"options": ForwardOptions(attention_chunk=5)}),
    "softcap": ({}, {"options": ForwardOptions(softcap=1.0)}),
    "sm_margin": ({}, {"options": ForwardOptions(sm_margin=1)}),
}


@pytest.mark.parametrize(("tensors", "others"), CHANGES.values(), ids=CHANGES)
def test_other_calls_have_launches_of_their_own(tensors, others, kernels):
    dispatch.backward(**call())
    dispatch.backward(**call(**tensors), **others)
    assert len(kernels.signatures) == 2


def test_the_oldest_launch_is_forgotten(kernels, monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_LAUNCHES", 2)
    for length in (10, 20, 30, 20, 30, 10):
        dispatch.backward(**call((length, 40)))
    assert [signature.forward.q.shape[1] for signature in kernels.signatures] == [10, 20, 30, 10]


WRONG_TENSORS = {
    "dout_dtype": (lambda: {"dout": empty(2, 300, 4, 64, dtype=FP16)}, TypeError, "dout: got dtype torch.float16"),
    "out_shape": (lambda: {"out": empty(2, 299, 4, 64)}, ValueError, "out: got shape"),
    "lse_shape": (lambda: {"lse": empty(2, 300, 4, dtype=torch.float32)}, ValueError, "softmax_lse: got shape"),
    "dlse_dtype": (lambda: {"dlse": empty(2, 4, 300)}, TypeError, "dlse: got dtype torch.bfloat16"),
    "dq_shape": (lambda: {"gradients": (empty(2, 300, 2, 64), None, None)}, ValueError, "dq: got shape"),
    "dq_device": (
        lambda: {"gradients": (torch.empty(2, 300, 4, 64, dtype=BF16), None, None)},
        ValueError,
        "dq: got device cpu; it must be on q's device, cuda:1",
    ),
    "out_none": (lambda: {"out": None}, TypeError, "out: got None; it must be a torch.Tensor"),
}


@pytest.mark.parametrize(("change", "error", "text"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_meet_the_same_words_on_a_remembered_launch(change, error, text, kernels):
    """A launch is found by less than what makes a call valid; the runtime then refuses, and the rules say why."""
    gradients = {"gradients": (empty(2, 300, 4, 64), None, None)}
    dispatch.backward(**call(), **gradients)
    kernels.error = error("the runtime's own words")
    for _ in range(2):
        with pytest.raises(error) as caught:
            dispatch.backward(**call() | gradients | change())
        assert str(caught.value).startswith(text)
    kernels.error = None
    dispatch.backward(**call(), **gradients)
    assert len(kernels.launches) == 2


@pytest.mark.parametrize("kind", [TypeError, ValueError, RuntimeError])
def test_what_breaks_no_rule_is_told_by_the_runtime(kind, kernels):
    kernels.error = kind("the runtime's own words")
    with pytest.raises(kind, match=r"^the runtime's own words$"):
        dispatch.backward(**call())


def test_rows_are_made_contiguous(monkeypatch):
    """L1: an expanded gradient, and a strided log-sum-exp; strides of whole rows stay."""
    kernels = FakeKernels()
    monkeypatch.setattr(backward_launch, "_cpu_backward", kernels)
    tensors = call(device="cpu")
    tensors["dout"] = torch.ones((), dtype=BF16).expand(2, 300, 4, 64)
    tensors["dlse"] = torch.ones(()).expand(2, 4, 300)
    tensors["lse"] = torch.zeros(2, 300, 4).transpose(1, 2)
    tensors["k"] = torch.zeros(2, 500, 2, 128, dtype=BF16)[..., :64]
    dispatch.backward(**tensors)
    (launched,) = kernels.launches
    assert launched["dout"].stride(-1) == 1
    assert launched["lse"].is_contiguous() and launched["dlse"].is_contiguous()
    assert launched["k"] is tensors["k"]


#: Tensors of the shape of out that TMA cannot read.
UNREADABLE = {
    "address": lambda: torch.randn(1 + 2 * 300 * 4 * 64).bfloat16()[1:].view(2, 300, 4, 64),
    "address_of_whole_words": lambda: torch.randn(4 + 2 * 300 * 4 * 64).bfloat16()[4:].view(2, 300, 4, 64),
    "stride_of_heads": lambda: torch.randn(2, 300, 4, 65).bfloat16()[..., :64],
    "stride_of_rows": lambda: torch.randn(2, 300, 4 * 64 + 4).bfloat16()[..., :256].unflatten(-1, (4, 64)),
    "stride_of_sequences": lambda: torch.randn(2, 300 * 256 + 1).bfloat16()[:, :-1].view(2, 300, 4, 64),
    "last_stride": lambda: torch.randn(2, 300, 4, 128).bfloat16()[..., ::2],
    "expanded_row": lambda: torch.randn(2, 300, 4, 1).bfloat16().expand(2, 300, 4, 64),
}
READABLE = {
    "contiguous": lambda: torch.randn(2, 300, 4, 64).bfloat16(),
    "permuted": lambda: torch.randn(4, 2, 300, 64).bfloat16().permute(1, 2, 0, 3),
    "wider_rows": lambda: torch.randn(2, 300, 4, 72).bfloat16()[..., 8:],
    "expanded_batch": lambda: torch.randn(1, 300, 4, 64).bfloat16().expand(2, 300, 4, 64),
    "one_sequence": lambda: torch.randn(300, 4, 72).bfloat16().as_strided((1, 300, 4, 64), (7, 288, 72, 1)),
}


@pytest.fixture
def launched_on_the_cpu(monkeypatch) -> list[dict[str, Any]]:
    kernels = FakeKernels()
    monkeypatch.setattr(backward_launch, "_cpu_backward", kernels)
    return kernels.launches


@pytest.mark.parametrize("name", ["dout", "out"])
@pytest.mark.parametrize("guise", UNREADABLE.values(), ids=UNREADABLE)
def test_what_tma_cannot_read_is_copied(guise, name, launched_on_the_cpu):
    """L1, L2: autograd hands over such gradients, and a caller has no hand in them."""
    given = guise()
    with pytest.raises(ValueError, match=r"stride|address"):
        Geometry(given)
    dispatch.backward(**call(device="cpu") | {name: given})
    (launched,) = launched_on_the_cpu
    Geometry(launched[name])
    assert torch.equal(launched[name], given)


@pytest.mark.parametrize("guise", READABLE.values(), ids=READABLE)
def test_what_tma_can_read_is_not_copied(guise, launched_on_the_cpu):
    given = guise()
    Geometry(given)
    dispatch.backward(**call(device="cpu", batch=given.shape[0]) | {"dout": given, "out": given})
    (launched,) = launched_on_the_cpu
    assert launched["dout"] is launched["out"] is given


def test_a_gate_beside_the_output(launched_on_the_cpu):
    """L1: out concatenated with a gate of one column; its gradient is a view whose heads are 65 elements apart."""
    q, k, v = (x.requires_grad_() for x in random_qkv((20, 30), heads=(2, 2), batch=2))
    out = flash_attn_func(q, k, v)
    torch.cat([out, out.new_ones(2, 20, 2, 1)], dim=-1).square().sum().backward()
    (launched,) = launched_on_the_cpu
    assert launched["dout"].is_contiguous() and torch.equal(launched["dout"], 2 * out)


def test_gpu_that_is_not_hopper(kernels, monkeypatch):
    monkeypatch.setattr(runtime, "compute_capability", lambda device: (8, 0))
    with pytest.raises(UnsupportedDeviceError, match=r"cuda:1 has compute capability 8\.0"):
        dispatch.backward(**call())


def test_nothing_is_remembered_on_the_cpu():
    """With nobody to check the tensors, every call is judged."""
    q, k, v = random_qkv((20, 30))
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    dispatch.backward(out, None, q, k, v, out, lse)
    with pytest.raises(ValueError, match="dout: got shape"):
        dispatch.backward(out[:, :19], None, q, k, v, out, lse)
    _, (_, lse_log2) = dispatch.backward(out, None, q, k, v, out, lse)
    assert lse_log2.shape == (1, 2, 128) and (lse_log2[..., 20:] == math.inf).all()
