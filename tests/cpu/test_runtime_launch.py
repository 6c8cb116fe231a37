"""Launches of the runtime under a stand-in driver: what the driver is told, on which device and which stream.

The scenarios (functions whose first arguments are `driver` and `path`) run in the process that has the stand-in.
"""

import functools

import pytest
import tvm_ffi

import fake_cuda
from fake_cuda import BF16, FP32, INT32
from forward_calls import (
    INDEX_ADDRESS,
    K_ADDRESS,
    LSE_ADDRESS,
    OUT_ADDRESS,
    Q_ADDRESS,
    TENSORS,
    V_ADDRESS,
    dense_call,
    forward,
    library,
    packed_call,
)

INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
INVALID_IMAGE = 200  # CUDA_ERROR_INVALID_IMAGE
NO_BINARY_FOR_GPU = 209  # CUDA_ERROR_NO_BINARY_FOR_GPU
GLOBAL, RELAXED = 0, 2  # CU_STREAM_CAPTURE_MODE_*


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = fake_cuda.FakeMachine(tmp_path_factory.mktemp("driver"))
    yield machine.call
    machine.close()


def load(path, *, kv_rows=176, vo_columns=32, promoted_floats=1000, cluster_size=1, nvcc_release=13000):
    return library(path).forward_load(
        *(b"cubin", "symbol", 384, 200_000, 64, vo_columns, 64, kv_rows),
        *(promoted_floats, cluster_size, nvcc_release),
    )


def launches(log):
    return [call for call in log if call["call"] == "cuLaunchKernelEx"]


def run(driver, path, call=dense_call, changes=(), device=0, current_device=None, **traits):
    """Load a kernel, launch it once on `device` and return the log of the launch."""
    handle = load(path, **traits)
    driver.device = device if current_device is None else current_device
    driver.take_log()
    changes = {name: fake_cuda.tensor(*value) if isinstance(value, tuple) else value for name, value in changes}
    forward(call(device, handle=handle, **changes), path)
    return driver.take_log()


def attempt(driver, path, failing_call, result):
    """What is raised, as (type name, text), if a driver function fails; and the launches."""
    handle = load(path)
    driver.device = 0
    driver.take_log()
    driver.fail(failing_call, result)
    try:
        forward(dense_call(handle=handle), path)
    except (ValueError, RuntimeError) as error:
        return type(error).__name__, str(error), launches(driver.take_log())
    return None


def test_dense_parameters(machine):
    (launch,) = launches(machine(run))
    assert launch["grid"] == [4, 1, 1]
    assert launch["block"] == [384, 1, 1]
    assert launch["smem"] == 200_000
    assert launch["cluster"] == 1
    maps = {name: launch["params"].pop(name) for name in "qkvo"}
    assert len(set(maps.values())) == 4
    assert launch["params"].pop("tile_counter") != 0
    assert launch["params"] == {
        "out": OUT_ADDRESS,
        "out_strides": [3840, 768, 128],
        "head_dim_v": 128,
        "promoted_out": 0,
        "lse": LSE_ADDRESS,
        "lse_batch_stride": 30,
        "lse_head_stride": 5,
        "cu_seqlens_q": 0,
        "cu_seqlens_k": 0,
        "seqused_q": 0,
        "seqused_k": 0,
        "batch": 2,
        "heads_q": 6,
        "heads_per_kv": 2,
        "seqlen_q": 5,
        "seqlen_k": 7,
        "row_bound_q": 5,
        "row_bound_k": 7,
        "packed_heads": 2,
        "num_value_passes": 1,
        "heads_per_section": 6,
        "least_heads_in_last_section": 5,
        "score_scale": 0.5,
        "exp2_scale": 0.25,
        "window_left": 3,
        "window_right": -1,
        "attention_chunk": 9,
    }


@pytest.mark.parametrize("num_floats", [4000, 4001])
def test_scratch_for_promotion(machine, num_floats):
    (launch,) = launches(machine(run, dense_call, (("promoted_out", ((num_floats,), FP32)),)))
    assert launch["params"]["promoted_out"] == 0x7F00_0000_0000


