"""Gradients under torch.compile(fullgraph=True) and torch.export."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from compiled_calls import BACKENDS, CALLS, call_func, call_func_out_only, qkv
from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def leaves(tensors) -> list[torch.Tensor]:
    return [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]


def loss_of(results) -> torch.Tensor:
    return sum(result.float().square().sum() for result in results)


def gradients(function, tensors, *others) -> list[torch.Tensor]:
    """Of ``function(*tensors, *others)`` with respect to the tensors that can have one."""
    tensors = leaves(tensors)
    loss_of(function(*tensors, *others)).backward()
    return [x.grad for x in tensors if x.requires_grad]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_compiled_gradients_equal_eager_ones(function, backend):
    arguments = CALLS[function]()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_equal(gradients(compiled, arguments), gradients(function, arguments))


@pytest.mark.parametrize("backend", ["aot_eager", BACKENDS[-1]])
def test_training_step(backend):
    """A block with projections, compiled as one graph, follows the same losses as in eager mode."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv = torch.nn.Linear(64, 3 * 64, dtype=torch.bfloat16)
            self.out = torch.nn.Linear(64, 64, dtype=torch.bfloat16)

        def forward(self, x):
            qkv = self.qkv(x).unflatten(-1, (3, 4, 16))
            return x + self.out(flash_attn_qkvpacked_func(qkv, causal=True).flatten(-2))

    x = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0)).bfloat16()

    def losses(compile_block):
        block = Block()
        optimizer = torch.optim.SGD(block.parameters(), lr=2.0)
        run = torch.compile(block, fullgraph=True, backend=backend) if compile_block else block
        for _ in range(5):
            loss = (run(x) - 1).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    compiled, eager = list(losses(True)), list(losses(False))
    assert eager[-1] < 0.9 * eager[0]
    assert compiled == pytest.approx(eager, rel=1e-2)


def backward_nodes(function, arguments) -> list[torch.fx.Node]:
    """The calls of our operators in the compiled backward graph."""
    nodes = []

    def record(module, example_inputs):
        nodes.extend(node for node in module.graph.nodes if "flash_attn_3" in str(node.target))
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=lambda module, _: make_boxed_func(module), bw_compiler=record)
    gradients(torch.compile(function, fullgraph=True, backend=backend), arguments)
    return nodes


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_is_honoured_when_compiled(deterministic):
    """G7."""

    def function(q, k, v):
        return (flash_attn_func(q, k, v, deterministic=deterministic),)

    (node,) = backward_nodes(function, qkv())
    arguments = dict(zip([a.name for a in node.target._schema.arguments], node.args, strict=False)) | node.kwargs
    assert node.target is torch.ops.flash_attn_3._attention_gradients.default
    assert arguments["deterministic"] is deterministic


def test_unused_results_cost_no_gradient():
    """A graph whose log-sum-exp nobody differentiates has no tensor of zeros in its place."""
    (node,) = backward_nodes(call_func_out_only, qkv())
    assert node.args[1] is None


def test_only_wanted_gradients_are_compiled():
    q, k, v = qkv()
    q.requires_grad_()
    compiled = torch.compile(call_func, fullgraph=True, backend="aot_eager")
    loss_of(compiled(q, k, v)).backward()
    assert torch.equal(q.grad, gradients(call_func, (q.detach(), k, v))[0])


def test_one_graph_serves_many_lengths():
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return make_boxed_func(module)

    backend = aot_autograd(fw_compiler=count, bw_compiler=count)

    def attention(q, k, v, cu_seqlens, max_seqlen):
        return (flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True),)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ([20, 30], [11, 13], [5, 64], [90, 3]):
        tensors = random_qkv((sum(lengths),) * 2, packed=True)
        cu_seqlens = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        arguments = (tensors, cu_seqlens, max(lengths))
        assert_equal(gradients(compiled, *arguments), gradients(attention, *arguments))
    assert len(graphs) == 2, "one forward and one backward graph"


@pytest.mark.parametrize("backend", ["aot_eager", BACKENDS[-1]])
def test_compiled_checkpointing(backend):
    def function(q, k, v):
        return (checkpoint(lambda *tensors: flash_attn_func(*tensors, causal=True), q * 2, k, v, use_reentrant=False),)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_equal(gradients(compiled, qkv()), gradients(function, qkv()))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_exported_programs_differentiate(function, strict):
    class Module(torch.nn.Module):
        def forward(self, *arguments):
            return function(*arguments)

    arguments = CALLS[function]()
    exported = torch.export.export(Module(), tuple(leaves(arguments)), strict=strict)
    assert_equal(gradients(exported.module(), arguments), gradients(function, arguments))
