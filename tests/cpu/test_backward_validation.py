"""Every rule of the backward pass: its error says which argument, what came, what is allowed; nothing is written."""

import re
from typing import Any

import pytest
import torch

from cpu_calls import random_qkv
from flash_attn_interface import flash_attn_func

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN = float("nan")


def zeros(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense() -> dict[str, Any]:
    q, k, v = random_qkv((8, 12), heads=(4, 2), batch=2)
    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    gradients = {"dq": torch.full_like(q, NAN), "dk": torch.full_like(k, NAN), "dv": torch.full_like(v, NAN)}
    return {"dout": torch.ones_like(out), "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, **gradients}


#: A change of the valid call, the error, and its words.
RULES: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "q_float32": ({"q": zeros(2, 8, 4, 64, dtype=FP32)}, TypeError, ["q: ", "float32", "float16 or bfloat16"]),
    "k_dtype": ({"k": zeros(2, 12, 2, 64, dtype=FP16)}, TypeError, ["k: ", "float16", "q's", "bfloat16"]),
    "dout_dtype": ({"dout": zeros(2, 8, 4, 64, dtype=FP32)}, TypeError, ["dout: ", "float32", "bfloat16"]),
    "out_dtype": ({"out": zeros(2, 8, 4, 64, dtype=FP16)}, TypeError, ["out: ", "float16", "bfloat16"]),
    "lse_dtype": ({"softmax_lse": zeros(2, 4, 8)}, TypeError, ["softmax_lse: ", "bfloat16", "float32"]),
    "dk_dtype": ({"dk": zeros(2, 12, 2, 64, dtype=FP32)}, TypeError, ["dk: ", "float32", "bfloat16"]),
    "dout_shape": ({"dout": zeros(2, 8, 4, 32)}, ValueError, ["dout: ", "(2, 8, 4, 32)", "(2, 8, 4, 64)"]),
    "dout_rank": ({"dout": zeros(8, 4, 64)}, ValueError, ["dout: ", "3 dimensions", "4, like out"]),
    "out_shape": ({"out": zeros(2, 9, 4, 64)}, ValueError, ["out: ", "(2, 9, 4, 64)", "(2, 8, 4, 64)"]),
    "lse_shape": ({"softmax_lse": torch.zeros(2, 8, 4)}, ValueError, ["softmax_lse: ", "(2, 8, 4)", "(2, 4, 8)"]),
    "dq_shape": ({"dq": zeros(2, 8, 2, 64)}, ValueError, ["dq: ", "(2, 8, 2, 64)", "(2, 8, 4, 64)"]),
    "dv_shape": ({"dv": zeros(2, 12, 4, 64)}, ValueError, ["dv: ", "(2, 12, 4, 64)", "(2, 12, 2, 64)"]),
    "dq_rank": ({"dq": zeros(16, 4, 64)}, ValueError, ["dq: ", "3 dimensions", "4, like q"]),
    "dout_stride": ({"dout": torch.ones(()).bfloat16().expand(2, 8, 4, 64)}, ValueError, ["dout: ", "stride 0"]),
    "head_dim_4": (
        {"q": zeros(2, 8, 4, 4), "k": zeros(2, 12, 2, 4)},
        ValueError,
        ["q: ", "head_dim 4", "multiple of 8"],
    ),
    "head_dim_v_264": (
        {
            **{name: zeros(2, 8, 4, 264) for name in ("dout", "out")},
            **{name: zeros(2, 12, 2, 264) for name in ("v", "dv")},
        },
        ValueError,
        ["v: ", "head_dim_v 264", "at most 256 to be differentiated"],
    ),
    "heads": (
        {name: zeros(2, 12, 3, 64) for name in ("k", "v", "dk", "dv")},
        ValueError,
        ["q: ", "4 heads", "multiple of k's heads, 3"],
    ),
    "seqused_q_shape": ({"seqused_q": int32(1)}, ValueError, ["seqused_q: ", "(1,)", "(2,)"]),
    "seqused_k_dtype": ({"seqused_k": torch.tensor([1, 2])}, TypeError, ["seqused_k: ", "int64", "int32"]),
    "seqused_k_stride": ({"seqused_k": int32(1, 0, 2, 0)[::2]}, ValueError, ["seqused_k: ", "contiguous"]),
    "softmax_scale": ({"softmax_scale": -1.0}, ValueError, ["softmax_scale: ", "-1.0", "> 0"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap: ", "-1.0", ">= 0"]),
    "sm_margin": ({"sm_margin": 132}, ValueError, ["sm_margin: ", "132", "less than"]),
}


@pytest.mark.parametrize(("change", "error", "words"), RULES.values(), ids=RULES)
def test_broken_rule(change, error, words):
    valid = dense()
    arguments = valid | change
    with pytest.raises(error) as caught:
        torch.ops.flash_attn_3.bwd(**arguments)
    assert type(caught.value) is error
    text = str(caught.value)
    assert text.startswith(words[0]) and "must be" in text
    assert all(word in text for word in words)
    assert all(valid[name].isnan().all() for name in ("dq", "dk", "dv")), "nothing is written"
    torch.ops.flash_attn_3.bwd(**valid)
    assert not any(valid[name].isnan().any() for name in ("dq", "dk", "dv"))


def test_packed_shapes():
    q, k, v = random_qkv((8, 12), heads=(4, 2), packed=True)
    lengths = {"cu_seqlens_q": int32(0, 8), "cu_seqlens_k": int32(0, 12), "max_seqlen_q": 8, "max_seqlen_k": 12}
    call = {"dout": q, "q": q, "k": k, "v": v, "out": q, **lengths}
    with pytest.raises(ValueError, match=re.escape("softmax_lse: got 3 dimensions; it must be of 2")):
        torch.ops.flash_attn_3.bwd(**call, softmax_lse=torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=re.escape("softmax_lse: got shape (8, 4); it must be of shape (4, 8)")):
        torch.ops.flash_attn_3.bwd(**call, softmax_lse=torch.zeros(8, 4))
    with pytest.raises(ValueError, match="cu_seqlens_k: got offsets from 0 to 13; it must be offsets from 0 to 12"):
        torch.ops.flash_attn_3.bwd(**call | {"cu_seqlens_k": int32(0, 13)}, softmax_lse=torch.zeros(4, 8))
    with pytest.raises(ValueError, match="max_seqlen_k: got None"):
        torch.ops.flash_attn_3.bwd(**call | {"max_seqlen_k": None}, softmax_lse=torch.zeros(4, 8))
