"""The build: which headers travel with the package, and that an installed package is complete."""

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
from hypothesis import given, settings
from hypothesis import strategies as st

import flash_attn_3
from compiler_fixtures import CONFIG
from flash_attn_3 import toolchain

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(flash_attn_3.__file__).parent

installed = pytest.mark.skipif(
    PACKAGE.is_relative_to(ROOT / "hopper"), reason="needs an installed package; this one is the source tree"
)


def _build_support(name: str) -> ModuleType:
    """A module of the build, which is not part of the package."""
    folder = ROOT / "hopper" / "build_support"
    spec = importlib.util.spec_from_file_location("build_support", folder / "__init__.py")
    sys.modules.setdefault("build_support", importlib.util.module_from_spec(spec))
    return importlib.import_module(f"build_support.{name}")


commands = _build_support("commands")
device_headers = _build_support("device_headers")

#: A folder of headers: for each, its sub-folder and the headers it includes, by number.
include_graphs = st.lists(st.tuples(st.sampled_from(["", "arch/"]), st.sets(st.integers(0, 7))), min_size=1, max_size=8)


def _reachable(graph: list[tuple[str, set[int]]], roots: set[int]) -> set[int]:
    """Brute force: add one step at a time until nothing is new."""
    reached = set(roots)
    while True:
        step = reached.union(*(graph[node][1] for node in reached)) if reached else set()
        step = {node for node in step if node < len(graph)}
        if step <= reached:
            return reached
        reached |= step


@settings(max_examples=50)
@given(include_graphs, st.sets(st.integers(0, 7)), st.sampled_from(['"{}"', "<{}>"]))
def test_include_closure_is_what_can_be_reached(tmp_path_factory, graph, included, quoting):
    include = tmp_path_factory.mktemp("include")
    names = [f"{folder}h{index}.hpp" for index, (folder, _) in enumerate(graph)]
    # A number beyond the graph is a header of the compiler's own: it is not found, and left out.
    targets = [*names, *(f"vector{index}" for index in range(len(names), 8))]

    def text(numbers: set[int]) -> str:
        return "".join(f"  #  include {quoting.format(targets[number])}\n" for number in sorted(numbers))

    for name, (_, numbers) in zip(names, graph, strict=True):
        path = include / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#pragma once\n{text(numbers)}// #include <commented/out.h>\n")
    root = tmp_path_factory.mktemp("kernels") / "kernel.cuh"
    root.write_text(text(included))

    closure = device_headers.include_closure([root], include)

    expected = _reachable(graph, {number for number in included if number < len(graph)})
    assert closure == sorted(include.resolve() / names[number] for number in expected)


def test_include_closure_follows_a_quoted_include_to_both_places(tmp_path):
    """A quoted include names a file beside its own or one of the include folder; both are taken where both exist."""
    (tmp_path / "arch").mkdir()
    for name, text in {"a.hpp": '#include "arch/b.hpp"', "arch/b.hpp": '#include "c.hpp"'}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "arch" / "c.hpp").write_text("")
    (tmp_path / "c.hpp").write_text("")
    closure = device_headers.include_closure([tmp_path / "a.hpp"], tmp_path)
    assert [str(path.relative_to(tmp_path.resolve())) for path in closure] == [
        "a.hpp",
        "arch/b.hpp",
        "arch/c.hpp",
        "c.hpp",
    ]


def test_copied_headers_hold_their_own_closure(tmp_path):
    """What is copied compiles without the CUTLASS that it was copied from, and stale files go."""
    stale = tmp_path / "device" / "kernels" / "removed.cuh"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    kernels, cutlass = toolchain.find_kernel_headers(), toolchain.find_cutlass()

    device_headers.copy_device_headers(kernels, cutlass, tmp_path / "device")

    copied = tmp_path / "device" / "cutlass"
    headers = device_headers.kernel_headers(tmp_path / "device" / "kernels")
    assert [path.relative_to(tmp_path / "device" / "kernels") for path in headers] == [
        path.relative_to(kernels) for path in device_headers.kernel_headers(kernels)
    ]
    roots = [*headers, copied / "cutlass" / "version.h"]
    original = device_headers.include_closure([*headers, cutlass / "cutlass" / "version.h"], cutlass)
    assert [path.relative_to(copied) for path in device_headers.include_closure(roots, copied)] == [
        path.relative_to(cutlass.resolve()) for path in original
    ]
    assert toolchain.cutlass_version(copied) == toolchain.cutlass_version(cutlass)
    assert "NVIDIA" in (copied / "LICENSE.txt").read_text()


