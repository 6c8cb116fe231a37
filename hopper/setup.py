"""The build: `python setup.py install` here, or `pip install .` here or at the root of the repository.

Beside the Python modules it puts into the package
  1. _runtime.so, the host library, compiled by the machine's C++ compiler (`build_runtime`),
  2. device/, the headers that kernels are compiled from (`build_device_headers`),
  3. prebuilt/, the kernels chosen by FLASH_ATTN_3_KERNELS = none | core | all | FILE (`build_kernels`; core by
     default, or none where that cannot be compiled). Every other kernel is compiled when it is first used.
Neither torch nor a GPU is needed. The metadata and the build's own requirements are in pyproject.toml.
"""

import os
import subprocess
import sys
from pathlib import Path

HOPPER = Path(__file__).resolve().parent
ROOT = HOPPER.parent


def install(pip_options: list[str]) -> int:
    """Install with pip: setuptools by itself no longer brings dependencies, nor what the build requires."""
    return subprocess.call([sys.executable, "-m", "pip", "install", *pip_options, str(ROOT)])


def build() -> None:
    """Run the setuptools commands given on the command line."""
    # Sources lie beside this folder (csrc), so the build runs at the root, whichever folder it was started from.
    os.chdir(ROOT)
    # The build uses the package's own compiler and planner modules.
    sys.path.insert(0, str(HOPPER))

    import setuptools
    from build_support.commands import COMMANDS, BinaryDistribution

    setuptools.setup(
        package_dir={"": "hopper"},
        packages=setuptools.find_packages("hopper", include=["flash_attn_3", "flash_attn_3.*"]),
        package_data={"flash_attn_3": ["forward_tiles.json"]},
        py_modules=["flash_attn_config", "flash_attn_interface"],
        cmdclass=COMMANDS,
        distclass=BinaryDistribution,
        zip_safe=False,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        sys.exit(install(sys.argv[2:]))
    build()
