"""Gradients through the public functions in eager mode."""

import functools
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import flash_attn_interface
from cpu_calls import MASKS, offsets, random_qkv
from flash_attn_3 import dispatch
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from gradient_calls import random_gradients
from gradient_reference import assert_gradients_close, gradients
from reference import AttentionOptions, Sequences, assert_out_close, attention, cosine_distance

README = Path(__file__).resolve().parents[2] / "README.md"
OPTIONS = MASKS | {"scale_softcap": AttentionOptions(softmax_scale=0.3, causal=True, softcap=5.0)}


def keywords(options: AttentionOptions) -> dict:
    return {
        "softmax_scale": options.softmax_scale,
        "causal": options.causal,
        "window_size": options.window_size,
        "attention_chunk": options.attention_chunk,
        "softcap": options.softcap,
    }


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def leaves(tensors) -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


@pytest.fixture
def addresses(monkeypatch) -> list[list[int | None]]:
    """Where the memory of the gradients begins that `dispatch.backward` returns from now on, None for no gradient."""
    found = []
    backward = dispatch.backward

    def watched_backward(*arguments):
        gradients, statistics = backward(*arguments)
        found.append([None if x is None else x.untyped_storage().data_ptr() for x in gradients])
        return gradients, statistics

    monkeypatch.setattr(dispatch, "backward", watched_backward)
    return found


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_func(name, with_dlse):
    q, k, v = leaves(random_qkv((113, 203), heads=(6, 2), head_dims=(72, 72), batch=2))
    dout, dlse = random_gradients(q, v)
    outputs = flash_attn_func(q, k, v, **keywords(OPTIONS[name]), return_attn_probs=True)
    torch.autograd.backward(outputs if with_dlse else outputs[:1], (dout, dlse) if with_dlse else (dout,))
    found = (q.grad, k.grad, v.grad)
    assert_gradients_close(found, q, k, v, dout, dlse if with_dlse else None, OPTIONS[name])


