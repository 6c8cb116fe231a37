"""Every rule of the forward pass: its error says which argument, what came, what is allowed; nothing is written."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cpu_calls import random_qkv
from flash_attn_3.problem import MAX_SEQLEN
from flash_attn_interface import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLOAT32_MAX = torch.finfo(torch.float32).max


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense() -> dict[str, Any]:
    q, k, v = random_qkv((8, 12), heads=(4, 2), batch=2)
    return {"q": q, "k": k, "v": v}


def packed() -> dict[str, Any]:
    q, k, v = random_qkv((8, 12), heads=(4, 2), batch=2, packed=True)
    offsets = {"cu_seqlens_q": int32(0, 8, 16), "cu_seqlens_k": int32(0, 12, 24)}
    return {"q": q, "k": k, "v": v, **offsets, "max_seqlen_q": 8, "max_seqlen_k": 12}


def varlen(**arguments: Any) -> torch.Tensor:
    """`flash_attn_varlen_func`, all by name."""
    return flash_attn_varlen_func(**arguments)


def raw(**arguments: Any) -> tuple[torch.Tensor, ...]:
    return torch.ops.flash_attn_3.fwd(**arguments)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One broken rule: a valid call of ``function``, what is changed in it, and the error's type and words."""

    function: Callable
    change: dict[str, Any]
    error: type[Exception]
    words: list[str]

    @property
    def valid(self) -> dict[str, Any]:
        return packed() if self.function is varlen else dense()


def dense_rule(error: type[Exception], words: list[str], **change: Any) -> Rule:
    return Rule(flash_attn_func, change, error, words)


def varlen_rule(error: type[Exception], words: list[str], **change: Any) -> Rule:
    return Rule(varlen, change, error, words)


def raw_rule(error: type[Exception], words: list[str], **change: Any) -> Rule:
    return Rule(raw, change, error, words)


def head_dims(head_dim: int, head_dim_v: int) -> dict[str, torch.Tensor]:
    return {"q": zeros(2, 8, 4, head_dim), "k": zeros(2, 12, 2, head_dim), "v": zeros(2, 12, 2, head_dim_v)}


