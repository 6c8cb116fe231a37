"""The tensor maps that the runtime would make, as plain numbers."""

import functools

import fake_cuda
from flash_attn_3 import runtime

ELEMENT_BYTES = 2


class Geometry:
    """A tensor map; dimensions {column, head, row, origin, batch}, innermost first."""

    def __init__(self, tensor, name="q"):
        self.base, *rest = geometry_function()(name, tensor)
        self.sizes = rest[:5]
        self.strides = (ELEMENT_BYTES, *rest[5:])  # bytes

    def address(self, coordinates):
        return self.base + sum(c * s for c, s in zip(coordinates, self.strides, strict=True))

    def in_bounds(self, coordinates):
        return all(0 <= c < size for c, size in zip(coordinates, self.sizes, strict=True))


@functools.cache
def geometry_function():
    return runtime.load_library(fake_cuda.runtime_library()).tensor_map_geometry
