"""Calls that somebody watches: fake tensors, meta tensors, tensor subclasses, torch.export; and the rules they keep."""

import re

import pytest
import torch
from test_validation import OPTION_RULES, dense
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func


class Logged(torch.Tensor):
    """A tensor that keeps the names of the operators that its data went through."""

    @staticmethod
    def __new__(cls, data, log):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype, requires_grad=data.requires_grad)

    def __init__(self, data, log):
        self.data_inside, self.log = data, log

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        (log,) = {id(x.log): x.log for x in (*args, *kwargs.values()) if isinstance(x, cls)}.values()
        log.append(str(function))
        args, kwargs = tree_map_only(cls, lambda x: x.data_inside, (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: cls(x, log), function(*args, **kwargs))


OPERATOR = "flash_attn_3._flash_attn_forward.default"


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("function", [flash_attn_func, torch.ops.flash_attn_3.fwd])
def test_subclass_in_any_place(function, name):
    """One of q, k and v is enough to need the operator; the others are plain."""
    tensors = dict(zip("qkv", random_qkv((20, 30), heads=(4, 2)), strict=True))
    expected = function(**tensors)
    tensors[name] = Logged(tensors[name], [])
    found = function(**tensors)
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, expected))
    assert OPERATOR in tensors[name].log
    assert torch.equal(found.data_inside, expected)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_fake_tensor_in_any_place(name):
    tensors = dict(zip("qkv", random_qkv((20, 30), heads=(4, 2)), strict=True))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors[name] = mode.from_tensor(tensors[name])
    assert isinstance(flash_attn_func(**tensors), FakeTensor)


@pytest.mark.parametrize("watched", [0, 1], ids=["dout", "dlse"])
def test_subclass_as_a_gradient(watched):
    """The gradient of out or of lse is the only tensor that somebody watches."""
    q, k, v = (x.requires_grad_() for x in random_qkv((20, 30), heads=(4, 2)))
    results = flash_attn_func(q, k, v, return_attn_probs=True)
    given = [torch.ones_like(x) for x in results]
    expected = torch.autograd.grad(results, (q, k, v), given, retain_graph=True)
    given[watched] = Logged(given[watched], log := [])
    found = torch.autograd.grad(results, (q, k, v), given)
    assert "flash_attn_3._attention_gradients.default" in log
    assert all(torch.equal(x.data_inside, y) for x, y in zip(found, expected, strict=True))


# -- meta tensors ----------------------------------------------------------------------------------------------------


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def shapes(results) -> list[tuple]:
    return [(tuple(x.shape), x.dtype, x.device.type) for x in results]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_meta_tensors(requires_grad):
    """What FlashAttention-3's fake serves: shapes of results and of gradients, without any data."""
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    q, k, v = meta(2, 20, 4, 64), meta(2, 30, 2, 64), meta(2, 30, 2, 128)
    calls = [
        ((q, k, v), lambda *x: flash_attn_func(*x, causal=True, return_attn_probs=True), (2, 20, 4, 128), (2, 4, 20)),
        (
            [x.flatten(0, 1) for x in (q, k, v)],
            lambda *x: flash_attn_varlen_func(*x, offsets, offsets, 20, 30, return_attn_probs=True),
            (40, 4, 128),
            (4, 40),
        ),
        (
            [meta(2, 20, 3, 4, 64)],
            lambda x: flash_attn_qkvpacked_func(x, return_attn_probs=True),
            (2, 20, 4, 64),
            (2, 4, 20),
        ),
    ]
    for tensors, function, out_shape, lse_shape in calls:
        tensors = [x.detach().requires_grad_(requires_grad) for x in tensors]
        results = function(*tensors)
        assert shapes(results) == [(out_shape, torch.bfloat16, "meta"), (lse_shape, torch.float32, "meta")]
        if requires_grad:
            gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), tensors)
            assert shapes(gradients) == shapes(tensors)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_meta_tensors_beside_others(name):
    tensors = dense()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=r"^[kv]: got device (cpu|meta); it must be on q's device"):
        flash_attn_func(**tensors)


# -- rules -----------------------------------------------------------------------------------------------------------

#: Those of which a value decides that is known to a compiler, too. How many multiprocessors there are is not.
KNOWN_RULES = {
    name: rule
    for name, rule in OPTION_RULES.items()
    if name != "sm_margin_all" and not any(isinstance(x, torch.Tensor) for x in rule.change.values())
}


@pytest.mark.parametrize("rule", [pytest.param(rule, id=name) for name, rule in KNOWN_RULES.items()])
def test_broken_rule_of_an_option_under_fake_tensors(rule):
    with FakeTensorMode() as mode, pytest.raises(rule.error) as caught:
        flash_attn_func(**{name: mode.from_tensor(x) for name, x in dense().items()}, **rule.change)
    assert all(word in str(caught.value) for word in rule.words)


def test_splits_under_fake_tensors():
    with FakeTensorMode() as mode, pytest.raises(NotImplementedError, match="num_splits: got 4; splitting the keys"):
        flash_attn_func(*(mode.from_tensor(x) for x in dense().values()), num_splits=4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_splits": 4}, "num_splits: got 4"), ({"softmax_scale": -1.0}, "softmax_scale: got -1.0; it must be > 0")],
    ids=["num_splits", "softmax_scale"],
)
@pytest.mark.parametrize("strict", [False, True])
def test_export_refuses_what_a_call_refuses(strict, options, words):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return flash_attn_func(q, k, v, **options)

    with pytest.raises(Exception, match=re.escape(words)):
        torch.export.export(Module(), tuple(dense().values()), strict=strict)


def test_broken_rules_of_the_gradients_under_fake_tensors():
    q, k, v = dense().values()
    tensors = (torch.ones_like(q), q, k, v, *flash_attn_func(q, k, v, return_attn_probs=True))
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(x) for x in tensors]
        for operator in (torch.ops.flash_attn_3.bwd, torch.ops.flash_attn_3._flash_attn_backward):
            with pytest.raises(ValueError, match=r"softcap: got -1\.0"):
                operator(*tensors, softcap=-1.0)
