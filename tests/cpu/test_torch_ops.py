"""The forward operators of `torch.ops.flash_attn_3`: schemas, fakes, aliasing, gradients, and torch's own opcheck."""

import importlib

import pytest
import torch
from torch._C import parse_schema
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_calls import BACKENDS
from cpu_calls import random_qkv
from flash_attn_3 import ops
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

importlib.import_module("flash_attn_3._C")
NAMESPACE = torch.ops.flash_attn_3

#: (name in fwd, name in _flash_attn_forward, default in fwd, default in _flash_attn_forward), in order.
ARGUMENTS = [
    ("q", "q", ..., ...),
    ("k", "k", ..., ...),
    ("v", "v", ..., ...),
    ("k_new", "k_new", None, None),
    ("v_new", "v_new", None, None),
    ("q_v", "qv", None, None),
    ("out", "out_", None, None),
    ("cu_seqlens_q", "cu_seqlens_q", None, None),
    ("cu_seqlens_k", "cu_seqlens_k", None, None),
    ("cu_seqlens_k_new", "cu_seqlens_k_new", None, None),
    ("seqused_q", "seqused_q", None, None),
    ("seqused_k", "seqused_k", None, None),
    ("max_seqlen_q", "max_seqlen_q", None, None),
    ("max_seqlen_k", "max_seqlen_k", None, None),
    ("page_table", "page_table", None, None),
    ("kv_batch_idx", "kv_batch_idx", None, None),
    ("leftpad_k", "leftpad_k", None, None),
    ("rotary_cos", "rotary_cos", None, None),
    ("rotary_sin", "rotary_sin", None, None),
    ("seqlens_rotary", "seqlens_rotary", None, None),
    ("q_descale", "q_descale", None, None),
    ("k_descale", "k_descale", None, None),
    ("v_descale", "v_descale", None, None),
    ("softmax_scale", "softmax_scale", None, None),
    ("is_causal", "causal", False, False),
    ("window_size_left", "window_size_left", -1, -1),
    ("window_size_right", "window_size_right", -1, -1),
    ("attention_chunk", "attention_chunk", 0, 0),
    ("softcap", "softcap", 0.0, 0.0),
    ("is_rotary_interleaved", "rotary_interleaved", False, True),
    ("scheduler_metadata", "scheduler_metadata", None, None),
    ("num_splits", "num_splits", 0, 1),
    ("pack_gqa", "pack_gqa", None, None),
    ("sm_margin", "sm_margin", 0, 0),
]


def schema_arguments(operator) -> list[tuple]:
    return [
        (argument.name, argument.default_value if argument.has_default_value() else ...)
        for argument in operator.default._schema.arguments
    ]


def test_schemas():
    assert len(ARGUMENTS) == 34
    assert schema_arguments(NAMESPACE.fwd) == [(name, default) for name, _, default, _ in ARGUMENTS]
    # One more than in FlashAttention-3, at the end, so that compiled gradients can be deterministic (G7).
    functional = [(name, default) for _, name, _, default in ARGUMENTS] + [("deterministic", False)]
    assert schema_arguments(NAMESPACE._flash_attn_forward) == functional
    raw = NAMESPACE.fwd.default._schema
    written = {argument.name for argument in raw.arguments if argument.alias_info and argument.alias_info.is_write}
    assert written == {"k_new", "v_new", "out"}
    assert [bool(value.alias_info) for value in raw.returns] == [True, False, False, False]
    functional = NAMESPACE._flash_attn_forward.default._schema
    assert not functional.is_mutable and len(functional.returns) == 4


# -- calls -------------------------------------------------------------------------------------------------


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    return random_qkv((20, 30), heads=(4, 2), head_dims=(64, 128), batch=2)


def packed_call() -> tuple[list[torch.Tensor], dict]:
    tensors = random_qkv((20, 30), heads=(4, 2), batch=2, packed=True)
    lengths = {
        "cu_seqlens_q": torch.tensor([0, 7, 40], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 40, 60], dtype=torch.int32),
        "seqused_k": torch.tensor([33, 20], dtype=torch.int32),
        "max_seqlen_q": 33,
        "max_seqlen_k": 40,
    }
    return tensors, lengths


