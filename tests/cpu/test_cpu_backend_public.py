"""The public functions on CPU tensors, end to end."""

import pytest
import torch

import flash_attn_interface
from cpu_calls import MASKS, offsets, random_qkv
from reference import AttentionOptions, Sequences, assert_attention_close


def keywords(options: AttentionOptions) -> dict:
    return {
        "softmax_scale": options.softmax_scale,
        "causal": options.causal,
        "window_size": options.window_size,
        "attention_chunk": options.attention_chunk,
        "softcap": options.softcap,
    }


OPTIONS = MASKS | {"scale_softcap": AttentionOptions(softmax_scale=0.3, causal=True, softcap=5.0)}


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_func(name):
    q, k, v = random_qkv((113, 203), heads=(6, 2), head_dims=(72, 72), batch=2)
    options = OPTIONS[name]
    out, lse = flash_attn_interface.flash_attn_func(q, k, v, **keywords(options), return_attn_probs=True)
    assert_attention_close(out, lse, q, k, v, options)
    assert torch.equal(flash_attn_interface.flash_attn_func(q, k, v, **keywords(options)), out)


@pytest.mark.parametrize("num_heads_q", [None, 6])
def test_flash_attn_qkvpacked_func(num_heads_q):
    shape = (2, 90, 3, 2, 64) if num_heads_q is None else (2, 90, num_heads_q + 2 * 2, 64)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = qkv.unbind(2) if num_heads_q is None else qkv.split([num_heads_q, 2, 2], dim=2)
    options = OPTIONS["causal_window"]
    out, lse = flash_attn_interface.flash_attn_qkvpacked_func(
        qkv, **keywords(options), num_heads_q=num_heads_q, return_attn_probs=True
    )
    assert_attention_close(out, lse, q, k, v, options)


@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_varlen_func(name):
    lengths_q, lengths_k = [0, 130, 1, 60], [70, 41, 200, 0]
    seqused_q, seqused_k = [0, 99, 1, 60], [70, 41, 150, 0]
    q, k, v = random_qkv((sum(lengths_q), sum(lengths_k)), heads=(4, 2), packed=True)
    sequences = Sequences(offsets(lengths_q), offsets(lengths_k), seqused_q, seqused_k)
    options = OPTIONS[name]

    def int32(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    out, lse = flash_attn_interface.flash_attn_varlen_func(
        q,
        k,
        v,
        int32(sequences.cu_seqlens_q),
        int32(sequences.cu_seqlens_k),
        max(lengths_q),
        max(lengths_k),
        seqused_q=int32(seqused_q),
        seqused_k=int32(seqused_k),
        **keywords(options),
        return_attn_probs=True,
    )
    # Rows past seqused_q hold whatever the allocation held; the checks expect NaN there.
    out[99:130], lse[:, 99:130] = float("nan"), float("nan")
    assert_attention_close(out, lse, q, k, v, options, sequences)


@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_the_model(autocast_dtype, dtype, compile_it):
    """Autocast would have the model's float32 products in 16 bits; results and gradients are those without it."""
    q, k, v = (x.requires_grad_() for x in random_qkv((60, 90), heads=(4, 2), dtype=dtype))

    def attention(q, k, v):
        return flash_attn_interface.flash_attn_func(q, k, v, causal=True, softcap=5.0, return_attn_probs=True)

    def results(function):
        out, lse = function(q, k, v)
        return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))

    expected = results(attention)
    torch._dynamo.reset()
    function = torch.compile(attention, fullgraph=True, backend="aot_eager") if compile_it else attention
    with torch.autocast("cpu", autocast_dtype):
        found = results(function)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("lengths", [(5, 0), (0, 5), (0, 0)], ids=str)
def test_no_queries_or_no_keys(lengths):
    """N5, N9."""
    q, k, v = random_qkv(lengths, heads=(4, 2))
    out, lse = flash_attn_interface.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert_attention_close(out, lse, q, k, v, OPTIONS["causal"])