TENSOR_RULES = {
    "q_none": dense_rule(TypeError, ["q: ", "None", "torch.Tensor"], q=None),
    "k_list": dense_rule(TypeError, ["k: ", "list", "torch.Tensor"], k=[1.0]),
    "q_float32": dense_rule(TypeError, ["q: ", "float32", "bfloat16"], q=zeros(2, 8, 4, 64, dtype=FP32)),
    "q_float8_e5m2": dense_rule(
        TypeError, ["q: ", "float8_e5m2", "bfloat16"], q=zeros(2, 8, 4, 64, dtype=torch.float8_e5m2)
    ),
    "k_dtype": dense_rule(TypeError, ["k: ", "float16", "q's", "bfloat16"], k=zeros(2, 12, 2, 64, dtype=FP16)),
    "v_dtype": dense_rule(TypeError, ["v: ", "float16", "q's", "bfloat16"], v=zeros(2, 12, 2, 64, dtype=FP16)),
    "k_device": dense_rule(
        ValueError, ["k: ", "meta", "q's device, cpu"], k=torch.empty(2, 12, 2, 64, dtype=BF16, device="meta")
    ),
    "q_rank": dense_rule(ValueError, ["q: ", "(16, 4, 64)", "(batch, seqlen_q"], q=zeros(16, 4, 64)),
    "q_scalar": dense_rule(ValueError, ["q: ", "()", "(batch, seqlen_q"], q=zeros()),
    "k_rank": dense_rule(ValueError, ["k: ", "(24, 2, 64)", "(batch, seqlen_k"], k=zeros(24, 2, 64)),
    "v_rank": dense_rule(ValueError, ["v: ", "(24, 2, 64)", "head_dim_v"], v=zeros(24, 2, 64)),
    "v_seqlen": dense_rule(ValueError, ["v: ", "(2, 11, 2, 64)", "(2, 12, 2, 64)"], v=zeros(2, 11, 2, 64)),
    "v_heads": dense_rule(ValueError, ["v: ", "(2, 12, 4, 64)", "(2, 12, 2, 64)"], v=zeros(2, 12, 4, 64)),
    "batch": dense_rule(
        ValueError, ["k: ", "3 sequences", "2 sequences"], k=zeros(3, 12, 2, 64), v=zeros(3, 12, 2, 64)
    ),
    "heads": dense_rule(
        ValueError, ["q: ", "4 heads", "multiple of k's heads, 3"], k=zeros(2, 12, 3, 64), v=zeros(2, 12, 3, 64)
    ),
    "more_kv_heads": dense_rule(
        ValueError, ["q: ", "4 heads", "multiple of k's heads, 8"], k=zeros(2, 12, 8, 64), v=zeros(2, 12, 8, 64)
    ),
    "no_kv_heads": dense_rule(
        ValueError, ["k: ", "0 heads", "at least one"], k=zeros(2, 12, 0, 64), v=zeros(2, 12, 0, 64)
    ),
    "head_dim_of_k": dense_rule(ValueError, ["k: ", "head_dim 72", "64"], k=zeros(2, 12, 2, 72)),
    "head_dim_0": dense_rule(ValueError, ["q: ", "head_dim 0", "from 8 to 256"], **head_dims(0, 0)),
    "head_dim_264": dense_rule(ValueError, ["q: ", "head_dim 264", "from 8 to 256"], **head_dims(264, 264)),
    "head_dim_v_520": dense_rule(ValueError, ["v: ", "head_dim_v 520", "from 8 to 512"], **head_dims(64, 520)),
    "q_descale_shape": dense_rule(ValueError, ["q_descale: ", "(2, 4)", "(2, 2)"], q_descale=torch.ones(2, 4)),
    "k_descale_shape": dense_rule(ValueError, ["k_descale: ", "(2,)", "(2, 2)"], k_descale=torch.ones(2)),
    "v_descale_dtype": dense_rule(TypeError, ["v_descale: ", "bfloat16", "float32"], v_descale=zeros(2, 2)),
}
# L4: no head dim between the steps of 8.
TENSOR_RULES |= {
    f"head_dim_{d}": dense_rule(ValueError, ["q: ", f"head_dim {d};", "multiple of 8"], **head_dims(d, d))
    for d in (1, 59, 111, 250)
}
TENSOR_RULES |= {
    f"head_dim_v_{dv}": dense_rule(ValueError, ["v: ", f"head_dim_v {dv};", "multiple of 8"], **head_dims(64, dv))
    for dv in (0, 1, 60)
}
TENSOR_RULES |= {
    f"head_dims_{d}_{dv}": dense_rule(
        ValueError, ["v: ", f"head_dim_v {dv} with head_dim {d}", "head_dim itself"], **head_dims(d, dv)
    )
    for d, dv in [(72, 64), (72, 80), (128, 64), (128, 256), (136, 96), (192, 136), (192, 64), (200, 128), (256, 128)]
}

