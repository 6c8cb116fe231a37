"""The backward operators of `torch.ops.flash_attn_3`: schemas, results, fakes, and torch's own opcheck."""

import importlib

import pytest
import torch
from torch._C import parse_schema
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_calls import BACKENDS
from cpu_calls import random_qkv
from flash_attn_3 import backward_launch
from flash_attn_3.backward_plan import backward_tile
from flash_attn_3.config import Score
from flash_attn_interface import _flash_attn_backward, flash_attn_func, flash_attn_varlen_func
from gradient_calls import NAN, random_gradients

importlib.import_module("flash_attn_3._C")
NAMESPACE = torch.ops.flash_attn_3

TENSORS = ["dout", "q", "k", "v", "out", "softmax_lse"]
OPTIONS = [
    ("softmax_scale", None),
    ("is_causal", False),
    ("window_size_left", -1),
    ("window_size_right", -1),
    ("softcap", 0.0),
    ("deterministic", False),
    ("sm_margin", 0),
]


def optional(*names: str) -> list[tuple]:
    return [(name, None) for name in names]


def schema_arguments(operator) -> list[tuple]:
    return [
        (argument.name, argument.default_value if argument.has_default_value() else ...)
        for argument in operator.default._schema.arguments
    ]


def test_schemas():
    required = [(name, ...) for name in TENSORS]
    gradients = optional("dq", "dk", "dv")
    offsets, longest = optional("cu_seqlens_q", "cu_seqlens_k"), optional("max_seqlen_q", "max_seqlen_k")
    used, misspelt = optional("seqused_q", "seqused_k"), optional("sequed_q", "sequed_k")
    assert schema_arguments(NAMESPACE.bwd) == [*required, *gradients, *offsets, *used, *longest, *OPTIONS]
    by_name = schema_arguments(NAMESPACE._flash_attn_backward)
    assert by_name == [*required, *offsets, *misspelt, *longest, *gradients, *OPTIONS]
    for operator, num_returns in ((NAMESPACE.bwd, 5), (NAMESPACE._flash_attn_backward, 1)):
        schema = operator.default._schema
        written = {argument.name for argument in schema.arguments if argument.alias_info}
        assert written == {"dq", "dk", "dv"}
        assert len(schema.returns) == num_returns and not any(value.alias_info for value in schema.returns)
    assert not NAMESPACE._attention_gradients.default._schema.is_mutable


BWD_ARGUMENTS = """flash_attn_3::bwd(
    Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None,
    Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
    Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None,
    float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
    float softcap=0., bool deterministic=False, int sm_margin=0) -> """


@pytest.mark.parametrize(
    ("returns", "is_ours"),
    [
        pytest.param("(Tensor, Tensor, Tensor, Tensor, Tensor)", True, id="today"),
        pytest.param("(Tensor(dq!), Tensor(dk!), Tensor(dv!), " + "Tensor, " * 4 + "Tensor)", False, id="before"),
    ],
)
def test_schema_of_bwd_is_the_one_of_today(returns, is_ours):
    """A choice: FlashAttention-3's operator has returned eight tensors, and returns five today."""
    schema = parse_schema(BWD_ARGUMENTS + returns)
    assert NAMESPACE.bwd.default._schema.is_backward_compatible_with(schema) is is_ours


# -- calls -------------------------------------------------------------------------------------------------


def call(head_dims=(64, 128), seqlen_k=150, **options) -> dict:
    """Arguments of a dense call, without gradients to write; ``options`` are those of `flash_attn_func`."""
    q, k, v = random_qkv((100, seqlen_k), heads=(4, 2), head_dims=head_dims, batch=2)
    out, lse = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    return {"dout": random_gradients(q, v)[0], "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}


def packed_call() -> tuple[dict, dict]:
    """Arguments of a packed call, and those that say how it is packed."""
    q, k, v = random_qkv((20, 30), heads=(4, 2), batch=2, packed=True)
    lengths = {
        "cu_seqlens_q": torch.tensor([0, 7, 40], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 40, 60], dtype=torch.int32),
        "seqused_k": torch.tensor([33, 20], dtype=torch.int32),
        "max_seqlen_q": 33,
        "max_seqlen_k": 40,
    }
    out, lse = flash_attn_varlen_func(q, k, v, **lengths, return_attn_probs=True)
    return {"dout": random_gradients(q, v)[0], "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}, lengths


def unwritten(arguments: dict) -> dict:
    """dq, dk, dv to write into."""
    return {f"d{name}": torch.full_like(arguments[name], NAN) for name in "qkv"}


def expected_of(arguments: dict, function=flash_attn_func, **options) -> dict:
    leaves = [arguments[name].clone().requires_grad_() for name in "qkv"]
    found = torch.autograd.grad(function(*leaves, **options), leaves, arguments["dout"])
    return dict(zip(("dq", "dk", "dv"), found, strict=True))


def assert_equal(found: dict, expected: dict) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in ("dq", "dk", "dv"))


