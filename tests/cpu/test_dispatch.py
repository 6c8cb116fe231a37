"""The way from a signature to a launch, with stand-ins for the GPU, the compiler and the kernel."""

import dataclasses
import inspect
import math

import pytest
import torch

from cpu_calls import random_qkv
from flash_attn_3 import compiler, dispatch, runtime
from flash_attn_3.config import Mask, SeqLayout
from flash_attn_3.errors import KernelNotBuiltError, UnsupportedDeviceError
from flash_attn_3.signature import ForwardSignature, TensorSpec, forward_signature
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

DEVICE = torch.device("cuda", 1)
LOG2_E = math.log2(math.e)
HANDLE = 77


@pytest.fixture
def hopper(monkeypatch) -> list[inspect.BoundArguments]:
    """A Hopper GPU with index 1 whose kernels only note down what they are launched with."""
    launches = []
    signature = inspect.signature(runtime.forward)
    monkeypatch.setattr(runtime, "compute_capability", {1: (9, 0)}.__getitem__)
    monkeypatch.setattr(runtime, "num_sms", {1: 114}.__getitem__)
    monkeypatch.setattr(compiler, "get_kernel", lambda config: config)
    monkeypatch.setattr(runtime, "load_kernel", lambda kernel: HANDLE)
    monkeypatch.setattr(runtime, "forward", lambda *args: launches.append(signature.bind(*args).arguments))
    dispatch._launch_for.cache_clear()
    yield launches
    dispatch._launch_for.cache_clear()


def on_gpu(call: ForwardSignature) -> ForwardSignature:
    """The same call with every tensor on the GPU."""
    return ForwardSignature(*(x._replace(device=DEVICE) if isinstance(x, TensorSpec) else x for x in call))


