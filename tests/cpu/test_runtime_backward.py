"""The runtime's backward pass under a stand-in driver: three launches, their parameters, and what is refused before.

The scenarios (functions whose first arguments are `driver` and `path`) run in the process that has the stand-in.
"""

import functools

import pytest

import fake_cuda
from backward_calls import ADDRESSES, BLOCK_M, BLOCK_N, OPTIONS, backward, dense_shapes, load, packed_shapes, tensors
from fake_cuda import BF16, CPU, CUDA, FP16, FP32, INT32
from forward_calls import library

INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE
UNUSED_ROW_CTAS = 8  # kUnusedRowCtas of csrc/kernels/bwd/params.h
USED = ((2,), INT32)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    machine = fake_cuda.FakeMachine(tmp_path_factory.mktemp("driver"))
    yield machine.call
    machine.close()


def run(driver, path, shapes, device=0, takes_turns=False, traits=None, **options):
    """The log of one backward pass. `traits`: what is special about the kernels."""
    varlen = any(name in shapes for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"))
    handle = load(path, varlen=varlen, takes_turns=takes_turns, **traits or {})
    driver.device = device
    driver.take_log()
    backward(tensors(shapes, device), handle, path, **options)
    return driver.take_log()


def launches(log):
    return [call for call in log if call["call"] == "cuLaunchKernelEx"]


def tensors_cleared_by_memset(log):
    """The runtime's own counters lie elsewhere."""
    return [x for x in log if "Memset" in x["call"] and x["memory"] >= min(ADDRESSES.values())]


def without(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


# -- launches ----------------------------------------------------------------------------------------------


def test_three_kernels_in_one_call(machine):
    """Grids have one dimension: batch and heads have no limit of 65535 (I1)."""
    log = machine(run, dense_shapes())
    assert [(x["symbol"], x["grid"], x["block"], x["smem"]) for x in launches(log)] == [
        ("bwd_preprocess", [5 * 6 * 2, 1, 1], [256, 1, 1], 0),
        ("bwd", [10, 1, 1], [384, 1, 1], 200_000),
        ("bwd_postprocess", [5 * 6 * 2, 1, 1], [192, 1, 1], 0),
    ]
    first, second, third = (x["params"] for x in launches(log))
    assert first == second == third
    assert len({x["stream"] for x in launches(log)}) == 1
    assert not tensors_cleared_by_memset(log)


def test_two_ctas_for_each_block_of_keys(machine):
    """The main kernel's alone; each loads half of the keys, and both are one worker."""
    log = machine(functools.partial(run, traits={"cluster_size": 2}), dense_shapes())
    assert [(x["grid"][0], x["cluster"]) for x in launches(log)] == [
        (5 * 6 * 2, 1),
        (10, 2),
        (5 * 6 * 2, 1),
    ]
    boxes = [x["box"] for x in log if x["call"] == "cuTensorMapEncodeTiled"]
    assert sorted(box[2] for box in boxes) == [64] * 6


def test_dense_parameters(machine):
    params = launches(machine(run, dense_shapes()))[1]["params"]
    maps = {name: params.pop(name) for name in ("q", "dout", "k", "v", "dk", "dv")}
    assert len(set(maps.values())) == 6
    lse, statistics = ADDRESSES["lse"], ADDRESSES["statistics"]
    assert params.pop("tile_counter") != 0
    assert params == {
        "out": [ADDRESSES["out"], 300 * 6 * 128, 6 * 128, 128],
        "dout_rows": [ADDRESSES["dout"], 300 * 6 * 128, 6 * 128, 128],
        "dq_rows": [ADDRESSES["dq"], 300 * 6 * 40, 6 * 40, 40],
        "dk_rows": [ADDRESSES["dk"], 200 * 3 * 40, 3 * 40, 40],
        "dv_rows": [ADDRESSES["dv"], 200 * 3 * 128, 3 * 128, 128],
        "lse": lse,
        "dlse": ADDRESSES["dlse"],
        "lse_strides": [6 * 300, 300],
        "dlse_strides": [6 * 300, 300],
        "delta": statistics,
        "lse_log2": statistics + 2 * 6 * 320 * 4,
        "dq_blocks": ADDRESSES["dq_scratch"],
        "dq_turns": 0,
        "key_parts": 0,
        "rows_strides": [6 * 320, 320],
        "cu_seqlens_q": 0,
        "cu_seqlens_k": 0,
        "seqused_q": 0,
        "seqused_k": 0,
        "batch": 2,
        "heads_q": 6,
        "heads_kv": 3,
        "head_dim": 40,
        "head_dim_v": 128,
        "seqlen_q": 300,
        "seqlen_k": 200,
        "row_bound_q": 300,
        "row_bound_k": 200,
        "num_m_blocks": 5,
        "num_n_blocks": 2,
        "num_query_blocks": 5 * 6 * 2,
        "num_key_blocks": 2 * 3 * 2,
        "num_tiles": 2 * 3 * 2,
        **{name: value for name, value in OPTIONS.items() if name != "num_ctas"},
    }


def test_packed_parameters(machine):
    """Grids hold whatever lengths the sequences have: at most so many blocks, where each begins with one of its own."""
    log = machine(run, packed_shapes())
    params = launches(log)[1]["params"]
    rows = 704  # 500 rows and 3 sequences in blocks of 64
    query_blocks, key_blocks = 500 // 64 + 3, 400 // 128 + 3
    expected = {
        "lse_strides": [0, 500],
        "dlse_strides": [0, 500],
        "delta": ADDRESSES["statistics"],
        "lse_log2": ADDRESSES["statistics"] + 6 * rows * 4,
        "rows_strides": [0, rows],
        "dq_rows": [ADDRESSES["dq"], 0, 240, 40],
        "cu_seqlens_q": ADDRESSES["cu_seqlens_q"],
        "cu_seqlens_k": ADDRESSES["cu_seqlens_k"],
        "batch": 3,
        "row_bound_q": 500,
        "row_bound_k": 400,
        "num_m_blocks": query_blocks,
        "num_n_blocks": key_blocks,
        "num_query_blocks": query_blocks * 6,
        "num_tiles": key_blocks * 3,
    }
    assert {name: params[name] for name in expected} == expected
    query_blocks *= 6
    assert [x["grid"][0] for x in launches(log)] == [query_blocks + 3 * UNUSED_ROW_CTAS, 10, query_blocks]


def test_parts_of_a_group_of_heads(machine):
    """Each has tiles of its own, in scratch, which the last kernel adds up for each block of keys."""
    floats = 2 * 12 * 128 * (64 + 128)
    log = machine(functools.partial(run, group_parts=2), dense_shapes() | {"key_parts": ((floats,), FP32)})
    params = launches(log)[1]["params"]
    expected = {"key_parts": ADDRESSES["key_parts"], "group_parts": 2, "num_key_blocks": 12, "num_tiles": 24}
    assert {name: params[name] for name in expected} == expected
    assert [x["grid"][0] for x in launches(log)] == [60, 10, 60 + 12]


@pytest.mark.parametrize(
    ("group_parts", "floats", "text"),
    [
        (3, 1 << 20, "group_parts is 3; supported are divisors of the 2 heads of q for each head of k"),
        (2, None, "key_parts is not given; required with group_parts = 2"),
        (2, 589823, "key_parts has 589823 elements; required are at least 589824"),
    ],
)
def test_parts_that_cannot_be(machine, group_parts, floats, text):
    shapes = dense_shapes() | ({} if floats is None else {"key_parts": ((floats,), FP32)})
    _, words, launched = machine(functools.partial(refuse, group_parts=group_parts), shapes)
    assert (words, launched) == (text, [])


@pytest.mark.parametrize("name", ["seqused_q", "seqused_k"])
def test_used_lengths_of_dense_sides(machine, name):
    """N9, N11: rows past them are cleared by CTAs of their own, not by a memset."""
    log = machine(run, {**dense_shapes(), name: USED})
    assert [x["grid"][0] for x in launches(log)] == [5 * 6 * 2 + 2 * UNUSED_ROW_CTAS, 10, 60]
    assert launches(log)[0]["params"][name] == ADDRESSES[name]
    assert not tensors_cleared_by_memset(log)


def test_no_gradient_of_the_lse(machine):
    params = launches(machine(run, without(dense_shapes(), "dlse")))[0]["params"]
    assert (params["dlse"], params["dlse_strides"]) == (0, [0, 0])


def test_every_tensor_has_its_own_map(machine):
    log = machine(run, dense_shapes())
    params = launches(log)[1]["params"]
    encoded = [call for call in log if call["call"] == "cuTensorMapEncodeTiled"]
    boxes = {
        "q": [32, 1, 64, 1, 1],
        "dout": [64, 1, 64, 1, 1],
        "k": [32, 1, 128, 1, 1],
        "v": [64, 1, 128, 1, 1],
        "dk": [32, 1, 64, 1, 1],
        "dv": [64, 1, 64, 1, 1],
    }
    swizzles = {32: 2, 64: 3}  # of 64 and 128 bytes
    for name, box in boxes.items():
        (shape, *_) = dense_shapes()[name]
        batch, rows, heads, columns = shape
        found = encoded[params[name] - 1]
        assert (found["box"], found["swizzle"]) == (box, swizzles[box[0]]), name
        assert found["sizes"] == [columns, heads, rows, rows + 1, batch], name
        assert found["base"] == ADDRESSES[name] - rows * heads * columns * 2, name


def test_gradients_of_one_packed_tensor(machine):
    """L1, L8: dq, dk and dv may be views of one tensor."""
    strides = (200 * 12 * 128, 12 * 128, 128, 1)
    shapes = dense_shapes()
    for name in ("dk", "dv"):
        shapes[name] = (shapes[name][0], BF16, strides)
    params = launches(machine(run, shapes))[1]["params"]
    assert params["dk_rows"] == [ADDRESSES["dk"], *strides[:3]]
    assert params["dv_rows"] == [ADDRESSES["dv"], *strides[:3]]


def test_dimensions_of_size_one_may_have_any_stride(machine):
    """L1."""
    shapes = dense_shapes()
    shapes |= {"k": ((2, 200, 1, 40),), "v": ((2, 200, 1, 128),), "dv": ((2, 200, 1, 128),)}
    shapes["dk"] = ((2, 200, 1, 40), BF16, (200 * 40, 40, 7, 1))
    params = launches(machine(run, shapes))[1]["params"]
    assert params["dk_rows"] == [ADDRESSES["dk"], 8000, 40, 0]


def test_additions_that_take_turns(machine):
    """R1: turns lie behind the blocks of dq."""
    log = machine(functools.partial(run, takes_turns=True), dense_shapes())
    assert launches(log)[1]["params"]["dq_turns"] == ADDRESSES["dq_scratch"] + 2 * 6 * 320 * 64 * 4


def test_passes_in_flight_have_counters_of_their_own(machine):
    """G7: tiles come from a counter that nobody else uses."""
    logs = [machine(run, dense_shapes()) for _ in range(2)]
    first, second = (launches(log)[1]["params"]["tile_counter"] for log in logs)
    assert first != second


@pytest.mark.parametrize("device", [0, 1])
def test_device_of_the_tensors(machine, device):
    """G6."""
    log = machine(run, dense_shapes(), device)
    assert [x["device"] for x in launches(log)] == [device] * 3


def test_later_calls_ask_little_of_the_driver(machine):
    log = machine(run_again, dense_shapes())
    expected = [*["cuTensorMapEncodeTiled"] * 6, "cuStreamIsCapturing", *["cuLaunchKernelEx"] * 3]
    assert [call["call"] for call in log] == expected


def run_again(driver, path, shapes):
    handle = load(path)
    driver.device = 0
    for _ in range(2):
        driver.take_log()
        backward(tensors(shapes), handle, path)
    return driver.take_log()


# -- errors ------------------------------------------------------------------------------------------------


def refuse(driver, path, shapes, varlen=False, failing_call=None, cluster_size=1, **options):
    """What is raised, as (type name, text), and the kernels that were launched."""
    handle = load(path, varlen=varlen, cluster_size=cluster_size)
    driver.device = 0
    driver.take_log()
    if failing_call is not None:
        driver.fail(failing_call, INVALID_VALUE)
    try:
        backward(tensors(shapes), handle, path, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error).__name__, str(error), [x["symbol"] for x in launches(driver.take_log())]
    return None


DENSE_ERRORS = [
    ("q", ((2, 300, 6, 40), BF16, None, (CPU, 0)), "ValueError", "q is on cpu; the kernels support CUDA devices"),
    ("dk", ((2, 200, 3, 40), BF16, None, (CUDA, 1)), "ValueError", "dk is on cuda:1; required is q's device"),
    ("lse", ((2, 6, 300), FP32, None, (CPU, 0)), "ValueError", "lse is on cpu"),
    ("dlse", ((2, 6, 300), FP32, None, (CPU, 0)), "ValueError", "dlse is on cpu"),
    ("statistics", ((2, 2, 6, 320), FP32, None, (CPU, 0)), "ValueError", "statistics is on cpu"),
    ("dq_scratch", ((1 << 20,), FP32, None, (CPU, 0)), "ValueError", "dq_scratch is on cpu"),
    ("dout", ((2, 300, 6, 128), FP16), "TypeError", "dout has dtype float16; required is bfloat16"),
    ("dv", ((2, 200, 3, 128), FP32), "TypeError", "dv has dtype float32; supported are float16 and bfloat16"),
    ("lse", ((2, 6, 300), BF16), "TypeError", "lse has dtype bfloat16; required is float32"),
    ("dlse", ((2, 6, 300), BF16), "TypeError", "dlse has dtype bfloat16; required is float32"),
    ("dq_scratch", ((1 << 20,), BF16), "TypeError", "dq_scratch has dtype bfloat16"),
    ("dq", ((2, 300, 6, 64),), "ValueError", "dq: shape (2, 300, 6, 64) does not fit"),
    ("dk", ((2, 200, 6, 40),), "ValueError", "dk: shape (2, 200, 6, 40) does not fit"),
    ("dv", ((2, 201, 3, 128),), "ValueError", "dv: shape (2, 201, 3, 128) does not fit"),
    ("dout", ((2, 300, 6, 64),), "ValueError", "dout: shape (2, 300, 6, 64) does not fit"),
    ("out", ((2, 299, 6, 128),), "ValueError", "out: shape (2, 299, 6, 128) does not fit"),
    ("dlse", ((2, 300, 6), FP32), "ValueError", "dlse: shape (2, 300, 6) does not fit"),
    # N10: blocks of another size than the kernels'.
    ("statistics", ((2, 2, 6, 384), FP32), "ValueError", "statistics: shape (2, 2, 6, 384) does not fit"),
    ("dq_scratch", ((2 * 6 * 320 * 64 - 1,), FP32), "ValueError", "dq_scratch has 245759 elements; required are at le"),
    ("k", ((2, 200, 4, 40),), "ValueError", "q has 6 heads and k has 4"),
    ("dq", ((2, 300, 6, 40), BF16, (72000, 240, 0, 1)), "ValueError", "dq is expanded (a stride is 0)"),
    ("dk", ((2, 200, 3, 40), BF16, (0, 120, 40, 1)), "ValueError", "dk is expanded (a stride is 0)"),
    ("dq", ((2, 300, 6, 40), BF16, (73204, 244, 40, 1)), "ValueError", "dq has a stride of 244 elements between rows"),
    (
        "out",
        ((2, 300, 6, 128), BF16, (230400, 768, 128, 2)),
        "ValueError",
        "out has a stride of 2 in its last dimension",
    ),
    ("lse", ((2, 6, 300), FP32, (1800, 1, 6)), "ValueError", "lse has a stride of 6 in its last dimension"),
    ("statistics", ((2, 2, 6, 320), FP32, (1, 2, 4, 24)), "ValueError", "statistics is not contiguous"),
    ("seqused_k", USED, "ValueError", "cu_seqlens and seqused are given; this kernel supports sequences of equal"),
]


@pytest.mark.parametrize(("name", "tensor", "kind", "text"), DENSE_ERRORS, ids=lambda value: str(value)[:40])
def test_dense_tensors_that_do_not_fit(machine, name, tensor, kind, text):
    found, words, launched = machine(refuse, {**dense_shapes(), name: tensor})
    assert (found, launched) == (kind, [])
    assert words.startswith(text)


@pytest.mark.parametrize("columns", [136, 44])
def test_head_dims_that_the_kernels_do_not_have(machine, columns):
    shapes = dense_shapes()
    shapes |= {name: ((*shapes[name][0][:-1], columns),) for name in ("v", "out", "dout", "dv")}
    _, words, _ = machine(refuse, shapes)
    assert words == f"v has {columns} columns; supported by this kernel are multiples of 8 up to 128"


@pytest.mark.parametrize(
    ("name", "tensor", "text"),
    [
        ("q", ((1, 500, 6, 40),), "q has shape (1, 500, 6, 40); required is (total rows, heads, head_dim)"),
        ("cu_seqlens_k", ((5,), INT32), "cu_seqlens_k: shape (5) does not fit"),
        ("dk", ((401, 3, 40),), "dk: shape (401, 3, 40) does not fit"),
        ("dq", ((501, 6, 40),), "dq: shape (501, 6, 40) does not fit"),
        ("lse", ((500, 6), FP32), "lse: shape (500, 6) does not fit"),
        ("dlse", ((500, 6), FP32), "dlse: shape (500, 6) does not fit"),
        ("statistics", ((2, 6, 640), FP32), "statistics: shape (2, 6, 640) does not fit"),
    ],
)
def test_packed_tensors_that_do_not_fit(machine, name, tensor, text):
    found, words, launched = machine(refuse, {**packed_shapes(), name: tensor}, True)
    assert (found, launched) == ("ValueError", [])
    assert words.startswith(text)


def test_equal_lengths_for_a_kernel_of_variable_ones(machine):
    _, words, _ = machine(refuse, dense_shapes(), True)
    assert words == "cu_seqlens and seqused are not given; this kernel requires one of them"


@pytest.mark.parametrize("side", ["q", "k"])
def test_empty_calls_are_the_callers(machine, side):
    names = ("q", "dq", "out", "dout") if side == "q" else ("k", "dk", "v", "dv")
    shapes = dense_shapes()
    shapes |= {name: ((2, 0, *shapes[name][0][2:]),) for name in names}
    if side == "q":
        shapes |= {"lse": ((2, 6, 0), FP32), "dlse": ((2, 6, 0), FP32), "statistics": ((2, 2, 6, 0), FP32)}
    _, words, launched = machine(refuse, shapes)
    assert words.startswith(f"{side} has shape (2, 0,") and "not empty" in words
    assert launched == []


def test_no_sequence_is_the_callers(machine):
    """Nobody would clear the rows that are stored all the same."""
    shapes = packed_shapes()
    shapes |= {"cu_seqlens_q": ((1,), INT32), "cu_seqlens_k": ((1,), INT32), "statistics": ((2, 6, 512), FP32)}
    _, words, launched = machine(refuse, shapes, True)
    assert words.startswith("there is no sequence") and launched == []


@pytest.mark.parametrize(
    ("option", "value"), [("window_left", -2), ("heads_per_section", 2**31), ("attention_chunk", -1), ("num_ctas", 0)]
)
def test_options_that_do_not_fit(machine, option, value):
    _, words, _ = machine(functools.partial(refuse, **{option: value}), dense_shapes())
    assert words.startswith(f"{option} is {value}; supported is")


def test_clusters_are_whole(machine):
    _, words, _ = machine(functools.partial(refuse, cluster_size=2, num_ctas=9), dense_shapes())
    assert words == "num_ctas is 9; supported are multiples of the cluster size, 2"


def test_more_blocks_than_a_grid_has(machine):
    """Of queries, and of keys. (No tensor of any size has memory here.)"""
    rows, batch = 2**20, 2**11
    num_blocks = rows // BLOCK_M * batch * 96
    _, words, launched = machine(refuse, dense_shapes(batch, rows, 1, heads_q=96), False)
    assert (words, launched) == (f"blocks of query rows is {num_blocks}; supported is 0 to 2147483647", [])
    num_blocks = rows // BLOCK_N * batch * 192
    _, words, launched = machine(refuse, dense_shapes(batch, 1, rows, heads_q=192, heads_kv=192), False)
    assert (words, launched) == (f"blocks of keys is {num_blocks}; supported is 0 to 2147483647", [])


def test_a_failed_launch_names_its_kernel(machine):
    found, words, _ = machine(functools.partial(refuse, failing_call="cuLaunchKernelEx"), dense_shapes())
    assert found == "RuntimeError"
    assert words == "launching bwd_preprocess failed: CUDA_ERROR_INVALID_VALUE (a fake error)"


def test_kernels_with_another_parameter_layout(machine):
    text = machine(load_with_params_size, 768)
    assert "bwd_preprocess takes 768 bytes of parameters, this runtime passes 1280" in text


def load_with_params_size(driver, path, size):
    driver.set_params_size(size)
    with pytest.raises(RuntimeError) as raised:
        load(path)
    return str(raised.value)


def test_unknown_handle():
    with pytest.raises(ValueError, match=r"^handle is 5; supported are the handles of the 0 loaded kernel"):
        library().backward_launcher(5, *OPTIONS.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_threads": 0}, "num_threads is 0; supported is 1 to"),
        ({"block_m": 512}, "block_m is 512; supported is 1 to 256"),
        ({"key_gradient_rows": 0}, "key_gradient_rows is 0; supported is 1 to 256"),
        ({"qk_box_columns": 128}, "qk_box_columns is 128; supported are 32 and 64"),
        ({"head_dim": 0}, "head_dim is 0; supported is 1 to"),
    ],
    ids=str,
)
def test_traits_that_cannot_be(machine, change, text):
    assert machine(load_with, change).startswith(text)


def load_with(driver, path, change):
    with pytest.raises(ValueError) as raised:
        load(path, **change)
    return str(raised.value)
