"""The drop-in contract: names, signatures, defaults, returns."""

import importlib
import inspect

import numpy as np
import pytest
import torch

import flash_attn_config
import flash_attn_interface
from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from reference import AttentionOptions, assert_attention_close

#: Parameters and defaults, in order, of FlashAttention-3's public functions.
SIGNATURES = {
    "flash_attn_func": (
        "q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_qkvpacked_func": (
        "qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
        "return_attn_probs=False"
    ),
    "flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, "
        "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False"
    ),
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
        "rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, "
        "return_softmax_lse=False"
    ),
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "_flash_attn_forward": (
        "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
        "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, "
        "kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
        "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
        "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, "
        "pack_gqa=None, sm_margin=0"
    ),
    "_flash_attn_backward": (
        "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, "
        "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0"
    ),
    "get_scheduler_metadata": (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0"
    ),
}

NAMES = {
    *SIGNATURES,
    "maybe_contiguous",
    "round_multiple",
    "round_up_headdim",
    "setup_context",
    "_backward",
    "FlashAttnQKVPackedFunc",
    "FlashAttnFunc",
    "FlashAttnVarlenFunc",
    "flash_attn_3_gpu",
    "USE_TRITON_ROCM",
    "_flash_attn_forward_fake",
    "_flash_attn_backward_fake",
}

FEATURES = [
    "BACKWARD",
    "SPLIT",
    "PAGEDKV",
    "APPENDKV",
    "LOCAL",
    "SOFTCAP",
    "PACKGQA",
    "FP16",
    "FP8",
    "VARLEN",
    "CLUSTER",
]
TILES = ["HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256"]
FLAGS = {f"FLASHATTENTION_DISABLE_{name}" for name in (*FEATURES, *TILES, "SM8x")} | {
    "FLASHATTENTION_ENABLE_VCOLMAJOR",
    "FLASH_ATTENTION_DISABLE_HDIMDIFF64",
    "FLASH_ATTENTION_DISABLE_HDIMDIFF192",
}


def parameters(function) -> list[tuple]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    contract = eval(f"lambda {SIGNATURES[name]}: None", {"torch": torch})
    function = getattr(flash_attn_interface, name)
    assert inspect.isfunction(function), "programs read the parameters"
    assert parameters(function) == parameters(contract)


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"])
def test_every_name_is_reachable(module):
    assert set(dir(importlib.import_module(module))) >= NAMES


def test_package():
    package = importlib.import_module("flash_attn_3")
    assert package.__version__ == "3.0.0"
    assert flash_attn_interface.flash_attn_3_gpu is torch.ops.flash_attn_3
    assert flash_attn_interface.USE_TRITON_ROCM is False
    for name in ("FlashAttnFunc", "FlashAttnVarlenFunc", "FlashAttnQKVPackedFunc"):
        assert issubclass(getattr(flash_attn_interface, name), torch.autograd.Function)


def test_config(capsys):
    flags = flash_attn_config.CONFIG["build_flags"]
    assert set(flags) == FLAGS
    assert all(isinstance(value, bool) for value in flags.values())
    assert importlib.import_module("flash_attn_3.flash_attn_config").CONFIG is flash_attn_config.CONFIG
    flash_attn_config.show()
    assert "FLASHATTENTION_DISABLE_BACKWARD" in capsys.readouterr().out


def test_small_helpers():
    assert [flash_attn_interface.round_multiple(x, 64) for x in (0, 1, 64, 65)] == [0, 64, 64, 128]
    head_dims = (8, 64, 72, 104, 136, 200, 256)
    assert [flash_attn_interface.round_up_headdim(d) for d in head_dims] == [64, 64, 96, 128, 192, 256, 256]
    x = torch.zeros(4, 8)
    assert flash_attn_interface.maybe_contiguous(None) is None
    assert flash_attn_interface.maybe_contiguous(x[:, ::2]).stride() == (4, 1)
    assert flash_attn_interface.maybe_contiguous(x[::2]).data_ptr() == x.data_ptr(), "a row stride needs no copy"


# -- returns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_returns_of_flash_attn_func(dtype):
    q, k, v = random_qkv((5, 9), heads=(4, 2), head_dims=(64, 128), dtype=dtype, batch=2)
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor)
    assert (out.shape, out.dtype) == ((2, 5, 4, 128), dtype)
    pair = flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(pair, tuple) and len(pair) == 2
    assert (pair[1].shape, pair[1].dtype) == ((2, 4, 5), torch.float32)
    assert_attention_close(*pair, q, k, v, AttentionOptions(softmax_scale=64**-0.5))


def test_returns_of_qkvpacked():
    packed = torch.randn(2, 7, 3, 4, 64).half()
    grouped = torch.randn(2, 7, 4 + 2 * 2, 64).half()
    out, lse = flash_attn_qkvpacked_func(packed, return_attn_probs=True)
    assert (out.shape, lse.shape) == ((2, 7, 4, 64), (2, 4, 7))
    assert torch.equal(out, flash_attn_func(*packed.unbind(2)))
    assert flash_attn_qkvpacked_func(grouped, num_heads_q=4).shape == (2, 7, 4, 64)
    assert flash_attn_qkvpacked_func(grouped, num_heads_q=6).shape == (2, 7, 6, 64)


def test_returns_of_varlen():
    q, k, v = random_qkv((5, 9), heads=(4, 2), batch=2, packed=True)
    cu_seqlens_q = torch.tensor([0, 5, 10], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 9, 18], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, 5, 9, return_attn_probs=True)
    assert (out.shape, lse.shape, lse.dtype) == ((10, 4, 64), (4, 10), torch.float32)
    # One by one: matrix products of other shapes may add up in another order.
    for q_rows, k_rows in ((slice(5), slice(9)), (slice(5, 10), slice(9, 18))):
        dense, dense_lse = flash_attn_func(q[None, q_rows], k[None, k_rows], v[None, k_rows], return_attn_probs=True)
        assert torch.equal(out[q_rows], dense[0])
        assert torch.equal(lse[:, q_rows], dense_lse[0])