OPTION_RULES = {
    "softmax_scale_0": dense_rule(ValueError, ["softmax_scale: ", "0.0", "> 0"], softmax_scale=0.0),
    "softmax_scale_negative": dense_rule(ValueError, ["softmax_scale: ", "-1.0", "> 0"], softmax_scale=-1.0),
    "softmax_scale_nan": dense_rule(ValueError, ["softmax_scale: ", "nan", "> 0"], softmax_scale=math.nan),
    "softmax_scale_inf": dense_rule(ValueError, ["softmax_scale: ", "inf", "at most"], softmax_scale=math.inf),
    "softmax_scale_float32": dense_rule(ValueError, ["softmax_scale: ", "at most"], softmax_scale=FLOAT32_MAX),
    "softmax_scale_text": dense_rule(TypeError, ["softmax_scale: ", "'1'", "str", "float"], softmax_scale="1"),
    "softmax_scale_vector": dense_rule(TypeError, ["softmax_scale: ", "float"], softmax_scale=torch.ones(2)),
    "softcap_negative": dense_rule(ValueError, ["softcap: ", "-1.0", ">= 0"], softcap=-1.0),
    "softcap_nan": dense_rule(ValueError, ["softcap: ", "nan", ">= 0"], softcap=math.nan),
    "softcap_inf": dense_rule(ValueError, ["softcap: ", "inf", "at most"], softcap=math.inf),
    "softcap_tiny": dense_rule(ValueError, ["softcap: ", "1e-300", "softmax_scale / softcap"], softcap=1e-300),
    "softcap_none": dense_rule(TypeError, ["softcap: ", "None", "float"], softcap=None),
    "softcap_text": dense_rule(TypeError, ["softcap: ", "'1'", "str", "float"], softcap="1"),
    "softcap_vector": dense_rule(TypeError, ["softcap: ", "float"], softcap=torch.ones(2)),
    "softcap_unhashable": dense_rule(TypeError, ["softcap: ", "[1.0]", "float"], softcap=[1.0]),
    "window_int": dense_rule(TypeError, ["window_size: ", "3", "pair of ints"], window_size=3),
    "window_short": dense_rule(TypeError, ["window_size: ", "(3,)", "pair of ints"], window_size=(3,)),
    "window_float": dense_rule(TypeError, ["window_size[0]: ", "0.5", "int"], window_size=(0.5, 0)),
    "window_text": dense_rule(TypeError, ["window_size[1]: ", "'a'", "int"], window_size=(0, "a")),
    "window_float_tensor": dense_rule(TypeError, ["window_size[0]: ", "int"], window_size=torch.tensor([1.5, 2.0])),
    "chunk_negative": dense_rule(ValueError, ["attention_chunk: ", "-1", ">= 0"], attention_chunk=-1),
    "chunk_huge": dense_rule(ValueError, ["attention_chunk: ", str(2**31)], attention_chunk=2**31),
    "chunk_float": dense_rule(TypeError, ["attention_chunk: ", "2.5", "int"], attention_chunk=2.5),
    "num_splits": dense_rule(ValueError, ["num_splits: ", "257", "<= 256"], num_splits=257),
    "num_splits_float": dense_rule(TypeError, ["num_splits: ", "0.5", "int"], num_splits=0.5),
    "pack_gqa_text": dense_rule(TypeError, ["pack_gqa: ", "'yes'", "True, False or None"], pack_gqa="yes"),
    "pack_gqa_unhashable": dense_rule(TypeError, ["pack_gqa: ", "[]", "True, False or None"], pack_gqa=[]),
    "pack_gqa_2": dense_rule(TypeError, ["pack_gqa: ", "2", "int", "True, False or None"], pack_gqa=2),
    "sm_margin_negative": dense_rule(ValueError, ["sm_margin: ", "-1", ">= 0"], sm_margin=-1),
    "sm_margin_all": dense_rule(ValueError, ["sm_margin: ", "132", "132 multiprocessors"], sm_margin=132),
    "sm_margin_float": dense_rule(TypeError, ["sm_margin: ", "1.5", "int"], sm_margin=1.5),
}

#: What counts as True elsewhere, and would be a surprise here.
NO_BOOLS = {
    "text": "no",
    "none": None,
    "2": 2,
    "float": 1.0,
    "list": [],
    "tensor": torch.tensor(True),
    "vector": torch.tensor([True, False]),
    "array": np.array([True, False]),
}
OPTION_RULES |= {
    f"{option}_{name}": dense_rule(TypeError, [f"{option}: ", "True or False"], **{option: value})
    for option in ("causal", "deterministic", "return_attn_probs")
    for name, value in NO_BOOLS.items()
}