def test_fwd_is_the_public_function(qkv):
    out, lse, *accumulators = NAMESPACE.fwd(*qkv, softmax_scale=0.2, is_causal=True, window_size_left=9, softcap=4.0)
    expected = flash_attn_func(
        *qkv, softmax_scale=0.2, causal=True, window_size=(9, -1), softcap=4.0, return_attn_probs=True
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert [(x.shape, x.dtype) for x in accumulators] == [((0,), torch.float32)] * 2


def test_functional_operator_is_the_public_function(qkv):
    expected = flash_attn_func(*qkv, attention_chunk=7, return_attn_probs=True)
    results = NAMESPACE._flash_attn_forward(*qkv, attention_chunk=7)
    assert len(results) == 4
    assert all(torch.equal(a, b) for a, b in zip(results[:2], expected, strict=True))


def test_varlen_through_the_operators():
    tensors, lengths = packed_call()
    expected = flash_attn_varlen_func(*tensors, **lengths, causal=True, return_attn_probs=True)
    for results in (
        NAMESPACE.fwd(*tensors, **lengths, is_causal=True),
        NAMESPACE._flash_attn_forward(*tensors, **lengths, causal=True),
    ):
        assert all(torch.equal(a, b) for a, b in zip(results[:2], expected, strict=True))


def test_fwd_writes_and_returns_out(qkv):
    """Also into a view whose rows are not dense."""
    storage = torch.full((2, 20, 5, 136), float("nan"), dtype=qkv[0].dtype)
    out = storage[:, :, :4, :128]
    result = NAMESPACE.fwd(*qkv, out=out)[0]
    assert result.data_ptr() == out.data_ptr() and result.stride() == out.stride()
    assert torch.equal(out, flash_attn_func(*qkv))
    assert storage[:, :, 4:].isnan().all() and storage[..., 128:].isnan().all()


def test_fwd_writes_out_of_a_call_with_gradients(qkv):
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    out = torch.full((2, 20, 4, 128), float("nan"), dtype=q.dtype)
    result = NAMESPACE.fwd(q, k, v, out=out)[0]
    expected = flash_attn_func(q, k, v)
    assert torch.equal(out, expected)
    gradients = torch.autograd.grad(result.sum(), (q, k, v))
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected.sum(), (q, k, v))))


@pytest.mark.parametrize(
    ("out", "error"),
    [(torch.zeros(1, 2, 20, 4, 128).bfloat16(), ValueError), (torch.zeros(2, 20, 4, 128), TypeError)],
    ids=["shape", "dtype"],
)
def test_fwd_rejects_out_of_a_call_with_gradients(out, error, qkv):
    q, k, v = qkv
    with pytest.raises(error, match="out: got"):
        NAMESPACE.fwd(q.clone().requires_grad_(), k, v, out=out)
    assert (out == 0).all()


def test_functional_operator_copies_what_fwd_rejects(qkv):
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in qkv]
    assert torch.equal(NAMESPACE._flash_attn_forward(*strided)[0], flash_attn_func(*qkv))
    with pytest.raises(ValueError, match="q: got stride 2"):
        NAMESPACE.fwd(*strided)


def test_functional_operator_rejects_out(qkv):
    with pytest.raises(TypeError, match="out_: "):
        NAMESPACE._flash_attn_forward(*qkv, out_=torch.empty(2, 20, 4, 128, dtype=qkv[0].dtype))


@pytest.mark.parametrize("operator", ["fwd", "_flash_attn_forward"])
@pytest.mark.parametrize("results", [[0], [1], [0, 1]], ids=["out", "lse", "both"])
def test_gradients_are_those_of_the_public_function(results, operator, qkv):
    q, k, v = (x.clone().requires_grad_() for x in qkv)

    def gradients(outputs):
        return torch.autograd.grad(sum(outputs[index].float().square().sum() for index in results), (q, k, v))

    options = {"softmax_scale": 0.2, "softcap": 4.0, "attention_chunk": 7}
    expected = gradients(flash_attn_func(q, k, v, **options, return_attn_probs=True))
    assert all(map(torch.equal, gradients(getattr(NAMESPACE, operator)(q, k, v, **options)), expected))


