"""Command line: show, write and compile kernels.

  --list                      the kernels of a preset, one name per line
  --emit NAME                 print one kernel's source
  --out DIR                   write the sources of a preset to DIR
  --build [DIR]               compile a preset into DIR, default: the user's cache

The last three work on --preset (default core), or on the kernels named by --kernel.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import codegen, compiler, presets
from .config import KernelConfig
from .errors import CacheError, KernelCompileError, KernelNotBuiltError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parse(arguments)
    try:
        _run(options)
    except (ValueError, OSError, KernelNotBuiltError, KernelCompileError, CacheError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--preset", metavar="core|all|FILE", help="a set of kernels; default: core")
    chosen.add_argument("--kernel", action="append", metavar="NAME", help="one kernel, by name; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("--emit", metavar="NAME", help="print one kernel's source")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the sources to DIR")
    # A lone --build means the user's cache, which only the compiler module can name.
    parser.add_argument("--build", nargs="?", const="", metavar="DIR", help="compile; default: into the user's cache")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at once; default: what cores and memory allow")
    options = parser.parse_args(arguments)
    if not options.list and not options.emit and not options.out and options.build is None:
        parser.error("nothing to do: give --list, --emit, --out or --build")
    return options


def _run(options: argparse.Namespace) -> None:
    if options.emit:
        (config,) = presets.resolve([options.emit])
        print(codegen.render(config), end="")
    if not options.list and not options.out and options.build is None:
        return
    configs = presets.resolve(options.kernel) if options.kernel else presets.load(options.preset or "core")
    if options.list:
        print("\n".join(config.name for config in configs))
    if options.out:
        _write_sources(configs, options.out)
    if options.build is not None:
        compiler.build_many(configs, options.build or None, jobs=options.jobs)


def _write_sources(configs: Sequence[KernelConfig], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for config in configs:
        (folder / f"{config.name}.cu").write_text(codegen.render(config))
    print(f"wrote {len(configs)} sources to {folder}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