VARLEN_RULES = {
    "rank_q": varlen_rule(ValueError, ["q: ", "(2, 8, 4, 64)", "(total_q", "cu_seqlens_q"], q=zeros(2, 8, 4, 64)),
    "rank_k": varlen_rule(ValueError, ["k: ", "(2, 12, 2, 64)", "(total_k", "cu_seqlens_k"], k=zeros(2, 12, 2, 64)),
    "rank_v": varlen_rule(ValueError, ["v: ", "(2, 12, 2, 64)", "(total_k", "cu_seqlens_k"], v=zeros(2, 12, 2, 64)),
    "batch": varlen_rule(ValueError, ["cu_seqlens_k: ", "3 sequences", "2 sequences"], cu_seqlens_k=int32(0, 5, 9, 24)),
    "sides_swapped": varlen_rule(ValueError, ["q: ", "(16, 4, 64)", "without cu_seqlens_q"], cu_seqlens_q=None),
}
for _side in ("q", "k"):
    _column, _strided = int32(0, 8, 16)[:, None], int32(0, 0, 8, 8, 16, 16)[::2]
    _even = int32(0, 8, 16)
    _cu, _used, _longest = f"cu_seqlens_{_side}", f"seqused_{_side}", f"max_seqlen_{_side}"
    VARLEN_RULES |= {
        f"{_cu}_list": varlen_rule(TypeError, [f"{_cu}: ", "list", "torch.Tensor"], **{_cu: [0, 8, 16]}),
        f"{_cu}_int64": varlen_rule(TypeError, [f"{_cu}: ", "int64", "int32"], **{_cu: torch.tensor([0, 8, 16])}),
        f"{_cu}_rank": varlen_rule(ValueError, [f"{_cu}: ", "(3, 1)", "(batch + 1,)"], **{_cu: _column}),
        f"{_cu}_empty": varlen_rule(ValueError, [f"{_cu}: ", "(0,)", "(batch + 1,)"], **{_cu: int32()}),
        f"{_cu}_beyond": varlen_rule(
            ValueError, [f"{_cu}: ", "from 0 to 25", f"the rows of {_side}"], **{_cu: int32(0, 8, 25)}
        ),
        f"{_cu}_beyond_in_the_middle": varlen_rule(
            ValueError, [f"{_cu}: ", "from 0 to 99", f"the rows of {_side}"], **{_cu: int32(0, 99, 16)}
        ),
        f"{_cu}_negative": varlen_rule(
            ValueError, [f"{_cu}: ", "from -1 to 16", f"the rows of {_side}"], **{_cu: int32(-1, 8, 16)}
        ),
        f"{_cu}_decreasing": varlen_rule(
            ValueError, [f"{_cu}: ", "8 after 12", "never decrease"], **{_cu: int32(0, 12, 8)}, **{_longest: 24}
        ),
        f"{_longest}_too_short": varlen_rule(
            ValueError, [f"{_longest}: ", "got 7", "at least 8", "longest sequence"], **{_cu: _even, _longest: 7}
        ),
        f"{_longest}_0": varlen_rule(ValueError, [f"{_longest}: ", "got 0", "at least 8"], **{_cu: _even, _longest: 0}),
        f"{_longest}_shorter_than_used": varlen_rule(
            ValueError, [f"{_longest}: ", "got 5", "at least 6"], **{_cu: _even, _used: int32(3, 6), _longest: 5}
        ),
        f"{_cu}_strided": varlen_rule(ValueError, [f"{_cu}: ", "(2,)", "contiguous"], **{_cu: _strided}),
        f"{_cu}_device": varlen_rule(ValueError, [f"{_cu}: ", "meta", "cpu"], **{_cu: int32(0, 8, 16).to("meta")}),
        f"{_longest}_none": varlen_rule(ValueError, [f"{_longest}: ", "None", _cu], **{_longest: None}),
        f"{_longest}_negative": varlen_rule(ValueError, [f"{_longest}: ", "-1", ">= 0"], **{_longest: -1}),
        f"{_longest}_huge": varlen_rule(
            ValueError, [f"{_longest}: ", str(MAX_SEQLEN + 1)], **{_longest: MAX_SEQLEN + 1}
        ),
        f"{_longest}_float": varlen_rule(TypeError, [f"{_longest}: ", "8.0", "int"], **{_longest: 8.0}),
        f"{_used}_int64": varlen_rule(TypeError, [f"{_used}: ", "int64", "int32"], **{_used: torch.tensor([8, 8])}),
        f"{_used}_shape": varlen_rule(ValueError, [f"{_used}: ", "(3,)", "(2,)"], **{_used: int32(8, 8, 8)}),
        f"{_used}_strided": varlen_rule(ValueError, [f"{_used}: ", "(2,)", "contiguous"], **{_used: _strided[1:]}),
    }

