"""The kernel cache where the disk is at fault: damaged entries, and folders that must not or cannot be used."""

import dataclasses
import errno
import json
import os
import stat
import tempfile
import traceback
from pathlib import Path

import pytest

from compiler_fixtures import CONFIG
from flash_attn_3 import cache, compiler, toolchain
from flash_attn_3.config import Mask
from flash_attn_3.errors import CacheError

# -- damaged entries -------------------------------------------------------------------------------------------------


def truncate_cubin(folder):
    (folder / "kernel.cubin").write_bytes((folder / "kernel.cubin").read_bytes()[:-1])


def flip_bit(folder):
    content = bytearray((folder / "kernel.cubin").read_bytes())
    content[0] ^= 1
    (folder / "kernel.cubin").write_bytes(content)


def remove_cubin(folder):
    (folder / "kernel.cubin").unlink()


def remove_meta(folder):
    (folder / "meta.json").unlink()


def empty_meta(folder):
    (folder / "meta.json").write_text("")


def foreign_meta(folder):
    (folder / "meta.json").write_text("[1]")


def meta_without_symbol(folder):
    meta = json.loads((folder / "meta.json").read_text())
    del meta["symbol"]
    (folder / "meta.json").write_text(json.dumps(meta))


def other_source(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "source_key": "0" * 64}))


DAMAGES = [
    truncate_cubin,
    flip_bit,
    remove_cubin,
    remove_meta,
    empty_meta,
    foreign_meta,
    meta_without_symbol,
    other_source,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_rebuilt(workbench, damage):
    kernel = compiler.get_kernel(CONFIG)
    image = kernel.cubin.read_bytes()
    damage(kernel.folder)
    workbench.forget()
    assert compiler.get_kernel(CONFIG) == kernel
    assert kernel.cubin.read_bytes() == image
    assert workbench.num_compilations() == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_entry_that_a_rebuild_does_not_mend_is_an_error(workbench, monkeypatch, damage):
    publish = cache.KernelStore._publish

    def publish_on_a_bad_disk(self, temporary, final):
        publish(self, temporary, final)
        damage(final)

    monkeypatch.setattr(cache.KernelStore, "_publish", publish_on_a_bad_disk)
    with pytest.raises(CacheError, match=f"damaged again right after it was rebuilt: {workbench.cache}/fwd_.*/"):
        compiler.get_kernel(CONFIG)
    assert workbench.num_compilations() == 1


def test_damaged_entry_with_jit_off_is_named(workbench, monkeypatch):
    truncate_cubin(compiler.compile_one(CONFIG).folder)
    monkeypatch.setenv("FLASH_ATTN_3_JIT", "0")
    with pytest.raises(CacheError, match=r"FLASH_ATTN_3_JIT=0.*kernel\.cubin: its content is not what"):
        compiler.get_kernel(CONFIG)


# -- folders that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
@pytest.mark.parametrize("jit", ["1", "0"])
def test_folder_that_others_can_write_is_refused(workbench, monkeypatch, mode, jit):
    compiler.compile_one(CONFIG)
    workbench.cache.chmod(mode)
    monkeypatch.setenv("FLASH_ATTN_3_JIT", jit)
    with pytest.raises(CacheError, match=f"{workbench.cache} can be written by others .mode {mode:04o}.*chmod 700"):
        compiler.get_kernel(CONFIG)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755])
def test_folder_that_others_can_only_read_is_used(workbench, mode):
    workbench.cache.mkdir()
    workbench.cache.chmod(mode)
    entry = compiler.get_kernel(CONFIG).folder
    assert stat.S_IMODE(entry.stat().st_mode) == mode, "who may read the folder may read its kernels"
    workbench.forget()
    assert compiler.get_kernel(CONFIG).folder == entry


@pytest.mark.parametrize("jit", ["1", "0"])
def test_folder_of_another_user_is_refused(workbench, monkeypatch, jit):
    compiler.compile_one(CONFIG)
    if os.geteuid() == 0:
        os.chown(workbench.cache, 65534, 65534)  # root's folder would do
    monkeypatch.setattr(os, "geteuid", lambda: workbench.cache.stat().st_uid + 1)
    monkeypatch.setenv("FLASH_ATTN_3_JIT", jit)
    with pytest.raises(CacheError, match=f"{workbench.cache} belongs to user \\d+, not to user .* will not be used"):
        compiler.get_kernel(CONFIG)


@pytest.fixture
def roots_cache(workbench, monkeypatch):
    """A cache folder of root's that holds the kernel of CONFIG; the program runs as another user."""
    compiler.compile_one(CONFIG)
    owner = workbench.cache.stat().st_uid
    monkeypatch.setattr(cache, "_ROOT_USER", owner)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    workbench.forget()
    return workbench.cache