OPERATORS = [pytest.param(NAMESPACE.bwd, id="bwd"), pytest.param(_flash_attn_backward, id="_flash_attn_backward")]


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_are_those_of_autograd(operator):
    options = {"softmax_scale": 0.2, "window_size": (30, -1), "softcap": 4.0}
    arguments = call(causal=True, **options)
    found = unwritten(arguments)
    raw = {"softmax_scale": 0.2, "window_size_left": 30, "softcap": 4.0, "is_causal": True, "deterministic": True}
    operator(**arguments, **found, **raw)
    assert_equal(found, expected_of(arguments, causal=True, **options))


@pytest.mark.parametrize("operator", OPERATORS)
def test_varlen(operator):
    arguments, lengths = packed_call()
    found = unwritten(arguments)
    raw = dict(lengths)
    if operator is _flash_attn_backward:
        raw["sequed_k"] = raw.pop("seqused_k")
    operator(**arguments, **found, **raw)
    assert_equal(found, expected_of(arguments, flash_attn_varlen_func, **lengths))


@pytest.mark.parametrize("name", ["sequed_q", "sequed_k"])
def test_errors_name_the_arguments_of_the_operator(name):
    """FlashAttention-3 spells them in this way."""
    arguments, lengths = packed_call()
    lengths.pop("seqused_k")
    wrong = {"dtype": torch.tensor([7, 20]), "shape": torch.tensor([7], dtype=torch.int32)}
    wrong["strides"] = torch.tensor([7, 0, 20, 0], dtype=torch.int32)[::2]
    for kind, value in wrong.items():
        error = TypeError if kind == "dtype" else ValueError
        with pytest.raises(error, match=rf"^{name}: got {kind}"):
            _flash_attn_backward(**arguments, **lengths, **{name: value})
    with FakeTensorMode() as mode, pytest.raises(TypeError, match=rf"^{name}: got dtype"):
        _flash_attn_backward(**fake(mode, arguments | lengths | {name: wrong["dtype"]}))


def test_positional_arguments():
    """The order that Megatron and Transformer Engine go by."""
    arguments = call(softmax_scale=0.2, causal=True)
    found = unwritten(arguments)
    lengths = (None, None, None, None, 100, 150)
    _flash_attn_backward(*arguments.values(), *lengths, *found.values(), 0.2, True, -1, -1, 0.0, False)
    assert_equal(found, expected_of(arguments, softmax_scale=0.2, causal=True))


def test_left_unlimited_and_right_0_is_causal():
    arguments = call(causal=True)
    found = unwritten(arguments)
    NAMESPACE.bwd(**arguments, **found, window_size_right=0)
    assert_equal(found, expected_of(arguments, causal=True))


def test_gradients_are_written_into_views():
    """L1: a packed dqkv whose rows are not dense, and nothing beside it."""
    arguments = call((64, 64), seqlen_k=100)
    storage = torch.full((2, 100, 4 + 2 + 2 + 1, 72), NAN, dtype=torch.bfloat16)
    dq, dk, dv, _ = storage[..., :64].split([4, 2, 2, 1], dim=2)
    NAMESPACE.bwd(**arguments, dq=dq, dk=dk, dv=dv)
    assert_equal({"dq": dq, "dk": dk, "dv": dv}, expected_of(arguments))
    assert storage[..., 64:].isnan().all() and storage[:, :, 8].isnan().all()