def test_headers_without_their_licence_are_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(FileNotFoundError, match=r"LICENSE\.txt"):
        device_headers.cutlass_license(tmp_path / "cutlass" / "include")


# -- kernels that are compiled ahead ---------------------------------------------------------------------------------


def refuse_kernels(workbench):
    workbench.write_compiler("echo 'kernel.cu(7): error: no such atom' >&2; exit 2")


def remove_compiler(workbench):
    workbench.nvcc.unlink()


broken_compilers = pytest.mark.parametrize(
    ("break_compiler", "reason"), [(refuse_kernels, "no such atom"), (remove_compiler, "nvcc does not exist")]
)


@pytest.fixture
def build_kernels(workbench, tmp_path, monkeypatch):
    """Runs that step of the build in an empty folder, under a value of FLASH_ATTN_3_KERNELS; counts what it built."""
    (tmp_path / "kernels.txt").write_text(f"{CONFIG.name}\n")
    monkeypatch.chdir(tmp_path)

    def run(requested: str | None) -> int:
        monkeypatch.delenv("FLASH_ATTN_3_KERNELS", raising=False)
        if requested is not None:
            monkeypatch.setenv("FLASH_ATTN_3_KERNELS", requested)
        step = commands.BuildKernels(setuptools.Distribution())
        step.ensure_finalized()
        step.run()
        return len(list(step.package.glob("prebuilt/*/kernel.cubin")))

    return run


@pytest.mark.parametrize(("requested", "number"), [("kernels.txt", 1), ("none", 0)])
def test_requested_kernels_go_into_the_package(workbench, build_kernels, requested, number):
    assert build_kernels(requested) == workbench.num_compilations() == number


@broken_compilers
@pytest.mark.parametrize("requested", [None, ""])
def test_the_package_is_built_without_the_default_kernels(
    workbench, build_kernels, caplog, requested, break_compiler, reason
):
    break_compiler(workbench)
    assert build_kernels(requested) == 0
    assert "no kernel is compiled ahead of time; each is compiled when it is first used" in caplog.text
    assert reason in caplog.text


@broken_compilers
def test_the_package_is_not_built_without_requested_kernels(workbench, build_kernels, break_compiler, reason):
    break_compiler(workbench)
    with pytest.raises(commands.ExecError) as caught:
        build_kernels("kernels.txt")
    for part in ("FLASH_ATTN_3_KERNELS=kernels.txt cannot be compiled", reason, "FLASH_ATTN_3_KERNELS=none installs"):
        assert part in str(caught.value)


# -- the installed package -------------------------------------------------------------------------------------------


@installed
def test_installed_package_holds_runtime_and_current_headers():
    assert (PACKAGE / "_runtime.so").read_bytes().startswith(b"\x7fELF")
    kernels = ROOT / "csrc" / "kernels"
    for header in device_headers.kernel_headers(kernels):
        copy = PACKAGE / "device" / "kernels" / header.relative_to(kernels)
        assert copy.read_bytes() == header.read_bytes()
    assert (PACKAGE / "device" / "cutlass" / "LICENSE.txt").is_file()


@installed
def test_installed_package_holds_the_planners_table():
    source = ROOT / "hopper" / "flash_attn_3" / "forward_tiles.json"
    assert (PACKAGE / "forward_tiles.json").read_bytes() == source.read_bytes()


@installed
def test_wheel_is_for_this_platform_and_every_python():
    wheel = importlib.metadata.distribution("flash_attn_3").read_text("WHEEL").splitlines()
    assert [line for line in wheel if line.startswith("Tag:")] == ["Tag: py3-none-linux_x86_64"]
    assert "Root-Is-Purelib: false" in wheel


@installed
def test_compiler_extra_is_what_the_toolchain_looks_for():
    extra = {line for line in importlib.metadata.requires("flash_attn_3") if 'extra == "compiler"' in line}
    release = ".".join(map(str, toolchain.PYPI_RELEASE))
    assert {line.split(";")[0].strip() for line in extra} == {
        f"{package}=={release}.*" for package in toolchain.PYPI_COMPILER_PARTS
    }
