"""The kernel cache where the disk is at fault: damaged entries, and folders that must not or cannot be used."""

import errno
import json
import os
import tempfile
import traceback
from pathlib import Path

import pytest

from compiler_fixtures import CONFIG
from flash_attn_3 import cache, compiler, toolchain
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


def test_folder_that_others_can_only_read_is_used(workbench):
    compiler.compile_one(CONFIG)
    workbench.cache.chmod(0o755)
    assert compiler.get_kernel(CONFIG)


def test_folder_of_another_user_is_refused(workbench, monkeypatch):
    compiler.compile_one(CONFIG)
    monkeypatch.setattr(os, "geteuid", lambda: workbench.cache.stat().st_uid + 1)
    with pytest.raises(CacheError, match=f"{workbench.cache} belongs to user \\d+, not to user"):
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
