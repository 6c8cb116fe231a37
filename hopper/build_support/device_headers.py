"""Collects the headers that kernels are compiled from, so that an installed package can compile at first use."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"]+)[>"]', re.MULTILINE)


def kernel_headers(kernels: Path) -> list[Path]:
    """Every header below ``csrc/kernels``, sorted."""
    return sorted(path for path in kernels.rglob("*") if path.suffix in (".h", ".cuh"))


def include_closure(roots: Iterable[Path], include_dir: Path) -> list[Path]:
    """The files of ``include_dir`` that ``roots`` reach through ``#include``, sorted.

    Conditions of the preprocessor are ignored, so the result may hold more than one compilation reads, never less.
    Includes found neither beside the including file nor in ``include_dir`` (the CUDA toolkit's, the standard
    library's) belong to the compiler and are left out.
    """
    include_dir = include_dir.resolve()
    seen: set[Path] = set()
    pending = [path.resolve() for path in roots]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8", errors="replace")):
            candidates = ((folder / name).resolve() for folder in (path.parent, include_dir))
            pending.extend(found for found in candidates if found.is_file())
    return sorted(path for path in seen if path.is_relative_to(include_dir))


def copy_headers(headers: Iterable[Path], source: Path, target: Path) -> None:
    """Copy ``headers`` from below ``source`` to the same places below ``target``."""
    source = source.resolve()
    for header in headers:
        copy = target / header.resolve().relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(header, copy)


def cutlass_license(include_dir: Path) -> Path:
    """The licence that came with these CUTLASS headers: in a checkout, or in the metadata of PyPI's nvidia-cutlass.

    Raises:
        FileNotFoundError: there is none, so the headers must not be copied into the package.
    """
    candidates = [folder / "LICENSE.txt" for folder in (include_dir.parent, include_dir)]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("nvidia-cutlass") or ()
        candidates += [Path(file.locate()) for file in files if file.name == "LICENSE.txt"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"CUTLASS's LICENSE.txt is in none of {', '.join(map(str, candidates))}")
    return found


def copy_device_headers(kernels: Path, cutlass_include: Path, device: Path) -> None:
    """Fill ``device`` (emptied first) with ``kernels/`` and the part of CUTLASS that they need, ``cutlass/``.

    Args:
        kernels: the folder ``csrc/kernels``.
        cutlass_include: CUTLASS's include folder, which holds ``cute/`` and ``cutlass/``.
        device: the folder to fill.
    """
    shutil.rmtree(device, ignore_errors=True)
    headers = kernel_headers(kernels)
    copy_headers(headers, kernels, device / "kernels")
    # No kernel includes version.h, but the version is part of the key that a compiled kernel is found by.
    roots = [*headers, cutlass_include / "cutlass" / "version.h"]
    copy_headers(include_closure(roots, cutlass_include), cutlass_include, device / "cutlass")
    shutil.copyfile(cutlass_license(cutlass_include), device / "cutlass" / "LICENSE.txt")