def test_scratch_that_is_too_small(machine):
    # 1000 floats for each of 4 CTAs.
    assert machine(launch_with_scratch, 3999) == "promoted_out has 3999 elements; required are at least 4000"


def launch_with_scratch(driver, path, num_floats):
    with pytest.raises(ValueError) as raised:
        forward(dense_call(handle=load(path), promoted_out=fake_cuda.tensor((num_floats,), FP32)), path)
    return str(raised.value)


def test_packed_parameters(machine):
    (launch,) = launches(machine(run, packed_call))
    expected = {
        "lse_batch_stride": 0,
        "lse_head_stride": 11,
        "cu_seqlens_q": INDEX_ADDRESS,
        "cu_seqlens_k": INDEX_ADDRESS + 64,
        "batch": 3,
        "seqlen_q": 6,
        "seqlen_k": 8,
        "row_bound_q": 11,
        "row_bound_k": 13,
    }
    assert {name: launch["params"][name] for name in expected} == expected


def test_a_packed_side_and_a_dense_side(machine):
    changes = {
        "k": ((3, 7, 3, 64),),
        "v": ((3, 7, 3, 128),),
        "cu_seqlens_k": None,
        "seqused_k": ((3,), INT32),
    }
    (launch,) = launches(machine(run, packed_call, tuple(changes.items())))
    params = launch["params"]
    assert params["cu_seqlens_q"] == INDEX_ADDRESS
    assert params["cu_seqlens_k"] == 0
    assert params["seqused_k"] != 0
    assert (params["batch"], params["seqlen_q"], params["row_bound_q"]) == (3, 6, 11)
    assert (params["seqlen_k"], params["row_bound_k"]) == (7, 7)  # not max_seqlen_k, which is for packed keys


def test_every_tensor_has_its_own_map(machine):
    log = machine(run)
    (launch,) = launches(log)
    encoded = [call for call in log if call["call"] == "cuTensorMapEncodeTiled"]
    maps = {name: encoded[launch["params"][name] - 1] for name in "qkvo"}
    bf16, none, zeros, swizzle_64, swizzle_128 = 9, 0, 0, 2, 3  # values of cuda.h's enumerations
    expected = {
        "q": (Q_ADDRESS, [64, 6, 5, 6, 2], [128, 768, 768, 3840], [64, 2, 32, 1, 1], swizzle_128),
        "k": (K_ADDRESS, [64, 3, 7, 8, 2], [128, 384, 384, 2688], [64, 1, 176, 1, 1], swizzle_128),
        "v": (V_ADDRESS, [128, 3, 7, 8, 2], [256, 768, 768, 5376], [32, 1, 176, 1, 1], swizzle_64),
        "o": (OUT_ADDRESS, [128, 6, 5, 6, 2], [256, 1536, 1536, 7680], [32, 2, 32, 1, 1], swizzle_64),
    }
    for name, (address, sizes, strides, box, swizzle) in expected.items():
        assert maps[name] == {
            "call": "cuTensorMapEncodeTiled",
            "type": bf16,
            "base": address - sizes[2] * strides[1],
            "sizes": sizes,
            "strides": strides,
            "box": box,
            "element_strides": [1, 1, 1, 1, 1],
            "interleave": none,
            "swizzle": swizzle,
            "fill": zeros,
        }


@pytest.mark.parametrize(("heads", "positions"), [(1, 64), (2, 32), (3, 21), (6, 10)])
def test_boxes_of_packed_heads(machine, heads, positions):
    """As many whole positions as fit in a warpgroup's rows."""
    changes = {"k": ((2, 7, 1, 64), BF16), "v": ((2, 7, 1, 128), BF16), "packed_heads": heads}
    log = machine(run, dense_call, tuple(changes.items()))
    (launch,) = launches(log)
    encoded = [call for call in log if call["call"] == "cuTensorMapEncodeTiled"]
    q, o = (encoded[launch["params"][name] - 1]["box"] for name in "qo")
    assert (q, o) == ([64, heads, positions, 1, 1], [32, heads, positions, 1, 1])


