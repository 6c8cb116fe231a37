"""Run a suite and write its figures to a JSON file.

    python -m benchmarks --suite fwd                        39 shapes beside cuDNN, flash, flex and FlashAttention-4
    python -m benchmarks --suite fwd --shapes bars          six shapes
    python -m benchmarks --suite fwd --shapes b4 --peers fa4    a window, and batches of different lengths
    python -m benchmarks --suite fwd --shapes b7 --peers fa4    131072 tokens
    python -m benchmarks --suite fwd --shapes d128,causal --peers cudnn
    python -m benchmarks --suite bwd                        gradients of the same 39 shapes
    python -m benchmarks --suite bwd --shapes c4            keys of 192 columns, values of 128
    python -m benchmarks --suite fwd+bwd                    both passes together
    python -m benchmarks --suite overhead                   host time per call
    python -m benchmarks --suite compile --preset core      build time and memory; needs no GPU
    python -m benchmarks --suite compile --preset all --family bwd    of all backward kernels

The exit status is 1 where a result is wrong, or below the speed that bars.py demands.
`python -m benchmarks.report FILE --markdown` shows a file, `--plot` draws it, `--readme` puts it into README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import bars, machine, peers, shapes


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=("fwd", "bwd", "fwd+bwd", "overhead", "compile"), required=True)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: benchmarks/results/SUITE.json")
    parser.add_argument("--commit", metavar="TEXT", help="names the measured sources where this is no git clone")
    timed = parser.add_argument_group("fwd, bwd, fwd+bwd and overhead")
    timed.add_argument(
        "--shapes", default="peers", help="a set (peers, bars, quick, b4, b7, c4) and filters (d128, causal, s8192)"
    )
    timed.add_argument("--peers", default="cudnn,flash,flex,fa4", help="default: %(default)s; may be empty")
    timed.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    timed.add_argument("--rounds", type=int, default=2, help="measurements of each version, in turns; default: 2")
    built = parser.add_argument_group("compile")
    built.add_argument("--preset", default="core", help="core, all, or a file of kernel names; default: core")
    built.add_argument("--kernel", action="append", default=[], metavar="NAME", help="instead; may be repeated")
    built.add_argument("--family", choices=("fwd", "bwd"), help="only kernels of this pass")
    built.add_argument("--jobs", type=int, help="compilers at once; 1 for undisturbed times of single kernels")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a result is wrong or too slow, 2 if the suite cannot run here."""
    options = _parse(arguments)
    if options.suite != "compile" and not torch.cuda.is_available():
        print(f"suite {options.suite} needs a Hopper GPU; torch sees no CUDA device", file=sys.stderr)
        return 2
    failed: list[str] = []
    try:
        if options.suite in ("fwd", "bwd", "fwd+bwd"):
            from . import backward, comparison, forward

            passes = {what.suite: what for what in (forward.Forward, backward.Backward, backward.ForwardBackward)}
            dtype = getattr(torch, options.dtype)
            chosen, peer_names = shapes.select(options.shapes), peers.select(options.peers)
            result = comparison.measure(passes[options.suite](), chosen, peer_names, dtype, options.rounds)
            failed = bars.failures(result)
        elif options.suite == "overhead":
            from . import overhead

            result = overhead.measure(peers.select(options.peers))
            failed = overhead.failures(result)
        else:
            from . import compilation

            families = [options.family] if options.family else compilation.FAMILIES
            result = compilation.measure(options.preset, options.kernel, options.jobs, families)
            failed = bars.failures(result)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.commit:
        result["commit"] = options.commit
    path = options.out or machine.RESULTS / f"{options.suite}.json"
    machine.save(result, path)
    print(f"wrote {path}", file=sys.stderr)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