def launch(launches: list, *tensors, **options) -> dict:
    """What the kernel of a call is launched with."""
    call = on_gpu(forward_signature(*tensors, **options))
    names = ("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    dispatch._launch_for(call).run(*names)
    (arguments,) = launches
    assert all(arguments[name] == name for name in names), "every tensor arrives at its own place"
    return arguments


def test_launch_of_a_dense_call(hopper):
    q, k, v = random_qkv((300, 500), heads=(4, 2), batch=2)
    arguments = launch(hopper, q, k, v)
    assert arguments["handle"] == HANDLE
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (300, 500)
    assert arguments["num_ctas"] == 2 * 4 * math.ceil(300 / 192)
    assert arguments["num_value_passes"] == 1
    assert arguments["heads_per_section"] == 8
    assert arguments["score_scale"] == 1.0
    assert arguments["exp2_scale"] == pytest.approx(64**-0.5 * LOG2_E)
    assert (arguments["window_left"], arguments["window_right"], arguments["attention_chunk"]) == (-1, -1, 0)


def test_launch_with_every_option(hopper):
    q, k, v = random_qkv((300, 500), heads=(4, 2), head_dims=(64, 512), batch=200, packed=True)
    cu_seqlens = torch.zeros(201, dtype=torch.int32)
    arguments = launch(
        hopper,
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=300,
        max_seqlen_k=500,
        softmax_scale=0.5,
        softcap=20.0,
        window_size=(40, 10),
        attention_chunk=64,
        sm_margin=14,
    )
    assert (arguments["max_seqlen_q"], arguments["max_seqlen_k"]) == (300, 500)
    assert arguments["num_ctas"] == 100, "114 multiprocessors less the margin"
    assert arguments["num_value_passes"] == 2
    assert arguments["score_scale"] == pytest.approx(0.5 / 20.0)
    assert arguments["exp2_scale"] == pytest.approx(20.0 * LOG2_E)
    assert (arguments["window_left"], arguments["window_right"], arguments["attention_chunk"]) == (40, 10, 64)


def test_kernel_of_a_call(hopper, monkeypatch):
    configs = []
    monkeypatch.setattr(compiler, "get_kernel", configs.append)
    q, k, v = random_qkv((300, 500))
    launch(hopper, q, k, v, causal=True, seqused_k=torch.zeros(1, dtype=torch.int32))
    (config,) = configs
    assert (config.mask, config.seq_layout) == (Mask.CAUSAL, SeqLayout.VARLEN)


def test_equal_calls_share_a_launch(hopper):
    q, k, v = random_qkv((300, 500))
    first = dispatch._launch_for(on_gpu(forward_signature(q, k, v)))
    assert dispatch._launch_for(on_gpu(forward_signature(q.clone(), k.clone(), v.clone(), softcap=0))) is first
    for change in ({"causal": True}, {"softmax_scale": 0.5}, {"window_size": (3, 3)}, {"sm_margin": 1}):
        assert dispatch._launch_for(on_gpu(forward_signature(q, k, v, **change))) is not first


def test_every_field_of_a_signature_counts():
    """Two calls that differ in one field never share a launch."""
    spec = TensorSpec(torch.Size([1]), torch.float16, torch.device("cpu"))
    call = ForwardSignature(*[spec] * len(ForwardSignature._fields))
    for field in ForwardSignature._fields:
        for change in ({"shape": torch.Size([2])}, {"dtype": torch.bfloat16}, {"device": DEVICE}):
            assert call._replace(**{field: spec._replace(**change)}) != call


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_gpu_that_is_not_hopper(hopper, monkeypatch, capability):
    monkeypatch.setattr(runtime, "compute_capability", lambda device: capability)
    call = on_gpu(forward_signature(*random_qkv((20, 30))))
    with pytest.raises(UnsupportedDeviceError) as caught:
        dispatch._launch_for(call)
    assert all(word in str(caught.value) for word in ("cuda:1", "{}.{}".format(*capability), "Hopper"))
    assert hopper == []


def test_a_failed_kernel_is_asked_for_again(hopper, monkeypatch):
    def fail(config):
        raise KernelNotBuiltError(config.name)

    q, k, v = random_qkv((300, 500))
    with monkeypatch.context() as broken:
        broken.setattr(compiler, "get_kernel", fail)
        with pytest.raises(KernelNotBuiltError):
            launch(hopper, q, k, v)
    assert launch(hopper, q, k, v)["handle"] == HANDLE


def test_sm_margin_is_held_against_the_device(hopper):
    call = on_gpu(forward_signature(*random_qkv((20, 30)), sm_margin=114))
    with pytest.raises(ValueError, match="sm_margin: got 114; it must be less than the device's 114"):
        dispatch._launch_for(call)


# -- nothing to compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "lengths", "heads"), [(0, (5, 7), (4, 2)), (2, (0, 7), (4, 2)), (2, (0, 0), (4, 2)), (2, (5, 7), (0, 2))]
)
def test_no_queries(hopper, batch, lengths, heads):
    """N5: no kernel is launched for an empty output."""
    tensors = random_qkv(lengths, heads=heads, batch=batch)
    out, lse = flash_attn_func(*tensors, return_attn_probs=True)
    assert (out.shape, lse.shape) == (tensors[0].shape, (batch, heads[0], lengths[0]))
    dispatch._launch_for(on_gpu(forward_signature(*tensors))).run(*tensors, out, lse, None, None, None, None)
    assert hopper == []


@pytest.mark.parametrize("causal", [False, True])
def test_no_keys(hopper, causal):
    """N5, N9: out is 0 and lse -inf, and on a GPU it is the kernel that writes them: it knows which rows exist."""
    q, k, v = random_qkv((5, 0), heads=(4, 2), batch=2)
    out, lse = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert (out == 0).all() and (lse == -math.inf).all()
    dispatch._launch_for(on_gpu(forward_signature(q, k, v, causal=causal))).run(q, k, v, out, lse, *[None] * 4)
    assert len(hopper) == 1


def test_no_keys_by_max_seqlen():
    q, k, v = random_qkv((5, 6), packed=True)
    cu_seqlens_q, cu_seqlens_k = torch.tensor([[0, 5], [0, 0]], dtype=torch.int32)
    out, lse = flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, 5, 0, return_attn_probs=True)
    assert (out == 0).all() and (lse == -math.inf).all()


def test_problem_of_a_call():
    """The planner sees what was asked, normalised."""
    q, k, v = random_qkv((20, 30), heads=(6, 3), head_dims=(40, 72), batch=2)
    call = forward_signature(q, k, v, window_size=(100, 100), softcap=1.0, sm_margin=32)
    problem = dispatch.forward_problem(call, 132)
    assert dataclasses.astuple(problem)[1:8] == (2, 20, 30, 6, 3, 40, 72)
    assert problem.mask.mask is Mask.FULL
    assert problem.num_sms == 100