@pytest.mark.parametrize("operator", ["fwd", "_flash_attn_forward"])
def test_gradients_of_varlen(operator):
    tensors, lengths = packed_call()
    leaves = [x.requires_grad_() for x in tensors]
    expected = torch.autograd.grad(flash_attn_varlen_func(*leaves, **lengths).sum(), leaves)
    found = torch.autograd.grad(getattr(NAMESPACE, operator)(*leaves, **lengths)[0].sum(), leaves)
    assert all(map(torch.equal, found, expected))


UNAVAILABLE = {
    "k_new": torch.zeros(1),
    "v_new": torch.zeros(1),
    "q_v": torch.zeros(1),
    "cu_seqlens_k_new": torch.zeros(1),
    "page_table": torch.zeros(1),
    "kv_batch_idx": torch.zeros(1),
    "leftpad_k": torch.zeros(1),
    "rotary_cos": torch.zeros(1),
    "rotary_sin": torch.zeros(1),
    "seqlens_rotary": torch.zeros(1),
    "scheduler_metadata": torch.zeros(1),
    "num_splits": 2,
}


@pytest.mark.parametrize("name", UNAVAILABLE)
def test_arguments_not_available_yet(name, qkv):
    python_name = next(python for raw, python, *_ in ARGUMENTS if raw == name)
    for operator, argument in ((NAMESPACE.fwd, name), (NAMESPACE._flash_attn_forward, python_name)):
        with pytest.raises(NotImplementedError, match=f"^{argument}: .*not available yet"):
            operator(*qkv, **{argument: UNAVAILABLE[name]})


# -- fakes -------------------------------------------------------------------------------------------------


def shapes(results) -> list[tuple]:
    return [(x.shape, x.dtype, x.stride(), x.device) for x in results]


@pytest.mark.parametrize("operator", ["fwd", "_flash_attn_forward"])
def test_fake_has_the_shapes_of_the_real_one(operator, qkv):
    packed, lengths = packed_call()
    for tensors, options in ((qkv, {}), (packed, lengths)):
        real = getattr(NAMESPACE, operator)(*tensors, **options)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(x) for x in tensors]
            fake = getattr(NAMESPACE, operator)(*fakes, **options)
        assert shapes(fake) == shapes(real)


def test_public_functions_under_fake_tensors(qkv):
    with FakeTensorMode() as mode:
        out, lse = flash_attn_func(*(mode.from_tensor(x) for x in qkv), return_attn_probs=True)
    assert (out.shape, lse.shape) == ((2, 20, 4, 128), (2, 4, 20))


def test_meta_tensors(qkv):
    out, lse, *_ = NAMESPACE._flash_attn_forward(*(x.to("meta") for x in qkv))
    assert (out.shape, lse.shape) == ((2, 20, 4, 128), (2, 4, 20))


def test_fake_errors(qkv):
    packed, lengths = packed_call()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x) for x in qkv)
        packed = [mode.from_tensor(x) for x in packed]
        with pytest.raises(ValueError, match="max_seqlen_q: "):
            NAMESPACE._flash_attn_forward(*packed, **lengths | {"max_seqlen_q": None})
        with pytest.raises(TypeError, match="out_: "):
            NAMESPACE._flash_attn_forward(q, k, v, out_=torch.empty_like(q))
        with pytest.raises(TypeError, match="q: got dtype"):
            NAMESPACE._flash_attn_forward(q.float(), k, v)
        with pytest.raises(NotImplementedError, match="page_table: "):
            NAMESPACE._flash_attn_forward(q, k, v, page_table=torch.zeros(1))


# -- torch's own judgement ---------------------------------------------------------------------------------


def opcheck_calls():
    q, k, v = random_qkv((20, 30), heads=(4, 2), batch=2)
    with_gradient = [x.clone().requires_grad_() for x in (q, k, v)]
    packed, lengths = packed_call()
    yield "dense", (q, k, v), {}
    yield "options", (q, k, v), {"softmax_scale": 0.3, "window_size_left": 5, "softcap": 2.0, "num_splits": 1}
    yield "varlen", tuple(packed), lengths
    yield "strided", tuple(torch.cat([x, x], dim=2)[:, :, : x.shape[2]] for x in (q, k, v)), {}
    yield "no_keys", (q, k[:, :0], v[:, :0]), {}
    yield "gradient", tuple(with_gradient), {}
    yield "varlen_gradient", tuple(x.clone().requires_grad_() for x in packed), lengths
    yield "gradient_of_keys", (q, with_gradient[1], v), {"softcap": 2.0}


