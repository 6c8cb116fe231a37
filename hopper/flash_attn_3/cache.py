"""Folders of compiled kernels: one sub-folder per kernel with kernel.cu, kernel.cubin and meta.json.

An entry is written to a temporary folder, flushed to disk and renamed into place, so that readers see a whole
entry or none. Each entry carries the cubin's size and hash and is verified when read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

from .config import KernelConfig
from .errors import CacheError

SOURCE_FILE = "kernel.cu"
CUBIN_FILE = "kernel.cubin"
META_FILE = "meta.json"

_LOCK_FOLDER = ".locks"
_HOW_TO_MOVE = "set FLASH_ATTN_3_CACHE to another folder"
_ROOT_USER = 0


@dataclasses.dataclass(frozen=True)
class EntryKey:
    """Names one entry.

    Attributes:
        name: the kernel's readable name.
        source: digest of everything that decides what the kernel computes: schema, configuration, text, device headers.
        build: digest of everything else that went into the cubin: compiler, flags, CUTLASS.
    """

    name: str
    source: str
    build: str

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.source[:16]}-{self.build[:8]}"


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A cubin on disk and what a launch must know about it.

    Attributes:
        config: the configuration it was compiled from.
        folder: the cache entry.
        cubin: the file to load.
        symbol: the kernel's name inside the cubin.
        num_threads: threads of a CTA.
        smem_bytes: dynamic shared memory of a CTA.
        meta: all of meta.json (registers, spills, compile time and memory, compiler).
    """

    config: KernelConfig
    folder: Path
    cubin: Path
    symbol: str
    num_threads: int
    smem_bytes: int
    meta: Mapping[str, object] = dataclasses.field(compare=False, repr=False)


class DamagedEntryError(Exception):
    """An entry that is there but not whole; the text names the file and what is wrong with it."""