@pytest.mark.parametrize("keys", [0, 7])
def test_no_keys(machine, keys):
    """Keys of zero length are launched, so that out and lse are written; q's map stands in for theirs."""
    changes = {"k": ((2, keys, 3, 64), BF16), "v": ((2, keys, 3, 128), BF16)}
    (launch,) = launches(machine(run, dense_call, tuple(changes.items())))
    assert launch["params"]["seqlen_k"] == keys
    maps = {name: launch["params"][name] for name in "qkv"}
    assert 0 not in maps.values()
    assert len(set(maps.values())) == (1 if keys == 0 else 3)


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (dense_call, {"num_ctas": 0}),
        (dense_call, {"q": ((2, 0, 6, 64),), "out": ((2, 0, 6, 128),), "lse": ((2, 6, 0), FP32)}),
        (packed_call, {"cu_seqlens_q": ((1,), INT32), "cu_seqlens_k": ((1,), INT32)}),
    ],
    ids=["no CTA", "no query", "no sequence"],
)
def test_nothing_to_do_asks_nothing_of_the_driver(machine, call, changes):
    assert machine(run, call, tuple(changes.items())) == []


@pytest.mark.parametrize("cluster_size", [2, 4])
def test_ctas_are_launched_in_clusters(machine, cluster_size):
    (launch,) = launches(machine(functools.partial(run, cluster_size=cluster_size)))
    assert launch["cluster"] == cluster_size


@pytest.mark.parametrize("current_device", [-1, 0, 1])
@pytest.mark.parametrize("device", [0, 1])
def test_device_of_the_tensors(machine, device, current_device):
    """G6: the launch happens in a context of the tensors' device, and the caller's context is back afterwards."""
    device_now, log = machine(run_and_report_device, device, current_device)
    (launch,) = launches(log)
    assert launch["device"] == device
    assert device_now == current_device
    pushes = [call for call in log if call["call"] == "cuCtxPushCurrent"]
    assert [call["device"] for call in pushes] == ([] if device == current_device else [device])


def run_and_report_device(driver, path, device, current_device):
    log = run(driver, path, device=device, current_device=current_device)
    return driver.device, log


def test_a_failed_launch_restores_the_device(machine):
    """G6."""
    assert machine(fail_and_report_device) == 0


def fail_and_report_device(driver, path):
    handle = load(path)
    driver.device = 0
    driver.fail("cuLaunchKernelEx", INVALID_VALUE)
    with pytest.raises(RuntimeError):
        forward(dense_call(1, handle=handle), path)
    return driver.device


def test_stream_of_the_device(machine):
    """G5, G6: the launch goes to the current stream of the tensors' device, also if another device has one too."""
    assert machine(streams) == [0x5000, 0x6000]


def streams(driver, path):
    handle = load(path)
    first, second = tvm_ffi.device("cuda", 0), tvm_ffi.device("cuda", 1)
    with tvm_ffi.use_raw_stream(first, 0x5000), tvm_ffi.use_raw_stream(second, 0x6000):
        forward(dense_call(0, handle=handle), path)
        forward(dense_call(1, handle=handle), path)
    return [launch["stream"] for launch in launches(driver.take_log())]


def test_one_launcher_serves_other_tensors_and_devices(machine):
    """What a launcher keeps is not what the first call left in it."""
    first, second = machine(launch_twice_with_one_launcher)
    assert (first["device"], second["device"]) == (0, 1)
    assert (first["params"]["seqlen_q"], second["params"]["seqlen_q"]) == (6, 5)
    assert (first["params"]["cu_seqlens_q"], second["params"]["cu_seqlens_q"]) == (INDEX_ADDRESS, 0)
    assert first["params"]["window_left"] == second["params"]["window_left"] == 3


def launch_twice_with_one_launcher(driver, path):
    calls = packed_call(0, handle=load(path)), dense_call(1)
    options = [value for name, value in calls[0].items() if name not in TENSORS]
    launcher = library(path).forward_launcher(*options)
    for call in calls:
        launcher(*(call[name] for name in TENSORS))
    return launches(driver.take_log())