@pytest.mark.parametrize("head_dims", [(192, 128), (64, 256), (256, 256)], ids=str)
def test_wide_heads(head_dims):
    q, k, v = leaves(random_qkv((70, 130), head_dims=head_dims, dtype=torch.float16))
    dout, _ = random_gradients(q, v)
    found = torch.autograd.grad(flash_attn_func(q, k, v, causal=True, deterministic=True), (q, k, v), dout)
    assert_gradients_close(found, q, k, v, dout, options=AttentionOptions(causal=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name):
    """N11, W6: rows that take no part have gradient 0, whatever the gradient of their output is."""
    lengths_q, lengths_k = [0, 130, 1, 60], [70, 41, 200, 0]
    seqused_q, seqused_k = [0, 99, 1, 60], [70, 41, 150, 0]
    tensors = random_qkv((sum(lengths_q), sum(lengths_k)), heads=(4, 2), packed=True)
    q, k, v = leaves(torch.cat([x, x[:5]]) for x in tensors)
    dout, dlse = random_gradients(q, v)
    outputs = flash_attn_varlen_func(
        q,
        k,
        v,
        int32(offsets(lengths_q)),
        int32(offsets(lengths_k)),
        max(lengths_q),
        max(lengths_k),
        seqused_q=int32(seqused_q),
        seqused_k=int32(seqused_k),
        **keywords(OPTIONS[name]),
        return_attn_probs=True,
    )
    found = torch.autograd.grad(outputs, (q, k, v), (dout, dlse))
    sequences = Sequences(offsets(lengths_q), offsets(lengths_k), seqused_q, seqused_k)
    assert_gradients_close(found, q, k, v, dout, dlse, OPTIONS[name], sequences)
    assert (found[0][99:130] == 0).all() and (found[0][191:] == 0).all() and (found[1][311:] == 0).all()


@pytest.mark.parametrize("num_heads_q", [None, 6])
def test_flash_attn_qkvpacked_func(num_heads_q):
    """L8: one gradient for one tensor."""
    shape = (2, 90, 3, 2, 64) if num_heads_q is None else (2, 90, num_heads_q + 2 * 2, 64)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().requires_grad_()
    split = functools.partial(torch.unbind, dim=2) if num_heads_q is None else lambda x: x.split([6, 2, 2], dim=2)
    q, k, v = split(qkv.detach())
    dout, dlse = random_gradients(q, v)
    options = OPTIONS["causal_window"]
    outputs = flash_attn_qkvpacked_func(qkv, **keywords(options), num_heads_q=num_heads_q, return_attn_probs=True)
    (dqkv,) = torch.autograd.grad(outputs, [qkv], (dout, dlse))
    assert dqkv.shape == qkv.shape and dqkv.is_contiguous()
    assert_gradients_close(split(dqkv), q, k, v, dout, dlse, options)


def test_packed_gradients_are_written_in_place(addresses):
    """L1: no gradient of q, k and v beside the packed one."""
    qkv = torch.randn(2, 50, 3, 2, 64).half().requires_grad_()
    flash_attn_qkvpacked_func(qkv).sum().backward()
    assert addresses == [[qkv.grad.untyped_storage().data_ptr()] * 3]


def test_views_of_a_packed_projection():
    """L1: what most models do, with gradients flowing into one tensor."""
    projection = torch.randn(2, 60, 3 * 4 * 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    q, k, v = projection.unflatten(-1, (3, 4, 64)).unbind(2)
    out = flash_attn_func(q, k, v, causal=True)
    dout, _ = random_gradients(q.detach(), v.detach())
    (found,) = torch.autograd.grad(out, projection, dout)
    found = found.unflatten(-1, (3, 4, 64)).unbind(2)
    assert_gradients_close(found, q.detach(), k.detach(), v.detach(), dout, options=AttentionOptions(causal=True))


@pytest.fixture
def dirty_memory():
    """torch.empty hands out memory full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["full", "causal", "window"])
def test_dirty_memory(name, dirty_memory):
    """N10, N12, R10: scratch and gradients hold NaN before, and another batch comes in between."""
    assert torch.empty(1).isnan()
    tensors = [torch.cat([x, x[:30]]) for x in random_qkv((150, 150), heads=(6, 2), packed=True)]
    dout, _ = random_gradients(tensors[0], tensors[2])
    for lengths in ([0, 70, 80], [150, 0, 0], [1, 100, 49], [0, 0, 0]):
        q, k, v = leaves(tensors)
        cu_seqlens = int32(offsets(lengths))
        options = OPTIONS[name]
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 150, 150, **keywords(options), deterministic=True)
        out.backward(dout)
        sequences = Sequences(offsets(lengths), offsets(lengths))
        assert_gradients_close((q.grad, k.grad, v.grad), q, k, v, dout, options=options, sequences=sequences)


# -- gradients of results in every guise -----------------------------------------------------------------------------


def expected_of(q, k, v, dout, dlse=None, **options):
    outputs = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    given = [(x, g) for x, g in zip(outputs, (dout, dlse), strict=True) if g is not None]
    return torch.autograd.grad([x for x, _ in given], (q, k, v), [g for _, g in given])


def test_strides_of_dout():
    """L1: expanded by a sum, strided in the last dimension, permuted."""
    q, k, v = leaves(random_qkv((40, 70), heads=(4, 2), batch=2))
    out = flash_attn_func(q, k, v)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    guises = {
        "sum": torch.ones((), dtype=out.dtype).expand(out.shape),
        "last": torch.stack([dout, dout], dim=-1)[..., 0],
        "permuted": dout.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
        "rows": torch.cat([dout, dout], dim=1)[:, : dout.shape[1]],
        "expanded_batch": dout[:1].expand(2, -1, -1, -1),
    }
    for name, guise in guises.items():
        found = torch.autograd.grad(out, (q, k, v), guise, retain_graph=True)
        expected = expected_of(q, k, v, guise.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    out.sum().backward()
    assert torch.equal(q.grad, expected_of(q, k, v, torch.ones_like(out))[0])


def test_gradient_of_the_log_sum_exp_alone():
    """FlashAttention-3 drops it: here dlse/dq is the softmax-weighted mean of the keys, and values have no part."""
    q, k, v = leaves(random_qkv((40, 70), heads=(4, 2)))
    _, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    found = torch.autograd.grad(lse.sum(), (q, k, v))
    ones = torch.ones(1, 1, 1).expand(lse.shape)
    assert_gradients_close(found, q, k, v, torch.zeros_like(q), ones)
    assert (found[2] == 0).all() and (found[0] != 0).any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_any_gradient_of_the_log_sum_exp_of_a_row_that_sees_nothing(poison):
    """Its log-sum-exp is a constant; a merge of partial results hands back what -inf minus -inf gives."""
    q, k, v = leaves(random_qkv((40, 25), heads=(4, 2)))
    results = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dout, dlse = random_gradients(q.detach(), v.detach())
    expected = torch.autograd.grad(results, (q, k, v), (dout, dlse), retain_graph=True)
    dlse[..., :15] = poison
    found = torch.autograd.grad(results, (q, k, v), (dout, dlse))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("names", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
def test_only_what_requires_a_gradient(names, addresses):
    tensors = dict(zip("qkv", random_qkv((40, 70), heads=(4, 2)), strict=True))
    dout, _ = random_gradients(tensors["q"], tensors["v"])
    expected = dict(zip("qkv", expected_of(*leaves(tensors.values()), dout), strict=True))
    for name in names:
        tensors[name].requires_grad_()
    addresses.clear()
    flash_attn_func(**tensors).backward(dout)
    assert [address is not None for address in addresses[0]] == [name in names for name in "qkv"], "computed"
    for name, tensor in tensors.items():
        assert torch.equal(tensor.grad, expected[name]) if name in names else tensor.grad is None


def test_no_gradient_wanted():
    q, k, v = leaves(random_qkv((40, 70)))
    with torch.no_grad():
        assert flash_attn_func(q, k, v).grad_fn is None
    with torch.inference_mode():
        assert flash_attn_func(q, k, v).is_inference()
    assert flash_attn_func(q.detach(), k.detach(), v.detach()).grad_fn is None


@pytest.mark.parametrize("lengths", [(5, 0), (0, 5), (0, 0)], ids=str)
def test_no_queries_or_no_keys(lengths):
    """N5, N9."""
    q, k, v = leaves(random_qkv(lengths, heads=(4, 2)))
    out, lse = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    torch.autograd.backward((out, lse), (torch.ones_like(out), torch.ones_like(lse)))
    for x in (q, k, v):
        assert x.grad.shape == x.shape and (x.grad == 0).all()


def test_too_wide_values_cannot_be_differentiated():
    q, k, v = leaves(random_qkv((20, 30), head_dims=(64, 512)))
    out = flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match="v: got head_dim_v 512; it must be at most 256 to be differentiated"):
        out.sum().backward()


# -- merges of partial results ---------------------------------------------------------------------------------------


@functools.cache
def recipe():
    """The README's code for a merge, but for its first statement, which computes the parts."""
    (block,) = [text for text in README.read_text().split("```") if "torch.logsumexp" in text]
    _, first, recipe = block.split("\n", 2)
    assert first.startswith("parts = ")
    return compile(recipe, README.name, "exec")


def merge(parts):
    """Attention over all keys from (out, lse) over disjoint ones: out (b, s, h, d), lse (b, h, s)."""
    names = {"torch": torch, "parts": parts}
    exec(recipe(), names)
    return names["out"]


def test_a_ring_of_partial_results_trains():
    """Two blocks of keys, merged by their log-sum-exps, have the gradients of the whole."""
    q, k, v = leaves(random_qkv((60, 120), heads=(4, 2), batch=2))
    parts = [flash_attn_func(q, k[:, i : i + 60], v[:, i : i + 60], return_attn_probs=True) for i in (0, 60)]
    dout, _ = random_gradients(q, v)
    found = torch.autograd.grad(merge(parts), (q, k, v), dout.float(), retain_graph=True)
    assert_gradients_close(found, q, k, v, dout)
    without = merge([(out, lse.detach()) for out, lse in parts])
    (wrong,) = torch.autograd.grad(without, q, dout.float())
    with pytest.raises(AssertionError, match="dq: largest error"):
        assert_gradients_close((wrong, None, None), q, k, v, dout)


def test_a_causal_ring_trains():
    """The second half of the queries of a causal pass: all of the first keys, its own ones causally."""
    q, k, v = leaves(random_qkv((64, 128), heads=(2, 2)))
    parts = [
        flash_attn_func(q, k[:, :64], v[:, :64], return_attn_probs=True),
        flash_attn_func(q, k[:, 64:], v[:, 64:], causal=True, return_attn_probs=True),
    ]
    dout, _ = random_gradients(q, v)
    found = torch.autograd.grad(merge(parts), (q, k, v), dout.float())
    assert_gradients_close(found, q, k, v, dout, options=AttentionOptions(causal=True))


def test_a_ring_with_rows_that_see_nothing():
    """N9: of 96 causal rows over 64 keys, 32 see no key, and 32 only the first of two blocks."""
    q, k, v = leaves(random_qkv((96, 64), heads=(4, 2), batch=2))
    parts = [
        flash_attn_func(q, k[:, :32], v[:, :32], window_size=(-1, 32), return_attn_probs=True),
        flash_attn_func(q, k[:, 32:], v[:, 32:], causal=True, return_attn_probs=True),
    ]
    unseen = torch.stack([(lse == -torch.inf)[0, 0] for _, lse in parts])
    assert unseen.sum(1).tolist() == [32, 64] and unseen.all(0).sum() == 32
    options = AttentionOptions(causal=True)
    out = merge(parts)
    with torch.no_grad():
        exact, same_precision = (attention(q, k, v, options, compute_dtype=x)[0] for x in (torch.float64, q.dtype))
        assert_out_close(out.to(q.dtype), exact, same_precision, options.softcap)
    assert (out[:, :32] == 0).all()
    dout, _ = random_gradients(q, v)
    found = torch.autograd.grad(out, (q, k, v), dout.float())
    assert_gradients_close(found, q, k, v, dout, options=options)
    assert (found[0][:, :32] == 0).all()


def test_a_sink_trains():
    """A learned score that takes part in the softmax without a value."""
    q, k, v = leaves(random_qkv((60, 120), heads=(4, 2)))
    sink = torch.linspace(-1, 3, 4).requires_grad_()
    dout, _ = random_gradients(q, v)

    def with_sink(out, lse):
        return out.double() * torch.sigmoid(lse.double() - sink[:, None]).transpose(1, 2)[..., None]

    wanted = (sink, q, k, v)
    found = torch.autograd.grad(with_sink(*flash_attn_func(q, k, v, return_attn_probs=True)), wanted, dout.double())
    exact = torch.autograd.grad(with_sink(*attention(q, k, v)), wanted, dout.double())
    for gradient, expected in zip(found, exact, strict=True):
        assert cosine_distance(gradient, expected) < 1e-4


# -- autograd's own business -----------------------------------------------------------------------------------------


def public_calls():
    q, k, v = random_qkv((20, 30), heads=(2, 2))
    packed = [x[0] for x in (q, k, v)]
    cu_seqlens = int32([0, 20]), int32([0, 30])
    yield "func", q, lambda q: flash_attn_func(q, k, v)
    yield "varlen", packed[0], lambda q: flash_attn_varlen_func(q, *packed[1:], *cu_seqlens, 20, 30)
    yield "qkvpacked", torch.randn(1, 20, 3, 2, 64).half(), flash_attn_qkvpacked_func
    yield "grouped", torch.randn(1, 20, 4, 64).half(), functools.partial(flash_attn_qkvpacked_func, num_heads_q=2)


PUBLIC_CALLS = [pytest.param(*call[1:], id=call[0]) for call in public_calls()]


@pytest.mark.parametrize(("leaf", "call"), PUBLIC_CALLS)
def test_gradients_have_no_gradient(leaf, call):
    """A second derivative is an error, not a wrong number; create_graph alone is none."""
    leaf = leaf.clone().requires_grad_()
    weights = torch.randn_like(call(leaf)).requires_grad_()
    (once,) = torch.autograd.grad(call(leaf), leaf, weights)
    (gradient,) = torch.autograd.grad(call(leaf), leaf, weights, create_graph=True)
    assert torch.equal(gradient, once)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        gradient.float().square().sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("leaf", "call"), PUBLIC_CALLS)
def test_activation_checkpointing(leaf, call, use_reentrant):
    plain, recomputed = leaves([leaf, leaf])
    call(plain * 2).square().sum().backward()
    checkpoint(lambda x: call(x * 2).square(), recomputed, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(recomputed.grad, plain.grad)


def test_selective_checkpointing_sees_the_operator():
    """A policy that keeps attention's results: the forward pass runs once."""
    calls = []
    operator = torch.ops.flash_attn_3._flash_attn_forward.default

    def policy(context, function, *args, **kwargs):
        if function is operator and not context.is_recompute:
            calls.append(function)
        return CheckpointPolicy.MUST_SAVE if function is operator else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = leaves(random_qkv((20, 30), heads=(4, 2)))
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(lambda q: flash_attn_func(q * 2, k, v).square(), q, use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    assert calls == [operator]
    expected = torch.autograd.grad(flash_attn_func(q * 2, k, v).square().sum(), (q, k, v))
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip((q, k, v), expected, strict=True))


def test_lengths_changed_between_the_passes():
    """Autograd notices that the offsets are no longer those of the forward pass."""
    q, k, v = leaves(random_qkv((20, 20), packed=True))
    cu_seqlens = int32([0, 8, 20])
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12)
    cu_seqlens[1] = 10
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_window_tensor_changed_between_the_passes():
    q, k, v = leaves(random_qkv((20, 20)))
    window = torch.tensor([3, 1])
    out = flash_attn_func(q, k, v, window_size=window)
    window.fill_(0)
    out.sum().backward()
    expected = torch.autograd.grad(flash_attn_func(q, k, v, window_size=(3, 1)).sum(), q)[0]
    assert torch.equal(q.grad, expected)


def test_backward_twice_over_a_kept_graph():
    q, k, v = leaves(random_qkv((20, 30)))
    out = flash_attn_func(q, k, v)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out.sum(), (q, k, v)), strict=True))


