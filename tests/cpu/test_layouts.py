"""Where the emulator has the elements of operands and fragments, beside where CuTe has them.

The emulator's results depend on it, and with them what they say of hardware: CuTe is of those who make it.
"""

import ctypes
import importlib.util
from pathlib import Path

import pytest

import host_headers
from flash_attn_3 import runtime_build

_CUTE_PROBE = "cute/atom/mma_traits_sm90_gmma.hpp"
_SOURCE_TREE = Path(__file__).resolve().parents[2]
#: Bits of a matrix descriptor (PTX ISA): of the offsets, and those that exchange the swizzles of 128 and 64 bytes.
LEADING_BIT, STRIDE_BIT, SWIZZLE_BITS = 1 << 16, 1 << 32, 0b11 << 62


def include_folders() -> tuple[Path, ...]:
    """CUTLASS with CuTe's layouts, which the package does not carry, and what it includes of CUDA."""
    spec = importlib.util.find_spec("cutlass_library")
    places = [_SOURCE_TREE / "csrc/cutlass/include"]
    places += [Path(place) / "source/include" for place in (spec.submodule_search_locations if spec else ())]
    cutlass = next((place for place in places if (place / _CUTE_PROBE).is_file()), None)
    if cutlass is None:
        pytest.skip("needs CuTe: the submodule csrc/cutlass, or PyPI's nvidia-cutlass")
    libcudacxx = runtime_build.find_cuda_include() / "cccl"
    return (cutlass, libcudacxx)


@pytest.fixture(scope="module")
def shim() -> ctypes.CDLL:
    return host_headers.build("layout_shim.cc", includes=include_folders())


@pytest.mark.parametrize("major", ["k", "mn"])
@pytest.mark.parametrize("swizzle", [128, 64])
def test_operands_in_shared_memory(shim, major, swizzle):
    misplaced = shim[f"misplaced_{major}_{swizzle}"]
    misplaced.argtypes = [ctypes.c_uint64]
    assert misplaced(0) == 0
    assert misplaced(STRIDE_BIT) > 0
    assert misplaced(SWIZZLE_BITS) > 0
    # Not used where a swizzled tile's rows are the operand's.
    assert (misplaced(LEADING_BIT) > 0) == (major == "mn")


@pytest.mark.parametrize(
    "what",
    [
        "accumulators",
        "first_operand",
        "warp_accumulators",
        "warp_first_operand",
        "warp_second_operand",
        "loads",
        "stores",
    ],
)
def test_registers(shim, what):
    assert shim[f"misplaced_{what}"]() == 0