def test_a_kernel_is_prepared_once_for_each_device(machine):
    """Loading is allowed during capture: it happens in relaxed mode, and the mode is put back."""
    first, again, other = machine(launch_on_devices_in_turn)

    def preparation(device):
        return [
            {"call": "cuThreadExchangeStreamCaptureMode", "mode": RELAXED},
            {"call": "cuKernelGetFunction", "device": device},
            {"call": "cuKernelSetAttribute", "value": 200_000, "device": device},
            {"call": "cuThreadExchangeStreamCaptureMode", "mode": GLOBAL},
        ]

    # Every launch: it synchronises, allocates and loads nothing.
    hot_path = ["cuTensorMapEncodeTiled"] * 4 + ["cuStreamIsCapturing", "cuLaunchKernelEx"]
    assert [call["call"] for call in again] == hot_path
    assert [call for call in first if call["call"] not in hot_path] == preparation(0)
    assert [call for call in other if call["call"] not in hot_path] == preparation(1)


def launch_on_devices_in_turn(driver, path):
    """The logs of three launches of one kernel, after another kernel has used both devices."""
    logs = []
    for handle, devices in ((load(path), (0, 1)), (load(path), (0, 0, 1))):
        logs.clear()
        for device in devices:
            driver.device = device
            driver.take_log()
            forward(dense_call(device, handle=handle), path)
            logs.append(driver.take_log())
    return logs


def test_every_launch_has_a_tile_counter_of_its_own(tmp_path):
    """The first launch on a device allocates zeroed counters there; later ones take the next."""
    machine = fake_cuda.FakeMachine(tmp_path)
    logs = machine.call(launch_with_counters, [(0, False), (0, False), (1, False), (0, False)])
    machine.close()
    allocations = [[call for call in log if call["call"] == "cuMemAlloc"] for log in logs]
    assert [[call["device"] for call in calls] for calls in allocations] == [[0], [], [1], []]
    for log in (logs[0], logs[2]):
        assert_zeroed_before_launch(log)
    counters = [launches(log)[0]["params"]["tile_counter"] for log in logs]
    assert len(set(counters)) == 4
    for device, counter in zip((0, 0, 1, 0), counters, strict=True):
        (ring,) = allocations[2] if device else allocations[0]
        assert ring["memory"] <= counter < ring["memory"] + ring["size"]


def test_a_captured_launch_keeps_its_tile_counter(tmp_path):
    """G1: a graph may be replayed at any time, so no later launch takes the counter of a captured one."""
    machine = fake_cuda.FakeMachine(tmp_path)
    logs = machine.call(launch_with_counters, [(0, True), (0, False), (0, True), (0, False)])
    machine.close()
    captured, eager = logs[0], logs[1]
    for log in (captured, eager):
        assert_zeroed_before_launch(log)
    (memory,) = [call for call in captured if call["call"] == "cuMemAlloc"]
    for log, is_captured in zip(logs, (True, False, True, False), strict=True):
        counter = launches(log)[0]["params"]["tile_counter"]
        assert (memory["memory"] <= counter < memory["memory"] + memory["size"]) == is_captured
    assert launches(logs[0])[0]["params"]["tile_counter"] != launches(logs[2])[0]["params"]["tile_counter"]


def launch_with_counters(driver, path, launches_to_make):
    """The logs of launches, each on a device and captured or not."""
    handle = load(path)
    logs = []
    for device, capturing in launches_to_make:
        driver.device = device
        driver.set_capturing(capturing)
        driver.take_log()
        forward(dense_call(device, handle=handle), path)
        logs.append(driver.take_log())
    return logs


def assert_zeroed_before_launch(log):
    """All of the memory is set to zero, and that has ended, in the mode that allows it during capture."""
    names = [call["call"] for call in log]
    begin, end = names.index("cuMemAlloc"), names.index("cuStreamSynchronize")
    memory, zeroed = log[begin], log[names.index("cuMemsetD32Async")]
    assert (zeroed["memory"], zeroed["value"], zeroed["count"] * 4) == (memory["memory"], 0, memory["size"])
    assert begin < names.index("cuMemsetD32Async") < end < names.index("cuLaunchKernelEx")
    modes = [call["mode"] for call in log[:begin] if call["call"] == "cuThreadExchangeStreamCaptureMode"]
    assert modes[-1] == RELAXED
    modes = [call["mode"] for call in log[end:] if call["call"] == "cuThreadExchangeStreamCaptureMode"]
    assert modes == [GLOBAL]