def test_gradients_that_are_not_given_are_not_computed():
    arguments = call()
    expected = expected_of(arguments)
    for name in ("dq", "dk", "dv"):
        found = unwritten(arguments)[name]
        NAMESPACE.bwd(**arguments, **{name: found})
        assert torch.equal(found, expected[name])


@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
def test_row_statistics(head_dims):
    """softmax_d = sum(dout * out), and the log-sum-exp in base 2, padded to whole blocks of rows."""
    arguments = call(head_dims)
    softmax_d, lse_log2, *accumulators = NAMESPACE.bwd(**arguments)
    block_m = backward_tile(*head_dims, Score.SCALED).block_m
    assert softmax_d.shape == lse_log2.shape == (2, 4, -(-100 // block_m) * block_m)
    expected = (arguments["dout"].float() * arguments["out"].float()).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[..., :100], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse_log2[..., :100], arguments["softmax_lse"] * 1.4426950408889634)
    assert (softmax_d[..., 100:] == 0).all() and (lse_log2[..., 100:] == torch.inf).all()
    assert [(x.shape, x.dtype) for x in accumulators] == [((0,), torch.float32)] * 3
    assert torch.equal(_flash_attn_backward(**arguments), softmax_d)


def test_row_statistics_of_packed_sequences():
    arguments, lengths = packed_call()
    softmax_d, lse_log2, *_ = NAMESPACE.bwd(**arguments, **lengths)
    assert softmax_d.shape == lse_log2.shape == (4, 384), "40 rows and 2 sequences in blocks of 128"
    assert torch.isfinite(lse_log2).nonzero()[:, 1].unique().tolist() == [*range(7), *range(128, 128 + 33)]


@pytest.mark.parametrize("lengths", [(0, 7), (7, 0), (0, 0)], ids=str)
def test_no_queries_or_no_keys(lengths):
    """N5, N9: every gradient is written, and so is the scratch."""
    q, k, v = random_qkv(lengths, heads=(4, 2), batch=2)
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    arguments = {"dout": torch.ones_like(out), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}
    found = unwritten(arguments)
    softmax_d, lse_log2, *_ = NAMESPACE.bwd(**arguments, **found)
    assert all((gradient == 0).all() for gradient in found.values())
    assert (softmax_d == 0).all() and (lse_log2 == torch.inf).all()


def test_log_sum_exp_of_plus_infinity_where_there_is_no_key():
    """What FlashAttention-3 itself writes in a call without keys."""
    q, k, v = random_qkv((40, 0))
    arguments = {"dout": torch.ones_like(q), "q": q, "k": k, "v": v, "out": torch.zeros_like(q)}
    found = unwritten(arguments)
    NAMESPACE.bwd(**arguments, softmax_lse=torch.full((1, 2, 40), torch.inf), **found)
    assert (found["dq"] == 0).all()


@pytest.mark.parametrize("operator", OPERATORS)
def test_inputs_that_tma_cannot_read(operator, monkeypatch):
    """L1: dout and out whose heads are 129 elements apart, as they are beside a column of something else."""
    launched = []
    run = backward_launch._cpu_backward
    monkeypatch.setattr(
        backward_launch,
        "_cpu_backward",
        lambda *call: lambda *tensors: (launched.append(tensors), run(*call)(*tensors)),
    )
    arguments = call()
    expected = expected_of(arguments)
    launched.clear()
    for name in ("dout", "out"):
        wider = torch.cat([arguments[name], torch.ones(2, 100, 4, 1).bfloat16()], dim=-1)
        arguments[name] = wider[..., :128]
    found = unwritten(arguments)
    operator(**arguments, **found)
    assert_equal(found, expected)
    ((dout, _, _, _, out, *_),) = launched
    assert dout.is_contiguous() and out.is_contiguous()


def test_strided_inputs():
    """L1: the python operator copies what the raw one rejects; both take a strided log-sum-exp."""
    arguments = call()
    expected = expected_of(arguments)
    arguments["softmax_lse"] = torch.stack([arguments["softmax_lse"]] * 2, dim=-1)[..., 0]
    strided = arguments | {name: torch.stack([arguments[name]] * 2, dim=-1)[..., 0] for name in TENSORS[:5]}
    found = unwritten(arguments)
    _flash_attn_backward(**strided, **found)
    assert_equal(found, expected)
    for name in TENSORS[:5]:
        with pytest.raises(ValueError, match=f"^{name}: got stride 2"):
            NAMESPACE.bwd(**arguments | {name: strided[name]})
    for name, gradient in unwritten(arguments).items():
        for operator in (NAMESPACE.bwd, _flash_attn_backward):
            with pytest.raises(ValueError, match=f"^{name}: got stride 2"):
                operator(**arguments, **{name: torch.stack([gradient] * 2, dim=-1)[..., 0]})


# -- fakes -------------------------------------------------------------------------------------------------


def shapes(results) -> list[tuple]:
    results = [results] if isinstance(results, torch.Tensor) else results
    return [(x.shape, x.dtype, x.stride(), x.device) for x in results]


def fake(mode: FakeTensorMode, arguments: dict) -> dict:
    return {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def gradients_call(arguments: dict, wanted=(True, True, True), **lengths) -> dict:
    """Arguments of the functional operator."""
    names = [a.name for a in NAMESPACE._attention_gradients.default._schema.arguments]
    others = {
        "softcap": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1, "attention_chunk": 0,
        "sm_margin": 0, "deterministic": False, "wanted": list(wanted),
    }  # fmt: skip
    return dict.fromkeys(names) | others | arguments | lengths


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "varlen"])
def test_fakes_have_the_shapes_of_the_real_ones(is_packed):
    arguments, lengths = packed_call() if is_packed else (call(), {})
    arguments |= unwritten(arguments) | lengths
    functional = {name: value for name, value in arguments.items() if name not in ("dq", "dk", "dv")}
    calls = [(NAMESPACE.bwd, arguments)]
    calls += [
        (NAMESPACE._attention_gradients, gradients_call(functional, wanted))
        for wanted in ((True,) * 3, (False, True, False))
    ]
    arguments = dict(arguments)
    if is_packed:
        arguments["sequed_k"] = arguments.pop("seqused_k")
    calls.append((NAMESPACE._flash_attn_backward, arguments))
    for operator, given in calls:
        real = operator(**given)
        with FakeTensorMode() as mode:
            assert shapes(operator(**fake(mode, given))) == shapes(real)


