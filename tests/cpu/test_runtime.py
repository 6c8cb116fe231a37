"""The runtime library without a GPU: its build, and its argument checks."""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import fake_cuda
from compiler_fixtures import CONFIG, RELEASE
from fake_cuda import BF16, CPU, CUDA, FP16, FP32, INT32, INT64
from flash_attn_3 import compiler, runtime, runtime_build
from flash_attn_3.errors import RuntimeLibraryError, UnsupportedDeviceError
from forward_calls import dense_call, forward, library, packed_call

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# -- build and load --------------------------------------------------------------------------------------------------


def test_missing_library_names_the_build_command(tmp_path):
    with pytest.raises(RuntimeLibraryError, match=r"python -m flash_attn_3\.runtime_build"):
        runtime.load_library(tmp_path / "_runtime.so")


def test_damaged_library_names_the_build_command(tmp_path):
    damaged = tmp_path / "_runtime.so"
    damaged.write_bytes(b"no shared library")
    with pytest.raises(RuntimeLibraryError, match=r"cannot be loaded .* rebuild it with `python -m"):
        runtime.load_library(damaged)


def test_without_tvm_ffi(monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    with pytest.raises(RuntimeLibraryError, match=r"apache-tvm-ffi cannot be imported .*`pip install apache-tvm-ffi`"):
        runtime.load_library(runtime.LIBRARY)
    with pytest.raises(runtime_build.RuntimeBuildError, match=r"apache-tvm-ffi cannot be imported"):
        runtime_build.build(csrc=CSRC)


def test_build_without_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(runtime_build.RuntimeBuildError, match=r"no C\+\+ compiler.*c\+\+, g\+\+, clang\+\+"):
        runtime_build.build(tmp_path / "_runtime.so", CSRC)
    monkeypatch.setenv("CXX", "/nowhere/g++ -O3")
    with pytest.raises(runtime_build.RuntimeBuildError, match=r"CXX=/nowhere/g\+\+ is not an executable"):
        runtime_build.build(tmp_path / "_runtime.so", CSRC)


def test_build_without_sources(tmp_path):
    with pytest.raises(runtime_build.RuntimeBuildError, match="no sources in"):
        runtime_build.build(tmp_path / "_runtime.so", tmp_path)


def test_failed_build_shows_the_compiler_output_and_leaves_nothing(tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "broken.cc").write_text("int f() { return missing_name; }\n")
    library_file = tmp_path / "package" / "_runtime.so"
    with pytest.raises(runtime_build.RuntimeBuildError, match="missing_name"):
        runtime_build.build(library_file, tmp_path)
    assert list(library_file.parent.iterdir()) == []


def test_library_needs_no_cuda_and_no_python():
    """One build serves every Python and loads on machines without a GPU."""
    dynamic = subprocess.run(
        ["readelf", "--dynamic", str(fake_cuda.runtime_library())], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split("[")[1].split("]")[0] for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert "libtvm_ffi.so" in needed
    assert not [name for name in needed if "cuda" in name or "python" in name or "torch" in name]


def test_importing_the_module_loads_nothing():
    code = "import sys; from flash_attn_3 import runtime; sys.exit('tvm_ffi' in sys.modules or 'torch' in sys.modules)"
    environment = {"PYTHONPATH": str(Path(runtime.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


@pytest.mark.parametrize("name", ["num_sms", "compute_capability"])
def test_without_a_driver(name):
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(UnsupportedDeviceError, match=r"CUDA driver cannot be opened .*libcuda\.so\.1"):
        getattr(library(), name)(0)


@pytest.mark.parametrize(("version", "release"), [(RELEASE, 13000), (RELEASE.replace("13.0", "12.10"), 12100)])
def test_the_release_of_nvcc_goes_with_a_kernel(workbench, monkeypatch, version, release):
    """A driver that refuses the kernel may be older."""
    workbench.write_compiler(version=version)
    workbench.forget()
    kernel = compiler.compile_one(CONFIG)
    functions = SimpleNamespace(forward_load=lambda *traits: traits[-1])
    monkeypatch.setattr(runtime, "_library", lambda: functions)
    assert runtime.load_kernel(kernel) == release


# -- argument checks; nothing reaches a driver -----------------------------------------------------------------------


@pytest.mark.parametrize("call", [dense_call, packed_call])
def test_valid_arguments(call):
    """So every error below comes from the one thing that its case changes."""
    forward(call())


@pytest.mark.parametrize("handle", [-1, 0, 1 << 40])
def test_unknown_handle(handle):
    with pytest.raises(ValueError, match=rf"^handle is {handle}; supported are the handles of the 0 loaded kernel"):
        forward(dense_call(handle=handle))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": ((2, 5, 6, 64), BF16, (CPU, 0))}, ValueError, r"q is on cpu; the kernels support CUDA devices"),
        ({"k": ((2, 7, 3, 64), BF16, (CUDA, 1))}, ValueError, r"k is on cuda:1; required is q's device, cuda:0"),
        ({"out": ((2, 5, 6, 128), BF16, (CPU, 0))}, ValueError, r"out is on cpu; required is q's device, cuda:0"),
        ({"lse": ((2, 6, 5), FP32, (CUDA, 1))}, ValueError, r"lse is on cuda:1"),
        ({"seqused_k": ((2,), INT32, (CPU, 0))}, ValueError, r"seqused_k is on cpu"),
        ({"q": ((2, 5, 6, 64), FP32)}, TypeError, r"q has dtype float32; supported are float16 and bfloat16"),
        ({"v": ((2, 7, 3, 128), FP16)}, TypeError, r"v has dtype float16; required is bfloat16"),
        ({"lse": ((2, 6, 5), BF16)}, TypeError, r"lse has dtype bfloat16; required is float32"),
        ({"seqused_q": ((2,), INT64)}, TypeError, r"seqused_q has dtype int64; required is int32"),
        ({"q": ((10, 6, 64), BF16)}, ValueError, r"q has shape \(10, 6, 64\); required is \(batch, seqlen, heads"),
        ({"q": ((2, 5, 7, 64), BF16)}, ValueError, r"q has 7 heads and k has 3; required .* multiple of k's"),
        ({"k": ((2, 7, 0, 64), BF16)}, ValueError, r"q has 6 heads and k has 0"),
        ({"k": ((3, 7, 3, 64), BF16)}, ValueError, r"k: shape \(3, 7, 3, 64\) .* = \(2, 7, 3, 64\)"),
        ({"k": ((2, 7, 3, 72), BF16)}, ValueError, r"k: shape \(2, 7, 3, 72\) .* head_dim of q\) = \(2, 7, 3, 64\)"),
        ({"v": ((2, 8, 3, 128), BF16)}, ValueError, r"v: shape \(2, 8, 3, 128\) .* = \(2, 7, 3, 128\)"),
        ({"v": ((2, 7, 1, 128), BF16)}, ValueError, r"v: shape \(2, 7, 1, 128\)"),
        ({"out": ((2, 5, 6, 64), BF16)}, ValueError, r"out: shape \(2, 5, 6, 64\) .* = \(2, 5, 6, 128\)"),
        (
            {"lse": ((2, 5, 6), FP32)},
            ValueError,
            r"lse: shape \(2, 5, 6\) .* \(batch, heads_q, seqlen_q\) = \(2, 6, 5\)",
        ),
        ({"seqused_k": ((3,), INT32)}, ValueError, r"seqused_k: shape \(3\) .* \(batch\) = \(2\)"),
        ({"promoted_out": ((4,), BF16)}, TypeError, r"promoted_out has dtype bfloat16; required is float32"),
        ({"promoted_out": ((4,), FP32, (CPU, 0))}, ValueError, r"promoted_out is on cpu; required is q's device"),
        ({"num_ctas": 2**31}, ValueError, r"num_ctas is 2147483648; supported is 0 to 2147483647"),
        ({"max_seqlen_q": 2**31}, ValueError, r"max_seqlen_q is 2147483648"),
        ({"packed_heads": 0}, ValueError, r"packed_heads is 0; supported is 1 to"),
        ({"packed_heads": 65}, ValueError, r"packed_heads is 65; supported are at most 64 heads together"),
        (
            {"packed_heads": 3},
            ValueError,
            r"packed_heads is 3; required is that the 6 heads of q for 3 of k make",
        ),
        ({"num_value_passes": 0}, ValueError, r"num_value_passes is 0; supported is 1 to"),
        ({"heads_per_section": 0}, ValueError, r"heads_per_section is 0; supported is 1 to"),
        ({"window_left": -2}, ValueError, r"window_left is -2; supported is -1 to"),
        ({"window_right": 2**31}, ValueError, r"window_right is 2147483648; supported is -1 to"),
        ({"attention_chunk": -1}, ValueError, r"attention_chunk is -1; supported is 0 to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_dense_arguments_that_do_not_fit(change, error, text):
    def make(shape, dtype, device=(CUDA, 0)):
        return fake_cuda.tensor(shape, dtype, device=device)

    change = {name: make(*value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(error, match=f"^{text}"):
        forward(dense_call(**change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"q": ((1, 11, 6, 64), BF16)}, r"q has shape \(1, 11, 6, 64\); required is \(total rows, heads, head_dim\)"),
        ({"cu_seqlens_q": ((2, 2), INT32)}, r"cu_seqlens_q has shape \(2, 2\); required is \(batch \+ 1\)"),
        ({"cu_seqlens_q": ((0,), INT32)}, r"cu_seqlens_q has shape \(0\); required is \(batch \+ 1\)"),
        ({"cu_seqlens_k": ((5,), INT32)}, r"cu_seqlens_k: shape \(5\) .* \(batch \+ 1\) = \(4\)"),
        ({"v": ((12, 3, 128), BF16)}, r"v: shape \(12, 3, 128\) .* \(total_k, heads_kv, head_dim_v\) = \(13, 3, 128\)"),
        ({"lse": ((11, 6), FP32)}, r"lse: shape \(11, 6\) .* \(heads_q, total_q\) = \(6, 11\)"),
        ({"max_seqlen_q": -1}, r"max_seqlen_q is -1; supported is 0 to"),
        ({"max_seqlen_k": 2**31}, r"max_seqlen_k is 2147483648"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_packed_arguments_that_do_not_fit(change, text):
    change = {name: fake_cuda.tensor(*value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=f"^{text}"):
        forward(packed_call(**change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lse": ((2, 6, 5), FP32, (60, 1, 6))}, r"lse has a stride of 6 in its last dimension; required is 1"),
        ({"seqused_q": ((2,), INT32, (2,))}, r"seqused_q has stride 2; required is a contiguous vector"),
        ({"out": ((2, 5, 6, 128), BF16, (3840, 768, 0, 1))}, r"out is expanded \(a stride is 0\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_strides_that_do_not_fit(change, text):
    """L1."""
    ((name, (shape, dtype, strides)),) = change.items()
    with pytest.raises(ValueError, match=f"^{text}"):
        forward(dense_call(**{name: fake_cuda.tensor(shape, dtype, strides=strides)}))


@pytest.mark.parametrize(
    ("index", "value", "text"),
    [
        (2, 0, r"num_threads is 0; supported is 1 to"),
        (3, -1, r"smem_bytes is -1; supported is 0 to"),
        (4, 48, r"qk_box_columns is 48; supported are 32 and 64"),
        (5, 128, r"vo_box_columns is 128; supported are 32 and 64"),
        (6, 0, r"qo_box_rows is 0; supported is 1 to 256"),
        (7, 257, r"kv_box_rows is 257; supported is 1 to 256"),
        (8, -1, r"promoted_floats is -1; supported is 0 to"),
        (9, 0, r"cluster_size is 0; supported is 1 to"),
        (10, -1, r"nvcc_release is -1; supported is 0 to"),
    ],
)
def test_kernel_traits_that_cannot_be(index, value, text):
    traits = [b"cubin", "symbol", 384, 200_000, 64, 64, 64, 128, 1000, 1, 13000]
    traits[index] = value
    with pytest.raises(ValueError, match=f"^{text}"):
        library().forward_load(*traits)
