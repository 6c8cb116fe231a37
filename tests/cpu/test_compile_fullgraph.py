"""torch.compile(fullgraph=True) and torch.export over the public functions and the raw operator."""

import numpy as np
import pytest
import torch

from compiled_calls import BACKENDS, CALLS, OPTIONS, call_func, qkv
from cpu_calls import random_qkv
from flash_attn_interface import FlashAttnFunc, flash_attn_func, flash_attn_varlen_func


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_compiled_equals_eager(function, backend):
    arguments = CALLS[function]()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for actual, expected in zip(compiled(*arguments), function(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["num_splits", "sm_margin"])
def test_options_reach_the_kernel(name):
    """Options that change no value are not lost on the way through the operator."""
    nodes = []

    def record(module, example_inputs):
        nodes.extend(node for node in module.graph.nodes if node.op == "call_function")
        return module

    compiled = torch.compile(call_func, fullgraph=True, backend=record)
    compiled(*qkv())
    (node,) = (node for node in nodes if "flash_attn_3" in str(node.target))
    assert node.kwargs[name] == OPTIONS[name]


def apply(q, k, v):
    return FlashAttnFunc.apply(q, k, v, None, True)


def test_autograd_functions_of_flash_attention_3_compile():
    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*qkv()), apply(*qkv()))


def test_autograd_functions_of_flash_attention_3_have_no_gradient_in_a_full_graph():
    """The error says what has one; where a graph may break, they have it, too."""
    tensors = [x.requires_grad_() for x in qkv()]
    with pytest.raises(Exception, match=r"no gradient in a full graph of torch\.compile: call flash_attn_func"):
        torch.compile(apply, fullgraph=True, backend="aot_eager")(*tensors)
    torch._dynamo.reset()
    results = [function(*tensors).sum() for function in (torch.compile(apply, backend="aot_eager"), apply)]
    assert all(map(torch.equal, *(torch.autograd.grad(x, tensors) for x in results)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("softmax_scale", np.float32(0.5)),
        ("softmax_scale", torch.tensor(0.5)),
        ("softcap", np.float64(2.0)),
        ("window_size", (np.int64(3), np.int32(1))),
        ("window_size", torch.tensor([3, 1])),
        ("attention_chunk", np.int64(7)),
        ("num_splits", np.int64(1)),
        ("sm_margin", np.int64(2)),
        ("causal", np.True_),
        ("deterministic", np.True_),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_options_whose_values_a_full_graph_does_not_know(name, value):
    """Dynamo makes tensors of numpy's numbers. Where a graph may break, they work."""

    def function(q, k, v):
        return flash_attn_func(q, k, v, **{name: value})

    words = rf"{name}(\[0\])?: got a tensor or numpy's number; it must be Python's own number under torch.compile"
    with pytest.raises(Exception, match=words):
        torch.compile(function, fullgraph=True, backend="eager")(*qkv())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend="eager")(*qkv()), function(*qkv()))


def test_numpy_options_in_an_export_that_is_not_traced_by_dynamo():
    """There every value is known."""

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            options = {
                "softmax_scale": np.float32(0.5),
                "window_size": (np.int64(9), 3),
                "attention_chunk": np.int64(7),
            }
            return flash_attn_func(q, k, v, **options, num_splits=np.int64(0), sm_margin=np.int64(2))

    exported = torch.export.export(Module(), tuple(qkv()), strict=False)
    assert torch.equal(exported.module()(*qkv()), Module()(*qkv()))


def test_one_graph_serves_many_lengths():
    """Also many maximum lengths: no compilation per batch."""
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module

    def attention(q, k, v, cu_seqlens, max_seqlen):
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=count)
    for lengths in ([20, 30], [11, 13], [5, 64], [90, 3]):
        tensors = random_qkv((sum(lengths),) * 2, packed=True)
        cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        arguments = (*tensors, cu_seqlens, max(lengths))
        assert torch.equal(compiled(*arguments), attention(*arguments))
    assert len(graphs) == 1


def test_errors_of_a_compiled_call():
    q, k, v = qkv()
    compiled = torch.compile(lambda q, k, v: flash_attn_func(q, k, v), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="k: got 3 sequences"):
        compiled(q, torch.cat([k, k[:1]]), torch.cat([v, v[:1]]))
    assert torch.equal(compiled(q, k, v), flash_attn_func(q, k, v))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_export(function, strict):
    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    arguments = tuple(CALLS[function]())
    exported = torch.export.export(Module(), arguments, strict=strict).run_decompositions({})
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count("flash_attn_3._flash_attn_forward.default") == 1
    for actual, expected in zip(exported.module()(*arguments), function(*arguments), strict=True):
        assert torch.equal(actual, expected)