def test_fake_errors():
    arguments = call() | {"dq": torch.zeros(2, 100, 4, 64)}
    packed, lengths = packed_call()
    lengths.pop("seqused_k")
    with FakeTensorMode() as mode:
        for operator in (NAMESPACE.bwd, _flash_attn_backward):
            with pytest.raises(TypeError, match=r"dq: got dtype torch\.float32; it must be bfloat16"):
                operator(**fake(mode, arguments))
            with pytest.raises(ValueError, match="max_seqlen_k: "):
                operator(**fake(mode, packed | lengths | {"max_seqlen_k": None}))


# -- torch's own judgement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("operator", ["bwd", "_flash_attn_backward", "_attention_gradients"])
def test_opcheck(operator, is_packed):
    arguments, lengths = packed_call() if is_packed else (call(), {})
    if operator == "_attention_gradients":
        given = gradients_call(arguments, (True, False, True), **lengths)
        given["dlse"] = torch.ones_like(given["softmax_lse"])
    else:
        given = arguments | {name: torch.zeros_like(x) for name, x in unwritten(arguments).items()} | lengths
        if is_packed and operator == "_flash_attn_backward":
            given["sequed_k"] = given.pop("seqused_k")
    overload = getattr(NAMESPACE, operator).default
    args = tuple(given.get(argument.name, argument.default_value) for argument in overload._schema.arguments)
    assert set(torch.library.opcheck(overload, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_compiled_writes(backend):
    """What a merge of partial results by hand looks like, compiled."""
    torch._dynamo.reset()
    arguments = call()

    def by_hand(dout, q, k, v, out, lse):
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        softmax_d = _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv)
        return dq * 2, dk, dv, softmax_d

    compiled = torch.compile(by_hand, fullgraph=True, backend=backend)
    for found, expected in zip(compiled(*arguments.values()), by_hand(*arguments.values()), strict=True):
        assert torch.equal(found, expected)