def test_a_refused_tensor_map_names_the_tensor(machine):
    name, text, launched = machine(attempt, "cuTensorMapEncodeTiled", INVALID_VALUE)
    assert name == "ValueError"
    assert text.startswith("q: the driver refuses its tensor map, CUDA_ERROR_INVALID_VALUE")
    assert "strides in bytes (128, 768, 768, 3840)" in text
    assert not launched


def test_a_failed_launch_has_the_drivers_words(machine):
    name, text, _ = machine(attempt, "cuLaunchKernelEx", INVALID_VALUE)
    assert name == "RuntimeError"
    assert text == "launching symbol failed: CUDA_ERROR_INVALID_VALUE (a fake error)"


def test_a_kernel_for_another_architecture(machine):
    name, text, launched = machine(attempt, "cuKernelGetFunction", NO_BINARY_FOR_GPU)
    assert name == "UnsupportedDeviceError"
    assert text == (
        "symbol was not compiled for device 0, of compute capability 9.0. "
        "The driver is of CUDA 13.0, the kernel was compiled by nvcc 13.0"
    )
    assert not launched


REMEDY = (
    ": if that is too new for the driver, install a newer driver, or set FLASH_ATTN_3_NVCC to an nvcc of release 12.4 "
    "or older (and install the package again, if it brought the kernel)"
)


@pytest.mark.parametrize(
    ("driver_release", "nvcc_release", "told"),
    [
        (12040, 13000, f"The driver is of CUDA 12.4, the kernel was compiled by nvcc 13.0{REMEDY}"),
        (12040, 12050, f"The driver is of CUDA 12.4, the kernel was compiled by nvcc 12.5{REMEDY}"),
        (12040, 0, f"The driver is of CUDA 12.4, the kernel was compiled by an nvcc of unknown release{REMEDY}"),
        (12040, 12040, "The driver is of CUDA 12.4, the kernel was compiled by nvcc 12.4"),
        (13010, 12100, "The driver is of CUDA 13.1, the kernel was compiled by nvcc 12.10"),
    ],
)
@pytest.mark.parametrize(
    ("refusing_call", "refused"),
    [
        ("cuLibraryLoadData", "the cubin of symbol cannot be loaded"),
        ("cuKernelGetFunction", "loading symbol failed"),  # a driver may put off reading the cubin
    ],
)
def test_a_refused_cubin_shows_the_releases(machine, refusing_call, refused, driver_release, nvcc_release, told):
    text = machine(load_and_launch_refused, refusing_call, driver_release, nvcc_release)
    assert text == f"{refused}: CUDA_ERROR_FAKE (a fake error). {told}"


def load_and_launch_refused(driver, path, refusing_call, driver_release, nvcc_release):
    driver.device = 0
    driver.set_release(driver_release)
    driver.fail(refusing_call, INVALID_IMAGE)
    with pytest.raises(RuntimeError) as raised:
        forward(dense_call(handle=load(path, nvcc_release=nvcc_release)), path)
    return str(raised.value)


def test_a_kernel_with_another_parameter_layout(machine):
    text = machine(load_with_params_size, 776)
    assert "symbol takes 776 bytes of parameters, this runtime passes 768" in text


def load_with_params_size(driver, path, size):
    driver.set_params_size(size)
    with pytest.raises(RuntimeError) as raised:
        load(path)
    return str(raised.value)


def test_ctas_that_fill_no_cluster(machine):
    assert machine(launch_half_a_cluster) == ("num_ctas is 3; required is a multiple of the cluster size, 2")


def launch_half_a_cluster(driver, path):
    handle = load(path, cluster_size=2)
    with pytest.raises(ValueError) as raised:
        forward(dense_call(handle=handle, num_ctas=3), path)
    return str(raised.value)


def test_device_properties(machine):
    assert machine(device_properties) == [(132, [9, 0]), (133, [9, 0])]


def device_properties(driver, path):
    functions = library(path)
    with pytest.raises(ValueError, match=r"device 2 does not exist; this machine has 2 CUDA device"):
        functions.num_sms(2)
    return [(functions.num_sms(device), list(functions.compute_capability(device))) for device in (0, 1)]