class KernelStore:
    """One folder of entries.

    Args:
        root: the folder; created on the first write.
        private: refuse a folder that belongs to, or can be written by, anyone else. Loading a cubin runs its code,
            so the user's cache is private; the output folder of a build is not. From a folder of root's, who rules
            the machine anyway, entries are loaded, but none is added to it.
    """

    def __init__(self, root: Path, *, private: bool) -> None:
        self.root = root
        self._private = private

    # -- reading -----------------------------------------------------------------------------------------------------

    def load(self, config: KernelConfig, key: EntryKey) -> CompiledKernel | None:
        """The entry, or None where there is none.

        Raises:
            DamagedEntryError: the entry is not whole.
            CacheError: the folder is unsafe, or closed to this user.
        """
        self._check_readable()
        folder = self.root / key.folder
        return self._read(config, folder, key.source) if folder.is_dir() else None

    def load_any_build(self, config: KernelConfig, key: EntryKey) -> CompiledKernel | None:
        """The entry made from the same source by whichever compiler, or None. Raises like `load`."""
        self._check_readable()
        folder = next(iter(sorted(self.root.glob(f"{key.name}-{key.source[:16]}-*"))), None)
        return self._read(config, folder, key.source) if folder else None

    @staticmethod
    def _read(config: KernelConfig, folder: Path, source: str) -> CompiledKernel:
        meta_file, cubin = folder / META_FILE, folder / CUBIN_FILE
        try:
            meta = json.loads(meta_file.read_text())
            expected = meta["source_key"], meta["cubin_bytes"], meta["cubin_sha256"]
            symbol, num_threads, smem_bytes = meta["symbol"], meta["num_threads"], meta["smem_bytes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedEntryError(f"{meta_file}: {error!r}") from error
        try:
            image = cubin.read_bytes()
        except OSError as error:
            raise DamagedEntryError(f"{cubin}: {error!r}") from error
        if (source, *digest(image)) != expected:
            raise DamagedEntryError(f"{cubin}: its content is not what {META_FILE} recorded")
        return CompiledKernel(config, folder, cubin, symbol, num_threads, smem_bytes, meta)

    def _check_readable(self) -> None:
        status = self._status_if_private()
        if status is None:
            return
        if status.st_uid not in (os.geteuid(), _ROOT_USER):
            raise CacheError(f"{self._whose_folder(status)}: it will not be used; {_HOW_TO_MOVE}")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CacheError(
                f"the kernel cache folder {self.root} can be written by others (mode "
                f"{stat.S_IMODE(status.st_mode):04o}): it will not be used; `chmod 700 {self.root}`, or {_HOW_TO_MOVE}"
            )
        if stat.S_ISDIR(status.st_mode) and not os.access(self.root, os.R_OK | os.X_OK, effective_ids=True):
            raise CacheError(
                f"the kernel cache folder {self.root} is closed to user {os.geteuid()} who runs this program (mode "
                f"{stat.S_IMODE(status.st_mode):04o}); `chmod -R a+rX {self.root}`, or {_HOW_TO_MOVE}"
            )

    def _status_if_private(self) -> os.stat_result | None:
        """Who owns the folder and may do what there; None where that does not matter or there is no folder yet."""
        if not self._private:
            return None
        with self._os_errors():
            try:
                return self.root.stat()
            except FileNotFoundError:
                return None

    def _whose_folder(self, status: os.stat_result) -> str:
        return (
            f"the kernel cache folder {self.root} belongs to user {status.st_uid}, not to user {os.geteuid()} "
            "who runs this program"
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raise CacheError where `load` does, and where the folder is root's and this user is not root."""
        self._check_readable()
        status = self._status_if_private()
        if status is not None and status.st_uid != os.geteuid():
            raise CacheError(
                f"{self._whose_folder(status)}: its kernels are used, but only its owner can add any; {_HOW_TO_MOVE}"
            )

    @contextlib.contextmanager
    def locked(self, key: EntryKey) -> Iterator[None]:
        """Hold the entry's lock, across processes and threads; the system frees it when its holder dies."""
        with self._os_errors():
            self._create()
            locks = self.root / _LOCK_FOLDER
            locks.mkdir(exist_ok=True)
            lock = filelock.FileLock(locks / f"{key.folder}.lock")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def remove_locks(self) -> None:
        """Leave nothing but kernels in an output folder. Nobody may be compiling into it."""
        shutil.rmtree(self.root / _LOCK_FOLDER, ignore_errors=True)

    @contextlib.contextmanager
    def new_entry(self, key: EntryKey) -> Iterator[Path]:
        """A temporary folder to fill; published under the entry's name on leaving, discarded on an error.

        The caller holds the entry's lock. What stood under the name before, and what a killed process left behind,
        is removed.
        """
        prefix = f".{key.folder}."
        with self._os_errors():
            for leftover in self.root.glob(f"{prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=self.root))
        try:
            yield temporary
            with self._os_errors():
                self._publish(temporary, self.root / key.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def write(self, path: Path, text: str) -> None:
        """Write one file of an entry."""
        with self._os_errors():
            path.write_text(text)

    def _publish(self, temporary: Path, final: Path) -> None:
        # mkdtemp's 0700 would hide the kernel from those who may read the folder; a build's output is for all.
        temporary.chmod(self.root.stat().st_mode & 0o755 if self._private else 0o755)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if final.exists():
            # Rename before deleting: a reader must not see half an entry.
            doomed = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=self.root))
            final.rename(doomed / "old")
            shutil.rmtree(doomed, ignore_errors=True)
        temporary.rename(final)
        _flush(self.root)

    def _create(self) -> None:
        self.root.mkdir(mode=0o700 if self._private else 0o755, parents=True, exist_ok=True)
        self.check_writable()

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Say what an operating-system error means for the user of a cache folder."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self.full(error) from error
            read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            reason = "is read-only" if read_only else "cannot be used"
            raise CacheError(f"the kernel cache folder {self.root} {reason} ({error}); {_HOW_TO_MOVE}") from error

    def full(self, reason: object) -> CacheError:
        """The error for a disk or quota that has no room."""
        return CacheError(
            f"the disk of the kernel cache folder {self.root} is full ({reason}); free some space, or {_HOW_TO_MOVE}"
        )


def digest(content: bytes) -> tuple[int, str]:
    """(size, SHA-256) of a file's content."""
    return len(content), hashlib.sha256(content).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
