"""What the compile tests read in a cubin."""

from __future__ import annotations

import collections
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flash_attn_3.cache import CompiledKernel


def disassemble(kernel: CompiledKernel) -> list[str]:
    """The SASS instructions in order, of all kernels of the cubin, and between them the labels, as "LABEL:"."""
    sass = subprocess.run([_nvdisasm(), "-c", kernel.cubin], capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^(?:\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z].*?)\s*;|(\.L\w+:))", re.MULTILINE)
    return [instruction or label for instruction, label in line.findall(sass)]


def opcodes(lines: list[str]) -> collections.Counter[str]:
    """How often each instruction occurs, without its modifiers."""
    return collections.Counter(re.split(r"[. ]", line)[0] for line in lines if not line.endswith(":"))


def innermost_loops(lines: list[str]) -> list[list[str]]:
    """The bodies of loops that hold no loop: from a label to a branch back to it."""
    places = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    spans = []
    for index, line in enumerate(lines):
        target = re.search(r"(\.L\w+)", line)
        if line.startswith("BRA") and target and places.get(target[1], index) < index:
            spans.append((places[target[1]], index))
    return [
        lines[begin : end + 1]
        for begin, end in spans
        if not any(begin <= other[0] and other[1] <= end for other in spans if other != (begin, end))
    ]


def _nvdisasm() -> str:
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = next((str(tool) for place in places for tool in place.glob("*/bin/nvdisasm")), shutil.which("nvdisasm"))
    if found is None:
        pytest.skip("needs nvdisasm: `pip install nvidia-cuda-nvdisasm`")
    return found
