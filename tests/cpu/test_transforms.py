"""Derivatives and transforms that do not exist: an error in plain words, never a result without them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vjp, vmap

from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

NO_TANGENT = "has no forward-mode derivative, on no device"
NO_TRANSFORM = r"has no rule for the transforms of torch\.func"


def qkv() -> list[torch.Tensor]:
    return random_qkv((20, 30), heads=(2, 2))


def varlen(q, k, v):
    offsets = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([0, 30], dtype=torch.int32)
    return flash_attn_varlen_func(q[0], k[0], v[0], *offsets, 20, 30)


def packed(q, k, v):
    return flash_attn_qkvpacked_func(torch.stack([q, k[:, :20], v[:, :20]], dim=2))


def raw(q, k, v):
    return torch.ops.flash_attn_3.fwd(q, k, v)[0]


def functional(q, k, v):
    return torch.ops.flash_attn_3._flash_attn_forward(q, k, v)[0]


PUBLIC = [flash_attn_func, varlen, packed]
EVERY = [*PUBLIC, raw, functional]


# -- forward mode ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("function", EVERY)
def test_dual_tensors(function, name):
    """On the CPU, too, where the model could have a derivative and the GPU could not."""
    tensors = qkv()
    with forward_ad.dual_level():
        tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match=NO_TANGENT):
            function(*tensors)


@pytest.mark.parametrize("function", PUBLIC)
def test_dual_tensors_that_require_a_gradient(function):
    q, k, v = qkv()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_TANGENT):
        function(forward_ad.make_dual(q.requires_grad_(), torch.ones_like(q)), k, v)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_dual_gradients(name):
    """Forward over reverse: the tangent of a gradient would be lost in the same way."""
    q, k, v = (x.requires_grad_() for x in qkv())
    results = dict(zip(("out", "lse"), flash_attn_func(q, k, v, return_attn_probs=True), strict=True))
    with forward_ad.dual_level():
        ones = torch.ones_like(results[name])
        with pytest.raises(NotImplementedError, match=NO_TANGENT):
            torch.autograd.grad(results[name], q, forward_ad.make_dual(ones, ones))


def test_plain_tensors_where_others_are_dual():
    tensors = qkv()
    expected = flash_attn_func(*tensors)
    with forward_ad.dual_level():
        assert torch.equal(flash_attn_func(*tensors), expected)


@pytest.mark.parametrize("function", PUBLIC)
def test_jvp(function):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=NO_TANGENT):
        jvp(lambda q: function(q, k, v), (q,), (q,))


# -- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [grad, lambda function: lambda q: vjp(function, q)], ids=["grad", "vjp"])
@pytest.mark.parametrize("function", PUBLIC)
def test_gradients_of_torch_func(function, transform):
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match=NO_TRANSFORM):
        transform(lambda q: function(q, k, v).float().sum())(q)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("function", PUBLIC)
def test_vmap(function, requires_grad):
    q, k, v = (x.requires_grad_(requires_grad) for x in qkv())
    with pytest.raises(NotImplementedError, match=NO_TRANSFORM):
        vmap(lambda q: function(q, k, v))(torch.stack([q, q]))


@pytest.mark.parametrize("function", PUBLIC)
def test_vmap_of_the_backward_pass(function):
    q, k, v = (x.requires_grad_() for x in qkv())
    out = function(q, k, v)
    douts = torch.ones(3, *out.shape, dtype=out.dtype)
    with pytest.raises(NotImplementedError, match=NO_TRANSFORM):
        vmap(lambda dout: torch.autograd.grad(out, q, dout, retain_graph=True))(douts)
    with pytest.raises(NotImplementedError, match=NO_TRANSFORM):
        torch.autograd.grad(out, q, douts, is_grads_batched=True)


def test_errors_keep_their_words_beside_a_transform():
    """A broken rule of a call that is not transformed is told as ever."""
    q, k, v = qkv()
    with pytest.raises(ValueError, match="k: got 2 sequences"):
        flash_attn_func(q, torch.cat([k, k]), torch.cat([v, v]))