def test_kernels_of_roots_folder_are_used(workbench, roots_cache):
    assert compiler.get_kernel(CONFIG).folder.parent == roots_cache
    workbench.write_compiler(version="Cuda compilation tools, release 13.1, V13.1.80")
    workbench.forget()
    assert compiler.get_kernel(CONFIG).folder.parent == roots_cache, "another compiler's is the only one to be had"
    assert workbench.num_compilations() == 1


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_roots_folder_that_others_can_write_is_refused(roots_cache, mode):
    roots_cache.chmod(mode)
    with pytest.raises(CacheError, match=f"{roots_cache} can be written by others"):
        compiler.get_kernel(CONFIG)


def test_nothing_is_added_to_roots_folder(workbench, roots_cache):
    missing = dataclasses.replace(CONFIG, mask=Mask.FULL)
    with pytest.raises(CacheError) as caught:
        compiler.get_kernel(missing)
    for part in (
        f"kernel {missing.name} is neither in the package nor in {roots_cache}, and ",
        "belongs to user",
        "its kernels are used, but only its owner can add any; set FLASH_ATTN_3_CACHE to another folder",
        f"generate --kernel {missing.name} --build",
    ):
        assert part in str(caught.value)
    with pytest.raises(CacheError, match="only its owner can add any"):
        compiler.compile_one(missing)
    assert workbench.num_compilations() == 1


def test_damaged_entry_in_roots_folder_is_named(roots_cache):
    truncate_cubin(next(roots_cache.glob("fwd_*")))
    with pytest.raises(CacheError, match=r"only its owner can add any.*kernel\.cubin: its content is not what"):
        compiler.get_kernel(CONFIG)


def run_unprivileged(function) -> str:
    """Call `function` in a child process without root's rights; returns what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            answer = function()
        except BaseException:
            answer = traceback.format_exc()
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_read_only_folder(workbench):
    # Below the system's temporary folder: pytest's own is closed to other users.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "cache"
        folder.mkdir()
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
        folder.chmod(0o500)
        tools = toolchain.find_toolchain()
        key = compiler.entry_key(CONFIG, tools)

        def compile_there():
            store = cache.KernelStore(folder, private=True)
            with pytest.raises(CacheError) as caught:
                compiler._compile_locked(store, CONFIG, key, tools, announce=False)
            return str(caught.value)

        answer = run_unprivileged(compile_there)
    assert answer.startswith(f"the kernel cache folder {folder} is read-only"), answer
    assert "set FLASH_ATTN_3_CACHE to another folder" in answer


def test_roots_folder_that_is_closed_to_others(workbench):
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folder = Path(parent) / "cache"
        folder.mkdir(mode=0o300)
        key = compiler.entry_key(CONFIG, toolchain.find_toolchain())

        def load_from_there():
            with pytest.raises(CacheError) as caught:
                cache.KernelStore(folder, private=True).load(CONFIG, key)
            return str(caught.value)

        answer = run_unprivileged(load_from_there)
        folder.chmod(0o700)
    assert answer.startswith(f"the kernel cache folder {folder} is closed to user"), answer
    assert f"`chmod -R a+rX {folder}`, or set FLASH_ATTN_3_CACHE" in answer


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, "is read-only"),
        (errno.EACCES, "is read-only"),
        (errno.ENOSPC, "is full"),
        (errno.EDQUOT, "is full"),
        (errno.EIO, "cannot be used"),
    ],
)
@pytest.mark.parametrize("call", ["mkdtemp", "write_text", "fsync", "rename"])
def test_operating_system_errors_are_explained(workbench, monkeypatch, code, message, call):
    def fail(*_arguments, **_keywords):
        raise OSError(code, os.strerror(code))

    owner = {"mkdtemp": tempfile, "fsync": os}.get(call, Path)
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, fail)
        with pytest.raises(CacheError, match=f"{workbench.cache} {message} .*{os.strerror(code)}"):
            compiler.get_kernel(CONFIG)
    assert not list(workbench.cache.glob("*fwd_*"))
    assert compiler.get_kernel(CONFIG)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_disk_that_fills_up_under_the_compiler(workbench):
    workbench.write_compiler("cat kernel.cu > /dev/full || exit 1")
    with pytest.raises(CacheError, match=f"{workbench.cache} is full .*No space left.*; free some space"):
        compiler.get_kernel(CONFIG)


def test_cache_path_that_is_a_file(workbench):
    workbench.cache.write_text("")
    workbench.cache.chmod(0o600)
    with pytest.raises(CacheError, match=f"{workbench.cache} cannot be used"):
        compiler.get_kernel(CONFIG)
