"""The kernel compiler: entries, keys, look-up order, concurrent processes, and what the compiler may do wrong.

The compiler is a stub, so that its calls can be counted and its failures chosen.
"""

import dataclasses
import json
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compiler_fixtures import COMPILES, CONFIG
from flash_attn_3 import codegen, compiler
from flash_attn_3.config import Mask
from flash_attn_3.errors import (
    CacheError,
    CompilerNotFoundError,
    HeadersNotFoundError,
    KernelCompileError,
    KernelNotBuiltError,
)

#: Another process that asks for CONFIG as soon as it is told to.
ASK_FOR_KERNEL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from compiler_fixtures import CONFIG
from flash_attn_3 import compiler, toolchain
toolchain._SOURCE_TREE = Path(sys.argv[1])
compiler.PREBUILT_DIR = toolchain._SOURCE_TREE / "prebuilt"
print("ready", flush=True)
sys.stdin.readline()
print(compiler.get_kernel(CONFIG).cubin)
"""


def start_process(workbench) -> subprocess.Popen:
    command = [sys.executable, "-c", ASK_FOR_KERNEL, str(workbench.root), str(Path(__file__).parents[1])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=workbench.environment(), start_new_session=True, **pipes)


def entry_of(workbench) -> Path:
    (entry,) = (path for path in workbench.cache.iterdir() if path.name.startswith("fwd_"))
    return entry


# -- what an entry holds ---------------------------------------------------------------------------------------------


def test_an_entry_is_complete_and_private(workbench, capfd):
    kernel = compiler.compile_one(CONFIG)

    assert sorted(path.name for path in kernel.folder.iterdir()) == ["kernel.cu", "kernel.cubin", "meta.json"]
    assert kernel.folder.parent == workbench.cache
    assert stat.S_IMODE(workbench.cache.stat().st_mode) == 0o700
    assert kernel.cubin.read_bytes().startswith(b"cubin of // Kernel fwd_")
    assert (kernel.symbol, kernel.num_threads, kernel.smem_bytes) == (CONFIG.name, 384, CONFIG.smem_bytes)

    meta = json.loads((kernel.folder / "meta.json").read_text())
    assert meta == kernel.meta
    ptxas = (meta["registers"], meta["stack_bytes"], meta["spill_store_bytes"], meta["spill_load_bytes"])
    assert ptxas == (168, 16, 8, 12)
    assert meta["compile_seconds"] > 0 and meta["compile_cpu_seconds"] > 0
    assert meta["config"]["mask"] == "CAUSAL" and meta["config"]["block_n"] == 128
    assert list(meta["config"]) == [field.name for field in dataclasses.fields(CONFIG)]
    assert "release 13.0" in meta["nvcc_version"] and meta["cutlass_version"] == "4.2.0"

    announced = capfd.readouterr().err.splitlines()
    assert announced == [f"flash_attn_3: compiling {CONFIG.name} (once; kept in {workbench.cache})"]


def test_compiler_memory_is_not_this_process_memory(workbench):
    # A child counts the pages of the process that started it; with tensors in memory the figure would be theirs.
    ballast = bytearray(os.urandom(1 << 20) * 400)
    peak = compiler.compile_one(CONFIG).meta["compile_peak_bytes"]
    assert 1 << 20 < peak < len(ballast) // 4


def test_second_request_compiles_nothing(workbench, capfd):
    first = compiler.get_kernel(CONFIG)
    assert compiler.get_kernel(CONFIG) is first
    capfd.readouterr()
    workbench.forget()
    assert compiler.get_kernel(CONFIG) == first
    assert workbench.num_compilations() == 1
    assert capfd.readouterr().err == ""


def test_cache_folder_follows_the_environment(workbench, monkeypatch):
    monkeypatch.delenv("FLASH_ATTN_3_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert compiler.user_store().root == Path("/xdg/flash_attn_3")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert compiler.user_store().root == Path("/home/somebody/.cache/flash_attn_3")


def test_user_without_a_home(workbench, monkeypatch):
    for variable in ("FLASH_ATTN_3_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda user: {}[user])
    with pytest.raises(CacheError, match=r"no kernel cache folder ~/\.cache/flash_attn_3 .*; set FLASH_ATTN_3_CACHE"):
        compiler.get_kernel(CONFIG)
    monkeypatch.setenv("FLASH_ATTN_3_CACHE", str(workbench.cache))
    assert compiler.get_kernel(CONFIG)


def test_relative_paths(workbench, monkeypatch):
    # The compiler runs in the entry's folder, where a relative path would mean another place.
    workbench.write_compiler(
        'for flag; do case "$flag" in -I*) test -d "${flag#-I}" || exit 7;; esac; done\n' + COMPILES
    )
    monkeypatch.chdir(workbench.root)
    monkeypatch.setenv("CUTLASS_PATH", "cutlass")
    monkeypatch.setenv("FLASH_ATTN_3_NVCC", "toolkit/nvcc")
    monkeypatch.setenv("FLASH_ATTN_3_CACHE", "cache")
    workbench.forget()
    assert compiler.get_kernel(CONFIG).folder.parent == workbench.cache
    assert compiler.compile_one(CONFIG, "out").cubin.is_relative_to(workbench.root / "out")


# -- keys ------------------------------------------------------------------------------------------------------------


def change_header(header):
    def change(workbench):
        (workbench.kernels / header).write_text("// changed\n")

    return change


def add_header(workbench):
    (workbench.kernels / "core" / "new.h").touch()


def rename_header(workbench):
    (workbench.kernels / "core" / "traits.cuh").rename(workbench.kernels / "core" / "other.cuh")


def upgrade_compiler(workbench):
    workbench.write_compiler(version="Cuda compilation tools, release 13.1, V13.1.80")


def upgrade_cutlass(workbench):
    header = workbench.cutlass / "include" / "cutlass" / "version.h"
    header.write_text(header.read_text().replace("MINOR 2", "MINOR 3"))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_header("params.h"), id="params"),
        pytest.param(change_header("core/traits.cuh"), id="core"),
        pytest.param(change_header("fwd/kernel.cuh"), id="family"),
        add_header,
        rename_header,
        upgrade_compiler,
        upgrade_cutlass,
    ],
)
def test_key_changes_with_all_that_decides_the_cubin(workbench, change):
    before = compiler.compile_one(CONFIG)
    change(workbench)
    workbench.forget()
    after = compiler.compile_one(CONFIG)
    assert after.folder != before.folder
    assert workbench.num_compilations() == 2


@pytest.mark.parametrize("variable", ["NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"])
def test_key_changes_with_flags_from_the_environment(workbench, monkeypatch, variable):
    before = compiler.compile_one(CONFIG)
    monkeypatch.setenv(variable, "-G")
    assert compiler.compile_one(CONFIG).folder != before.folder


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CONFIG)])
def test_key_changes_with_every_field(workbench, monkeypatch, field):
    # Without the text, which shows every field anyway and which not every changed configuration has.
    monkeypatch.setattr(codegen, "render", lambda config: "")
    value = getattr(CONFIG, field)
    other = value + 1 if isinstance(value, int) else next(member for member in type(value) if member is not value)
    changed = dataclasses.replace(CONFIG, **{field: other})
    assert compiler.entry_key(changed).source != compiler.entry_key(CONFIG).source


def test_key_changes_with_the_generator(workbench, monkeypatch):
    before = compiler.entry_key(CONFIG)
    text = codegen.render(CONFIG)
    monkeypatch.setattr(codegen, "render", lambda config: text + "// more\n")
    assert compiler.entry_key(CONFIG).source != before.source


def test_other_families_and_plain_text_do_not_touch_the_key(workbench):
    before = compiler.compile_one(CONFIG)
    change_header("bwd/kernel.cuh")(workbench)
    (workbench.kernels / "README.md").write_text("words")
    workbench.forget()
    assert compiler.compile_one(CONFIG) == before
    assert workbench.num_compilations() == 1


# -- many processes --------------------------------------------------------------------------------------------------


def test_eight_processes_compile_a_kernel_once(workbench):
    workbench.write_compiler("sleep 0.5\n" + COMPILES)
    processes = [start_process(workbench) for _ in range(8)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0] * 8, outputs
    assert {output for output, _ in outputs} == {f"{entry_of(workbench) / 'kernel.cubin'}\n"}
    assert workbench.num_compilations() == 1
    assert sum("compiling" in errors for _, errors in outputs) == 1


def test_what_a_killed_process_left_behind_is_cleared(workbench):
    workbench.write_compiler("sleep 60\n")
    process = start_process(workbench)
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 30
    while not workbench.num_compilations() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(workbench.cache.glob(".fwd_*"))

    workbench.write_compiler()
    kernel = compiler.get_kernel(CONFIG)
    assert kernel.folder == entry_of(workbench)
    assert not list(workbench.cache.glob(".fwd_*"))


def test_build_many(workbench, tmp_path, capsys):
    configs = [CONFIG, dataclasses.replace(CONFIG, mask=Mask.FULL), CONFIG]
    kernels = compiler.build_many(configs, tmp_path / "out", jobs=2)
    assert [kernel.config for kernel in kernels] == configs[:2]
    # An output folder is installed for all users, and holds kernels alone.
    assert sorted(path for path in (tmp_path / "out").iterdir()) == sorted(kernel.folder for kernel in kernels)
    assert all(stat.S_IMODE(kernel.folder.stat().st_mode) == 0o755 for kernel in kernels)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["[1/2]", "[2/2]"]


def test_build_many_stops_at_the_first_failure(workbench):
    workbench.write_compiler("exit 1")
    configs = [dataclasses.replace(CONFIG, block_n=block_n) for block_n in (16, 32, 48, 64, 80, 96, 112)]
    with pytest.raises(KernelCompileError, match="m128n16s2"):
        compiler.build_many(configs, jobs=1, progress=False)
    assert workbench.num_compilations() <= 2


# -- look-up order ---------------------------------------------------------------------------------------------------


def test_prebuilt_goes_first_and_needs_no_compiler(workbench):
    compiler.build_many([CONFIG], compiler.PREBUILT_DIR, progress=False)
    workbench.nvcc.unlink()
    workbench.forget()
    assert compiler.get_kernel(CONFIG).folder.parent == compiler.PREBUILT_DIR
    assert not workbench.cache.exists()


def test_prebuilt_kernel_of_other_headers_is_not_used(workbench):
    compiler.build_many([CONFIG], compiler.PREBUILT_DIR, progress=False)
    change_header("fwd/kernel.cuh")(workbench)
    workbench.forget()
    assert compiler.get_kernel(CONFIG).folder.parent == workbench.cache


def test_damaged_prebuilt_kernel_is_named_and_recompiled(workbench):
    (kernel,) = compiler.build_many([CONFIG], compiler.PREBUILT_DIR, progress=False)
    kernel.cubin.write_bytes(b"")
    with pytest.warns(UserWarning, match=f"damaged and will be recompiled: {kernel.cubin}"):
        assert compiler.get_kernel(CONFIG).folder.parent == workbench.cache


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_jit_off(workbench, monkeypatch, value):
    monkeypatch.setenv("FLASH_ATTN_3_JIT", value)
    with pytest.raises(KernelNotBuiltError) as caught:
        compiler.get_kernel(CONFIG)
    told = f"FLASH_ATTN_3_JIT={value}"
    for part in (CONFIG.name, str(workbench.cache), told, f"generate --kernel {CONFIG.name} --build"):
        assert part in str(caught.value)
    assert workbench.num_compilations() == 0 and not workbench.cache.exists()

    built = compiler.compile_one(CONFIG)  # what the command in the message does
    assert compiler.get_kernel(CONFIG) == built


@pytest.mark.parametrize("value", ["", "1", "true", "Yes", "ON"])
def test_jit_on(workbench, monkeypatch, value):
    monkeypatch.setenv("FLASH_ATTN_3_JIT", value)
    assert compiler.get_kernel(CONFIG)
    assert workbench.num_compilations() == 1


def test_jit_neither_on_nor_off(workbench, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_3_JIT", "never")
    with pytest.raises(ValueError, match=r"FLASH_ATTN_3_JIT='never' is not supported; it must be one of 1, true, .*0"):
        compiler.get_kernel(CONFIG)
    assert workbench.num_compilations() == 0


def test_missing_compiler_names_the_kernel(workbench):
    workbench.nvcc.unlink()
    with pytest.raises(CompilerNotFoundError, match=f"kernel {CONFIG.name} is neither .* does not exist"):
        compiler.get_kernel(CONFIG)
    with pytest.raises(CompilerNotFoundError, match="does not exist"):
        compiler.compile_one(CONFIG)


def test_missing_cutlass_names_the_kernel(workbench, monkeypatch):
    monkeypatch.setenv("CUTLASS_PATH", str(workbench.root / "nowhere"))
    with pytest.raises(HeadersNotFoundError, match=f"kernel {CONFIG.name} is neither .* holds no CUTLASS"):
        compiler.get_kernel(CONFIG)


def test_without_a_compiler_any_compilers_build_serves(workbench):
    built = compiler.compile_one(CONFIG)
    workbench.nvcc.unlink()
    workbench.forget()
    assert compiler.get_kernel(CONFIG) == built


# -- compiler failures -----------------------------------------------------------------------------------------------


def test_compile_error_carries_the_output_and_leaves_nothing(workbench):
    workbench.write_compiler("echo 'kernel.cu(7): error: no such atom' >&2; exit 2")
    with pytest.raises(KernelCompileError, match=f"kernel {CONFIG.name} does not compile \\(exit code 2\\)") as caught:
        compiler.get_kernel(CONFIG)
    assert "no such atom" in str(caught.value) and "no such atom" in caught.value.output
    assert not list(workbench.cache.glob("*fwd_*"))

    workbench.write_compiler()
    assert compiler.get_kernel(CONFIG).cubin.exists()


def test_compiler_that_writes_no_cubin(workbench):
    workbench.write_compiler("exit 0")
    with pytest.raises(KernelCompileError, match=f"wrote no kernel.cubin for kernel {CONFIG.name}"):
        compiler.get_kernel(CONFIG)


@pytest.mark.parametrize(
    "message",
    [
        "(C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x in function y",
        "(C7515) Potential Performance Loss: something new",
        "wgmma.mma_async instructions are serialized due to insufficient register resources",
        "(C7508) setmaxnreg ignored to maintain minimum register requirements.",
    ],
)
def test_serialised_tensor_cores_are_an_error(workbench, message):
    workbench.write_compiler(f"echo 'ptxas info    : {message}' >&2\n{COMPILES}")
    with pytest.raises(KernelCompileError, match="ptxas serialised its tensor-core instructions") as caught:
        compiler.get_kernel(CONFIG)
    assert message in str(caught.value) and "Used 168" not in str(caught.value)