RAW_RULES = {
    "out_dtype": raw_rule(TypeError, ["out: ", "float32", "bfloat16"], out=zeros(2, 8, 4, 64, dtype=FP32)),
    "out_shape": raw_rule(ValueError, ["out: ", "(2, 8, 4, 72)", "(2, 8, 4, 64)"], out=zeros(2, 8, 4, 72)),
    "out_stride": raw_rule(ValueError, ["out: ", "stride 2", "contiguous"], out=zeros(2, 8, 4, 128)[..., ::2]),
    "out_device": raw_rule(ValueError, ["out: ", "meta", "cpu"], out=zeros(2, 8, 4, 64).to("meta")),
    "q_stride": raw_rule(ValueError, ["q: ", "stride 2", "contiguous"], q=zeros(2, 8, 4, 128)[..., ::2]),
    "k_stride": raw_rule(ValueError, ["k: ", "stride 2", "contiguous"], k=zeros(2, 12, 2, 128)[..., ::2]),
    "v_stride": raw_rule(ValueError, ["v: ", "stride 2", "contiguous"], v=zeros(2, 12, 2, 128)[..., ::2]),
    "max_seqlen_q": raw_rule(
        ValueError, ["max_seqlen_q: ", "None", "cu_seqlens_q"], q=zeros(16, 4, 64), cu_seqlens_q=int32(0, 8, 16)
    ),
}
RULES = {
    f"{table}-{name}": rule
    for table, rules in [
        ("tensor", TENSOR_RULES),
        ("option", OPTION_RULES),
        ("varlen", VARLEN_RULES),
        ("raw", RAW_RULES),
    ]
    for name, rule in rules.items()
}


@pytest.mark.parametrize("rule", [pytest.param(rule, id=name) for name, rule in RULES.items()])
def test_broken_rule(rule):
    expected = rule.function(**rule.valid)
    arguments = rule.valid | rule.change
    copies = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for _ in range(2):  # a verdict must not depend on whether it was given before
        with pytest.raises(rule.error) as caught:
            rule.function(**arguments)
        assert type(caught.value) is rule.error
        text = str(caught.value)
        assert text.startswith(rule.words[0])
        for word in rule.words:
            assert word in text
        assert re.search(r"must be|given together", text), "the text says what is allowed"
    for name, copy in copies.items():
        assert copy.is_meta or torch.equal(arguments[name].view(copy.dtype), copy), f"{name} was written"
    again = rule.function(**rule.valid)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize(
    ("shape", "num_heads_q", "words"),
    [
        ((2, 8, 4, 2, 64), None, ["qkv: ", "(2, 8, 4, 2, 64)", "(batch, seqlen, 3, heads, head_dim)"]),
        ((8, 6, 64), 2, ["qkv: ", "(8, 6, 64)", "heads_q + 2 * heads_kv"]),
        ((2, 8, 6, 64), None, ["num_heads_q: ", "None"]),
        ((2, 8, 6, 64), 3, ["num_heads_q: ", "3 of qkv's 6 heads", "even number"]),
        ((2, 8, 6, 64), 6, ["num_heads_q: ", "6 of qkv's 6 heads", "even number"]),
        ((2, 8, 6, 64), 8, ["num_heads_q: ", "8 of qkv's 6 heads"]),
        ((2, 8, 6, 64), 0, ["num_heads_q: ", "0 of qkv's 6 heads", "at least 1"]),
        ((2, 8, 6, 64), -2, ["num_heads_q: ", "-2 of qkv's 6 heads", "at least 1"]),
        ((2, 8, 3, 4, 64), 2, ["num_heads_q: ", "2", "None or qkv's heads, 4"]),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_broken_packing(shape, num_heads_q, words, requires_grad):
    with pytest.raises(ValueError) as caught:
        flash_attn_qkvpacked_func(zeros(*shape).requires_grad_(requires_grad), num_heads_q=num_heads_q)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("shape", [(2, 8, 6, 64), (2, 8, 3, 2, 64)], ids=len)
@pytest.mark.parametrize("num_heads_q", [2.0, "2", torch.tensor([2, 2])], ids=str)
def test_number_of_heads_that_is_none(shape, num_heads_q):
    with pytest.raises(TypeError, match=r"^num_heads_q: got .* of type .*; it must be an int$"):
        flash_attn_qkvpacked_func(zeros(*shape), num_heads_q=num_heads_q)


def test_number_of_heads_that_is_not_needed():
    """FlashAttention-3 ignores it beside three parts of the same size; here it may at least not be wrong."""
    packed = torch.randn(2, 8, 3, 2, 64).bfloat16()
    expected = flash_attn_qkvpacked_func(packed)
    assert torch.equal(flash_attn_qkvpacked_func(packed, num_heads_q=np.int64(2)), expected)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("option", ["causal", "deterministic", "return_attn_probs"])
@pytest.mark.parametrize("function", [flash_attn_func, varlen, flash_attn_qkvpacked_func])
def test_every_function_has_the_rule_of_bools(function, option, requires_grad):
    """An option that only the backward pass reads is judged in the forward pass, wanted or not."""
    if function is flash_attn_qkvpacked_func:
        arguments = {"qkv": zeros(2, 8, 3, 2, 64).requires_grad_(requires_grad)}
    else:
        arguments = packed() if function is varlen else dense()
        arguments["q"].requires_grad_(requires_grad)
    with pytest.raises(TypeError, match=f"^{option}: got 'no' of type str; it must be True or False$"):
        function(**arguments, **{option: "no"})


def test_compiled_calls_have_the_rule_of_bools():
    q, k, v = dense().values()
    for option in ("causal", "deterministic", "return_attn_probs", "pack_gqa"):
        compiled = torch.compile(lambda q, option=option: flash_attn_func(q, k, v, **{option: 2}), backend="eager")
        with pytest.raises(Exception, match=f"{option}: got 2 of type int; it must be True"):
            compiled(q)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("function", [flash_attn_func, varlen, raw])
def test_sparse_tensors(function, name, requires_grad):
    arguments = packed() if function is varlen else dense()
    arguments[name] = arguments[name].to_sparse().requires_grad_(requires_grad)
    with pytest.raises(TypeError, match=f"^{name}: got a tensor of layout torch.sparse_coo; it must be dense"):
        function(**arguments)


def test_packed_argument_is_no_tensor():
    with pytest.raises(TypeError, match="qkv: got a list"):
        flash_attn_qkvpacked_func([1.0])


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 0.0},
        {"softcap": 0},
        {"softmax_scale": np.float32(0.5)},
        {"softmax_scale": 1e-45},
        {"window_size": (np.int64(3), -1)},
        {"attention_chunk": np.int32(4)},
        {"attention_chunk": 2**31 - 1},
        {"sm_margin": 131},
        {"causal": 1},
        {"causal": np.True_},
        {"causal": np.int64(0)},
        {"deterministic": np.False_},
        {"return_attn_probs": 0},
        {"pack_gqa": np.True_},
        {"pack_gqa": 0},
        {"softcap": np.float32(2)},
        {"softcap": torch.tensor(2.0)},
        {"softmax_scale": torch.tensor([0.5])},
        {"q": zeros(2, 8, 0, 64)},
        {"q": zeros(2, 0, 4, 64)},
    ],
    ids=str,
)
def test_what_no_rule_forbids(change):
    arguments = dense() | change
    assert flash_attn_func(**arguments).shape == arguments["q"].shape


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(8, 8), (64, 8), (8, 512), (136, 104), (192, 128), (256, 256)])
def test_allowed_head_dims(head_dim, head_dim_v):
    assert flash_attn_func(**head_dims(head_dim, head_dim_v)).shape == (2, 8, 4, head_dim_v)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("seqused", [[5, 3], [5, -1], [0, 5]], ids=str)