OPCHECK_CALLS = [pytest.param(*call[1:], id=call[0]) for call in opcheck_calls()]


@pytest.mark.parametrize("operator", ["fwd", "_flash_attn_forward"])
@pytest.mark.parametrize(("args", "kwargs"), OPCHECK_CALLS)
def test_opcheck(operator, args, kwargs):
    overload = getattr(NAMESPACE, operator).default
    assert set(torch.library.opcheck(overload, args, kwargs).values()) == {"SUCCESS"}


def test_opcheck_of_fwd_with_out():
    q, k, v = random_qkv((20, 30), heads=(4, 2), batch=2)
    results = torch.library.opcheck(NAMESPACE.fwd.default, (q, k, v), {"out": torch.zeros_like(q)})
    assert set(results.values()) == {"SUCCESS"}


# -- the function of the functional operator -------------------------------------------------------------------------


def test_every_argument_of_the_function_reaches_the_operator(monkeypatch):
    """By position and by name, in the order of the schema."""
    calls = []
    monkeypatch.setattr(ops, "_FUNCTIONAL", lambda *args: calls.append(args))
    names = [name for _, name, *_ in ARGUMENTS]
    ops._flash_attn_forward(*names)
    ops._flash_attn_forward(**{name: name for name in names})
    assert calls == [tuple(names)] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_function_compiles(backend, qkv):
    torch._dynamo.reset()
    q, k, v = (x.clone().requires_grad_() for x in qkv)
    compiled = torch.compile(lambda *x: ops._flash_attn_forward(*x, causal=True), fullgraph=True, backend=backend)
    found, expected = compiled(q, k, v)[:2], flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert all(map(torch.equal, found, expected))
    gradients = [torch.autograd.grad(x[0].sum() + x[1].sum(), (q, k, v)) for x in (found, expected)]
    assert all(map(torch.equal, *gradients))


def test_function_under_fake_tensors(qkv):
    with FakeTensorMode() as mode:
        out, lse, *_ = ops._flash_attn_forward(*(mode.from_tensor(x) for x in qkv))
    assert (out.shape, lse.shape) == ((2, 20, 4, 128), (2, 4, 20))


# -- operators that are not available yet ----------------------------------------------------------------------------

UNAVAILABLE_OPERATORS = {
    "fwd_combine": """flash_attn_3::fwd_combine(
        Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None
    ) -> (Tensor(out!), Tensor)""",
    "get_scheduler_metadata": """flash_attn_3::get_scheduler_metadata(
        int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, int headdim, int headdim_v,
        ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None,
        Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, int? page_size=None,
        int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, int window_size_right=-1,
        int attention_chunk=0, bool has_softcap=False, int num_splits=0, bool? pack_gqa=None, int sm_margin=0
    ) -> Tensor""",
}


@pytest.mark.parametrize("name", UNAVAILABLE_OPERATORS)
def test_schemas_of_operators_not_available_yet(name):
    schema = getattr(NAMESPACE, name).default._schema
    assert schema.is_backward_compatible_with(parse_schema(UNAVAILABLE_OPERATORS[name]))
    found = [argument.name for argument in schema.arguments]
    assert found == [argument.name for argument in parse_schema(UNAVAILABLE_OPERATORS[name]).arguments]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_not_available_yet(device, requires_grad):
    partial = torch.zeros(2, 1, 1, 1, 64, device=device).requires_grad_(requires_grad)
    with pytest.raises(NotImplementedError, match=r"torch\.ops\.flash_attn_3\.fwd_combine is not available yet"):
        NAMESPACE.fwd_combine(partial, partial[..., 0])
    lengths = torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(NotImplementedError, match=r"flash_attn_3\.get_scheduler_metadata is not available yet"):
        NAMESPACE.get_scheduler_metadata(1, 1, 1, 1, 1, 64, 64, torch.bfloat16, lengths, is_causal=True)