def test_autograd_functions_take_the_arguments_of_flash_attention_3():
    q, k, v = random_qkv((20, 30), heads=(2, 2))
    expected = flash_attn_func(q, k, v, 0.3, True, window_size=(5, -1), return_attn_probs=True)
    options = (None, None, None, None, (5, -1), 0, 0.0, 1, None, False, 0, True)
    results = flash_attn_interface.FlashAttnFunc.apply(q, k, v, 0.3, True, *options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([0, 30], dtype=torch.int32)
    flat = (q[0], k[0], v[0], *cu_seqlens, None, None, 20, 30)
    results = flash_attn_interface.FlashAttnVarlenFunc.apply(*flat, 0.3, True, *options)
    assert all(torch.equal(a, b[0]) for a, b in zip(results, expected, strict=True))
    qkv = torch.stack([q, q, q], dim=2)
    out = flash_attn_interface.FlashAttnQKVPackedFunc.apply(qkv, 0.3, True)
    assert torch.equal(out, flash_attn_func(q, q, q, 0.3, True))


@pytest.mark.parametrize("dense_side", ["q", "k"])
def test_varlen_with_one_dense_side(dense_side):
    q, k, v = random_qkv((5, 9), heads=(4, 2), batch=2)
    cu_seqlens_q = torch.tensor([0, 5, 10], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 9, 18], dtype=torch.int32)
    expected = flash_attn_func(q, k, v, causal=True)
    if dense_side == "q":
        out = flash_attn_varlen_func(q, k.flatten(0, 1), v.flatten(0, 1), None, cu_seqlens_k, None, 9, causal=True)
    else:
        out = flash_attn_varlen_func(q.flatten(0, 1), k, v, cu_seqlens_q, None, 5, None, causal=True)
    assert torch.equal(out.reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "window_size",
    [
        pytest.param([3, 1], id="list"),
        pytest.param(torch.tensor([3, 1]), id="tensor"),
        pytest.param((torch.tensor(3), 1), id="tensor_side"),
    ],
)
def test_window_size_in_any_guise(window_size):
    q, k, v = random_qkv((20, 30))
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v, window_size=(3, 1)))


@pytest.mark.parametrize("window_size", [None, (None, None), (-1, None), [-1, -1], (-7, -1), (10**12, 10**12)])
def test_unlimited_windows(window_size):
    """W2: None and -1 mean the same."""
    q, k, v = random_qkv((20, 30))
    assert torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v))


def test_scales_in_any_guise():
    q, k, v = random_qkv((20, 30))
    expected = flash_attn_func(q, k, v, softmax_scale=2.0, softcap=3.0)
    for kind in (int, np.float16, torch.tensor):
        assert torch.equal(flash_attn_func(q, k, v, softmax_scale=kind(2), softcap=kind(3)), expected)


def test_bools_in_any_guise():
    q, k, v = random_qkv((20, 30), heads=(4, 2))
    expected = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    for true in (1, np.True_, np.int8(1)):
        found = flash_attn_func(q, k, v, causal=true, deterministic=true, pack_gqa=true, return_attn_probs=true)
        assert all(map(torch.equal, found, expected))


def test_max_seqlen_as_tensor():
    q, k, v = random_qkv((20, 30), packed=True)
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32), torch.tensor([0, 30], dtype=torch.int32)
    expected = flash_attn_varlen_func(q, k, v, *cu_seqlens, 20, 30)
    assert torch.equal(flash_attn_varlen_func(q, k, v, *cu_seqlens, torch.tensor(20), torch.tensor(30)), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"num_splits": 0},
        {"num_splits": -3},
        {"pack_gqa": True},
        {"pack_gqa": False},
        {"deterministic": True},
        {"sm_margin": 100},
        {"q_descale": torch.ones(1, 1).expand(1, 1), "k_descale": torch.full((1, 1), 7.0)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_no_value(options):
    q, k, v = random_qkv((20, 30))
    assert torch.equal(flash_attn_func(q, k, v, **options), flash_attn_func(q, k, v))


def test_last_stride_is_made_contiguous():
    q, k, v = random_qkv((20, 30), heads=(2, 2))
    column_major = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert all(x.stride(-1) != 1 for x in column_major)
    assert torch.equal(flash_attn_func(*column_major), flash_attn_func(q, k, v))


# -- what is not there yet ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_attn_with_kvcache", [torch.zeros(1, 1, 1, 64)] * 3),
        ("flash_attn_combine", [torch.zeros(2, 1, 1, 1, 64), torch.zeros(2, 1, 1, 1)]),
        ("get_scheduler_metadata", [1, 1, 1, 1, 1, 64, torch.zeros(1)]),
    ],
)
def test_functions_not_available_yet(name, arguments):
    with pytest.raises(NotImplementedError, match=name):
        getattr(flash_attn_interface, name)(*arguments)


@pytest.mark.parametrize(("name", "value"), [("qv", torch.zeros(1, 20, 2, 64)), ("num_splits", 2)])
def test_arguments_not_available_yet(name, value):
    q, k, v = random_qkv((20, 30))
    with pytest.raises(NotImplementedError, match=f"^{name}: "):
        flash_attn_func(q, k, v, **{name: value})


def test_fp8_is_not_available_yet():
    q, k, v = (x.to(torch.float8_e4m3fn) for x in random_qkv((20, 30)))
    with pytest.raises(NotImplementedError, match=r"q: .*FP8"):
        flash_attn_func(q, k, v)