def test_max_seqlen_counts_the_rows_that_take_part(seqused, side):
    """Segments of 8 or 12 rows, of which at most 5 are used."""
    call = packed() | {f"seqused_{side}": int32(*seqused)}
    expected = varlen(**call)
    taking_part = [slice(begin, begin + max(0, used)) for begin, used in zip((0, 8), seqused, strict=True)]
    rows = taking_part if side == "q" else [slice(None)]
    found = varlen(**call | {f"max_seqlen_{side}": 5})
    assert all(torch.equal(found[x], expected[x]) for x in rows)


@pytest.mark.parametrize(
    "change", [{"max_seqlen_q": 7}, {"max_seqlen_k": 0}, {"cu_seqlens_q": int32(0, 12, 8)}], ids=str
)
def test_the_backward_pass_checks_index_values(change):
    call = packed()
    q, k, v = (call.pop(name) for name in "qkv")
    out, lse = varlen(q=q, k=k, v=v, **call, return_attn_probs=True)
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: got"):
        torch.ops.flash_attn_3.bwd(torch.ones_like(out), q, k, v, out, lse, dq=torch.empty_like(q), **call | change)


def test_max_seqlen_is_read_only_with_cu_seqlens():
    q, k, v = dense().values()
    assert flash_attn_varlen_func(q, k, v, None, None, None, -5).shape == q.shape
