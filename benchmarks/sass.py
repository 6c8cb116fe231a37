"""What the compiler made of a kernel: its instructions, and how many of them one step of its main loop issues.

python -m benchmarks.sass KERNEL... [--rescale WAY...]    # builds kernels and counts; needs nvcc and nvdisasm, no GPU

One line for each loop with products: one block of keys (forward) or of queries (backward) for one warpgroup, with the
instructions that each of its warps issues. Loops over blocks at a mask's edge come behind those over full blocks.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flash_attn_3 import compiler, presets
from flash_attn_3.cache import CompiledKernel
from flash_attn_3.config import ForwardConfig, KernelConfig, Rescale


def disassemble(kernel: CompiledKernel) -> list[str]:
    """The SASS instructions in order, of all kernels of the cubin, and between them the labels, as "LABEL:".

    Raises:
        FileNotFoundError: there is no nvdisasm.
    """
    sass = subprocess.run([nvdisasm(), "-c", kernel.cubin], capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^(?:\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z].*?)\s*;|(\.L\w+:))", re.MULTILINE)
    return [instruction or label for instruction, label in line.findall(sass)]


def opcodes(lines: Sequence[str]) -> collections.Counter[str]:
    """How often each instruction occurs, without its modifiers."""
    return collections.Counter(re.split(r"[. ]", line)[0] for line in lines if not line.endswith(":"))


def product_loops(lines: Sequence[str]) -> list[list[str]]:
    """The bodies of the loops with products of a warpgroup that hold no other such loop: from a label to a branch back.

    Other loops may be in them, of waits or of a second try. A branch back from behind an exit ends no loop, but a wait:
    the compiler puts them there.
    """
    places = _places(lines)
    spans = []
    for index, line in enumerate(lines):
        begin = places.get(_target(line), len(lines))
        found = opcodes(lines[begin:index])
        if found["HGMMA"] > 0 and found["EXIT"] == 0:
            spans.append((begin, index))
    return [
        list(lines[begin : end + 1])
        for begin, end in spans
        if not any(begin <= other[0] and other[1] <= end for other in spans if other != (begin, end))
    ]


def usual_path(loop: Sequence[str]) -> list[str]:
    """A loop without what is branched over unless a block overflows: the second try of ``Rescale.ON_OVERFLOW``.

    That is where a warp multiplies by itself (``HMMA``). Loops without such a part are returned as they are.
    """
    second_try = [index for index, line in enumerate(loop) if line.startswith("HMMA")]
    if not second_try:
        return list(loop)
    places = _places(loop)
    for begin in range(second_try[0], -1, -1):
        end = places.get(_target(loop[begin]), -1)
        if end > second_try[-1]:
            return [*loop[: begin + 1], *loop[end:]]
    raise ValueError("no branch leads around the loop's second try")


def steps(lines: Sequence[str]) -> list[collections.Counter[str]]:
    """The instructions on the usual path through each loop with products, shortest first."""
    loops = (opcodes(usual_path(loop)) for loop in product_loops(lines))
    return sorted(loops, key=lambda loop: loop.total())


def nvdisasm() -> str:
    """Where the disassembler is: of the package nvidia-cuda-nvdisasm, or on the path."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    found = next((str(tool) for place in places for tool in place.glob("*/bin/nvdisasm")), shutil.which("nvdisasm"))
    if found is None:
        raise FileNotFoundError("needs nvdisasm: `pip install nvidia-cuda-nvdisasm`")
    return found


def _places(lines: Sequence[str]) -> dict[str, int]:
    return {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}


def _target(line: str) -> str | None:
    """The label that a branch leads to."""
    match = re.match(r"BRA\b.*?(\.L\w+)", line)
    return match[1] if match else None


def _with_each(config: KernelConfig, ways: Sequence[Rescale]) -> list[KernelConfig]:
    """A forward kernel with each of the ways; a backward kernel, which knows none, as it is."""
    if not isinstance(config, ForwardConfig):
        return [config]
    return [dataclasses.replace(config, rescale=way) for way in ways]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="a name, as `generate_kernels.py --list` has them")
    parser.add_argument(
        "--rescale",
        nargs="+",
        choices=[way.slug for way in Rescale],
        metavar="WAY",
        help=f"build forward kernels with each of these instead of their own: {', '.join(way.slug for way in Rescale)}",
    )
    options = parser.parse_args(arguments)
    configs = presets.resolve(options.kernels)
    if options.rescale is not None:
        ways = [way for way in Rescale if way.slug in options.rescale]
        configs = [variant for config in configs for variant in _with_each(config, ways)]
    with tempfile.TemporaryDirectory() as cache:
        for kernel in compiler.build_many(configs, cache):
            for step in steps(disassemble(kernel)):
                shares = ", ".join(f"{count} {opcode}" for opcode, count in step.most_common(8))
                print(f"{kernel.symbol}: {step.total()} instructions a step: {shares}, ...")


if __name__ == "__main__":
    main(sys.argv[1:])
