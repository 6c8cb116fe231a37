"""Where the compiler and the headers are found, and what is said when they are not."""

import shutil
from pathlib import Path

import pytest

from compiler_fixtures import write_cutlass, write_nvcc
from flash_attn_3 import jobs, toolchain
from flash_attn_3.errors import CompilerNotFoundError, HeadersNotFoundError, KernelNotBuiltError


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """No compiler and no headers anywhere; gcc alone on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "gcc"):
        (tools / tool).symlink_to(shutil.which(tool) or shutil.which("true"))
    monkeypatch.setenv("PATH", str(tools))
    for variable in ("FLASH_ATTN_3_NVCC", "CUDA_HOME", "CUDA_PATH", "CUTLASS_PATH", "NVCC_CCBIN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain, "_SOURCE_TREE", tmp_path / "tree")
    monkeypatch.setattr(toolchain, "_PACKAGE_DIR", tmp_path / "package")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    toolchain.reset()
    yield
    toolchain.reset()


class Spec:
    """As much of a module spec as the lookup reads."""

    def __init__(self, location: Path):
        self.submodule_search_locations = [str(location)]


# -- compiler --------------------------------------------------------------------------------------------------------


def test_search_order(tmp_path, monkeypatch):
    places = {name: write_nvcc(tmp_path / name / "bin" / "nvcc") for name in ("explicit", "home", "cuda_path", "path")}
    monkeypatch.setenv("PATH", f"{tmp_path}/path/bin", prepend=":")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "cuda_path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FLASH_ATTN_3_NVCC", str(places["explicit"]))
    found = []
    for variable in ("FLASH_ATTN_3_NVCC", "CUDA_HOME", "CUDA_PATH", None):
        toolchain.reset()
        found.append(toolchain.find_compiler().nvcc)
        if variable:
            monkeypatch.delenv(variable)
    assert found == list(places.values())
    assert toolchain.find_compiler().release == (13, 0)


def test_cuda_home_without_nvcc_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "full"))
    nvcc = write_nvcc(tmp_path / "full" / "bin" / "nvcc")
    assert toolchain.find_compiler().nvcc == nvcc


def test_old_nvcc_is_passed_over_for_a_newer_one(tmp_path, monkeypatch):
    write_nvcc(tmp_path / "old" / "bin" / "nvcc", version="Cuda compilation tools, release 11.8, V11.8.89")
    newer = write_nvcc(tmp_path / "new" / "bin" / "nvcc", version="Cuda compilation tools, release 12.10, V12.10.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "new"))
    assert toolchain.find_compiler().nvcc == newer


def test_no_compiler_at_all():
    with pytest.raises(CompilerNotFoundError, match="no usable nvcc") as caught:
        toolchain.find_compiler()
    for hint in ("CUDA_HOME", "PATH", "pip install", "nvidia-cuda-nvcc", "FLASH_ATTN_3_NVCC", "12.3"):
        assert hint in str(caught.value)
    assert isinstance(caught.value, KernelNotBuiltError)


def test_only_an_old_compiler(tmp_path, monkeypatch):
    write_nvcc(tmp_path / "old" / "bin" / "nvcc", version="Cuda compilation tools, release 12.2, V12.2.1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    with pytest.raises(CompilerNotFoundError, match=r"CUDA_HOME=.*is release 12.2; 12.3 or newer is needed"):
        toolchain.find_compiler()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "does not exist"),
        ("#!/bin/sh\nexit 3\n", "--version` failed: .* exit status 3"),
        ("#!/bin/sh\necho hello\n", "names no release; it printed 'hello'"),
    ],
)
def test_a_named_compiler_is_used_or_refused(tmp_path, monkeypatch, script, reason):
    nvcc = tmp_path / "mine"
    if script:
        nvcc.write_text(script)
        nvcc.chmod(0o755)
    monkeypatch.setenv("FLASH_ATTN_3_NVCC", str(nvcc))
    monkeypatch.setenv("CUDA_HOME", str(write_nvcc(tmp_path / "good" / "bin" / "nvcc").parents[1]))
    with pytest.raises(CompilerNotFoundError, match=f"FLASH_ATTN_3_NVCC={nvcc} cannot be used: .*{reason}"):
        toolchain.find_compiler()


def install_from_pypi(root: Path, monkeypatch: pytest.MonkeyPatch, without: str = "") -> Path:
    for package, probe in toolchain.PYPI_COMPILER_PARTS.items():
        if package != without:
            write_nvcc(root / "nvidia" / "cu13" / probe)
    monkeypatch.setattr(
        toolchain.importlib.util, "find_spec", lambda name: Spec(root / "nvidia") if name == "nvidia" else None
    )
    return root / "nvidia" / "cu13" / "bin" / "nvcc"


def test_compiler_from_pypi(tmp_path, monkeypatch):
    nvcc = install_from_pypi(tmp_path, monkeypatch)
    write_nvcc(tmp_path / "nvidia" / "cu9" / "bin" / "nvcc")  # 9 < 13, though not as text
    assert toolchain.find_compiler().nvcc == nvcc


@pytest.mark.parametrize("package", [name for name in toolchain.PYPI_COMPILER_PARTS if name != "nvidia-cuda-nvcc"])
def test_incomplete_compiler_from_pypi_names_the_missing_package(tmp_path, monkeypatch, package):
    install_from_pypi(tmp_path, monkeypatch, without=package)
    with pytest.raises(CompilerNotFoundError, match=f'is incomplete; `pip install "{package}==13.0') as caught:
        toolchain.find_compiler()
    assert "PyPI:" in str(caught.value)


def test_parts_that_torch_brings_are_no_compiler(tmp_path, monkeypatch):
    install_from_pypi(tmp_path, monkeypatch, without="nvidia-cuda-nvcc")
    with pytest.raises(CompilerNotFoundError, match="no nvcc in CUDA_HOME, CUDA_PATH, PATH or the installed PyPI"):
        toolchain.find_compiler()


def test_host_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_3_NVCC", str(write_nvcc(tmp_path / "nvcc")))
    assert toolchain.find_compiler().host_compiler is None  # nvcc finds gcc by itself

    gcc = tmp_path / "bin" / "gcc"
    gcc.rename(tmp_path / "bin" / "clang++")
    toolchain.reset()
    assert toolchain.find_compiler().host_compiler == str(tmp_path / "bin" / "clang++")

    (tmp_path / "bin" / "clang++").unlink()
    toolchain.reset()
    with pytest.raises(CompilerNotFoundError, match=r"needs a host compiler on PATH: one of gcc, g\+\+"):
        toolchain.find_compiler()


# -- headers ---------------------------------------------------------------------------------------------------------


def test_cutlass_search_order(tmp_path, monkeypatch):
    explicit = write_cutlass(tmp_path / "mine")
    submodule = write_cutlass(tmp_path / "tree" / "csrc" / "cutlass")
    packaged = write_cutlass(tmp_path / "package" / "device" / "cutlass")
    from_pypi = write_cutlass(tmp_path / "cutlass_library" / "source")
    monkeypatch.setenv("CUTLASS_PATH", str(explicit))
    monkeypatch.setattr(
        toolchain.importlib.util,
        "find_spec",
        lambda name: Spec(tmp_path / "cutlass_library") if name == "cutlass_library" else None,
    )
    assert toolchain.find_cutlass() == explicit / "include"
    monkeypatch.delenv("CUTLASS_PATH")
    for place in (submodule, packaged, from_pypi):
        toolchain.reset()
        assert toolchain.find_cutlass() == place / "include"
        shutil.rmtree(place)


def test_cutlass_path_may_be_the_include_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTLASS_PATH", str(write_cutlass(tmp_path / "mine") / "include"))
    assert toolchain.find_cutlass() == tmp_path / "mine" / "include"


def test_cutlass_version(tmp_path):
    include = write_cutlass(tmp_path / "mine", "4 2 1") / "include"
    assert toolchain.cutlass_version(include) == "4.2.1"
    (include / "cutlass" / "version.h").unlink()
    with pytest.raises(HeadersNotFoundError, match=r"version.h does not give CUTLASS's version"):
        toolchain.cutlass_version(include)


def test_missing_cutlass():
    with pytest.raises(HeadersNotFoundError, match=r"git submodule .* nvidia-cutlass==4\.2\.0\.0.* CUTLASS_PATH"):
        toolchain.find_cutlass()


def test_wrong_cutlass_path_is_not_passed_over(tmp_path, monkeypatch):
    write_cutlass(tmp_path / "tree" / "csrc" / "cutlass")
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(HeadersNotFoundError, match=f"CUTLASS_PATH={tmp_path}/nowhere holds no CUTLASS"):
        toolchain.find_cutlass()


def test_kernel_headers_come_from_the_source_tree_then_from_the_package(tmp_path):
    places = [tmp_path / "tree" / "csrc" / "kernels", tmp_path / "package" / "device" / "kernels"]
    for place in places:
        place.mkdir(parents=True)
        (place / "params.h").touch()
    for place in places:
        toolchain.reset()
        assert toolchain.find_kernel_headers() == place
        shutil.rmtree(place)
    toolchain.reset()
    with pytest.raises(HeadersNotFoundError, match=r"headers were not found in .*kernels or .*kernels; reinstall"):
        toolchain.find_kernel_headers()


# -- jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "memory", "max_jobs", "requested", "expected"),
    [
        (8, 100e9, None, None, 8),
        (8, 5e9, None, None, 4),  # 1.2 GB each
        (8, 0.1e9, None, None, 1),
        (8, None, None, None, 8),
        (8, 100e9, "3", None, 3),
        (2, 100e9, "64", None, 2),
        (2, 100e9, None, 16, 16),
        (2, 100e9, "4", 16, 4),
    ],
)
def test_job_count(monkeypatch, cores, memory, max_jobs, requested, expected):
    monkeypatch.setattr(jobs, "_available_cores", lambda: cores)
    monkeypatch.setattr(jobs, "available_memory", lambda: None if memory is None else int(memory))
    monkeypatch.setenv("MAX_JOBS", max_jobs or "")
    assert jobs.job_count(requested) == expected


def test_bad_job_counts(monkeypatch):
    with pytest.raises(ValueError, match="jobs=0 is not supported; it must be a positive integer"):
        jobs.job_count(0)
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(ValueError, match="MAX_JOBS='many' is not supported"):
        jobs.job_count()


def test_available_memory_is_the_smaller_of_machine_and_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(jobs, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(jobs, "_CGROUP", tmp_path)
    assert jobs.available_memory() == 4_096_000
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    assert jobs.available_memory() == 4_096_000
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert jobs.available_memory() == 1_500_000