@pytest.mark.parametrize("is_packed", [False, True], ids=["func", "qkvpacked"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_options_reach_the_backward_pass(deterministic, is_packed, monkeypatch):
    """G7, and the margin of multiprocessors."""
    signatures = []
    prepare = dispatch.prepare_backward
    monkeypatch.setattr(dispatch, "prepare_backward", lambda call: signatures.append(call) or prepare(call))
    options = {"deterministic": deterministic, "sm_margin": 7, "attention_chunk": 9}
    if is_packed:
        out = flash_attn_qkvpacked_func(torch.randn(1, 20, 3, 2, 64).half().requires_grad_(), **options)
    else:
        out = flash_attn_func(*leaves(random_qkv((20, 30))), **options)
    out.sum().backward()
    (call,) = signatures
    assert (call.deterministic, call.forward.sm_margin, call.forward.attention_chunk) == (deterministic, 7, 9)


def test_autograd_functions_of_flash_attention_3_differentiate():
    """L8: as many gradients as there are differentiable arguments, by each class."""
    q, k, v = leaves(random_qkv((20, 30), heads=(2, 2)))
    options = (0.3, True, None, None, None, None, (5, -1), 0, 0.0, 1, None, True, 0, True)
    dout, dlse = random_gradients(q, v)
    expected = expected_of(q, k, v, dout, dlse, softmax_scale=0.3, causal=True, window_size=(5, -1))
    outputs = flash_attn_interface.FlashAttnFunc.apply(q, k, v, *options)
    found = torch.autograd.grad(outputs, (q, k, v), (dout, dlse))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    lengths = (int32([0, 20]), int32([0, 30]), None, None, 20, 30)
    outputs = flash_attn_interface.FlashAttnVarlenFunc.apply(q[0], k[0], v[0], *lengths, *options)
    found = torch.autograd.grad(outputs, (q, k, v), (dout[0], dlse[0]))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    qkv = torch.stack([q, q, q], dim=2).detach().requires_grad_()
    (dqkv,) = torch.autograd.grad(flash_attn_interface.FlashAttnQKVPackedFunc.apply(qkv, 0.3, True), qkv, dout)
    found = gradients(q, q, q, dout, options=AttentionOptions(softmax_scale=0.3, causal=True))
    assert (dqkv.double() - torch.stack(found, dim=2)).abs().max() < 0.05
