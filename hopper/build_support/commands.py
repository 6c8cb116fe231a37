"""The setuptools commands of the build. `build` runs them in the order in which hopper/setup.py explains them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import setuptools
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import ExecError

from .device_headers import copy_device_headers

if TYPE_CHECKING:
    from flash_attn_3.compiler import CompiledKernel

_SOURCE_PACKAGE = Path("hopper") / "flash_attn_3"


class BinaryDistribution(setuptools.Distribution):
    """A distribution for one platform although it has no extension module."""

    def has_ext_modules(self) -> bool:
        return True


class BuildWheel(bdist_wheel):
    """Tags the wheel for its platform and every Python 3: the runtime library knows no Python ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class Build(build):
    """Starts from an empty folder, so that nothing deleted from the sources reaches the package."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildStep(setuptools.Command):
    """A step that adds files to the package: to its build folder, or, for an editable install, to the source tree."""

    user_options: ClassVar = []

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False  # set by setuptools

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def package(self) -> Path:
        """The folder flash_attn_3 that the files go to."""
        return _SOURCE_PACKAGE if self.editable_mode else Path(self.build_lib) / "flash_attn_3"

    # What setuptools asks of a step of `build`. These files are found through the package folder, not through lists.

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class BuildRuntime(BuildStep):
    description = "compile the runtime library with the host's C++ compiler"

    def run(self) -> None:
        from flash_attn_3 import runtime_build

        runtime_build.build(self.package / runtime_build.LIBRARY_NAME)


class BuildDeviceHeaders(BuildStep):
    description = "copy the headers that kernels are compiled from"

    def run(self) -> None:
        from flash_attn_3 import toolchain

        if self.editable_mode:
            return  # found where they are; a copy would go stale
        copy_device_headers(Path("csrc/kernels"), toolchain.find_cutlass(), self.package / "device")


class BuildKernels(BuildStep):
    description = "compile the kernels chosen by FLASH_ATTN_3_KERNELS ahead of time"

    def run(self) -> None:
        # Compiled in a folder that outlives the build, so that the next one compiles only what has changed.
        store = Path(self.get_finalized_command("build").build_base) / "kernels"
        prebuilt = self.package / "prebuilt"
        shutil.rmtree(prebuilt, ignore_errors=True)
        for kernel in self._compiled(store):
            shutil.copytree(kernel.folder, prebuilt / kernel.folder.name)

    def _compiled(self, store: Path) -> list[CompiledKernel]:
        """What FLASH_ATTN_3_KERNELS asks for; where it asks for nothing, the default set if that can be compiled."""
        from flash_attn_3 import compiler, errors, presets

        requested = os.environ.get("FLASH_ATTN_3_KERNELS")
        configs = presets.load(requested or "core")
        try:
            return compiler.build_many(configs, store)
        except (errors.CompilerNotFoundError, errors.KernelCompileError) as error:
            if requested:
                raise ExecError(
                    f"FLASH_ATTN_3_KERNELS={requested} cannot be compiled: {error}\n"
                    "FLASH_ATTN_3_KERNELS=none installs without; each kernel is then compiled when it is first used."
                ) from error
            self.warn(f"no kernel is compiled ahead of time; each is compiled when it is first used. {error}")
            return []


COMMANDS = {
    "bdist_wheel": BuildWheel,
    "build": Build,
    "build_runtime": BuildRuntime,
    "build_device_headers": BuildDeviceHeaders,
    "build_kernels": BuildKernels,
}
Build.sub_commands = [
    *build.sub_commands,
    *((name, None) for name in ("build_runtime", "build_device_headers", "build_kernels")),
]
