"""The calls whose host time is measured, on the CPU, and what they may take."""

from unittest import mock

import pytest
import torch
from benchmarks import comparison, overhead
from benchmarks.overhead import failures

from flash_attn_3 import runtime


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setattr(comparison, "DEVICE", "cpu")
    monkeypatch.setattr(overhead, "DEVICE", "cpu")
    # The runtime's launches want CUDA tensors; the signature is the real one's.
    launcher = mock.create_autospec(runtime.forward_launcher, return_value=lambda *tensors: None)
    monkeypatch.setattr(runtime, "forward_launcher", launcher)
    return overhead._calls(["flex", "fa4"])


def test_every_call_works(calls):
    for name, build in calls.items():
        if not name.startswith(("flex_attention", "FlashAttention-4")):  # neither is for CPU tensors
            build()()


@pytest.mark.parametrize("own", ["flash_attn_func, forward and backward", "torch SDPA, forward and backward"])
def test_gradients_are_computed_every_time(calls, own):
    call = calls[own]()
    for gradients in (call(), call()):
        assert len(gradients) == 3 and all(torch.isfinite(x).all() and x.abs().sum() > 0 for x in gradients)


def test_both_passes_of_the_peers_are_measured(calls):
    for name in ("torch SDPA", "flex_attention", "FlashAttention-4"):
        assert {name, f"{name}, forward and backward"} <= set(calls)


def rows(**us: float) -> dict:
    return {"rows": [{"name": name.replace("_and_", ", forward and "), "us": value} for name, value in us.items()]}


def test_what_calls_may_take():
    bounds = {"flash_attn_func": 15, "flash_attn_varlen_func": 20, "flash_attn_func_and_backward": 80}
    assert failures(rows(**bounds)) == []
    for name, bound in bounds.items():
        (line,) = failures(rows(**{name: bound + 0.01}))
        assert line.endswith(f"at most {bound} is wanted")
    unavailable = {"rows": [{"name": "flex_attention", "unavailable": "ImportError"}]}
    assert failures(unavailable) == []
