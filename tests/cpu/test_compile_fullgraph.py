"""torch.compile(fullgraph=True) and torch.export over the public functions and the raw operator."""

import shutil

import pytest
import torch

from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles CPU code with g++"),
    ),
]
OPTIONS = {"softmax_scale": 0.2, "window_size": (9, 3), "softcap": 4.0, "num_splits": 0, "sm_margin": 2}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def qkv() -> list[torch.Tensor]:
    return random_qkv((20, 30), heads=(4, 2), batch=2)


def packed() -> list[torch.Tensor]:
    offsets = torch.tensor([0, 7, 40], dtype=torch.int32), torch.tensor([0, 40, 60], dtype=torch.int32)
    return [*random_qkv((20, 30), heads=(4, 2), batch=2, packed=True), *offsets]


def call_func(q, k, v):
    return flash_attn_func(q * 2, k, v, **OPTIONS, return_attn_probs=True)


def call_func_out_only(q, k, v):
    return (flash_attn_func(q, k, v, causal=True, attention_chunk=8) + 1,)


def call_qkvpacked(qkv):
    return flash_attn_qkvpacked_func(qkv, causal=True, window_size=[5, -1], return_attn_probs=True)


def call_grouped(qkv):
    return (flash_attn_qkvpacked_func(qkv, num_heads_q=4),)


def call_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k):
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, 33, 40, causal=True, softcap=3.0, return_attn_probs=True
    )


def call_fwd(q, k, v):
    out, lse, _, _ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True, softcap=2.0)
    return out * 2, lse


def call_fwd_with_out(q, k, v):
    out = torch.zeros_like(q)
    result = torch.ops.flash_attn_3.fwd(q, k, v, out=out, window_size_left=4)
    return out, result[0] + 1, result[1]


CALLS = {
    call_func: qkv,
    call_func_out_only: qkv,
    call_qkvpacked: lambda: [torch.randn(2, 20, 3, 2, 64, generator=torch.Generator().manual_seed(0)).half()],
    call_grouped: lambda: [torch.randn(2, 20, 8, 64, generator=torch.Generator().manual_seed(0)).half()],
    call_varlen: packed,
    call_fwd: qkv,
    call_fwd_with_out: qkv,
}


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


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("function", [call_func_out_only, call_fwd], ids=lambda function: function.__name__)
def test_compiled_backward_raises_only_when_it_runs(function, backend):
    q, k, v = qkv()
    expected = function(q, k, v)[0]
    out = torch.compile(function, fullgraph=True, backend=backend)(q.clone().requires_grad_(), k, v)[0]
    assert torch.equal(out, expected)
    with pytest.raises(NotImplementedError, match="backward pass"):
        out.sum().backward()


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
