"""The geometry of the tensor maps against plain address arithmetic (KNOWN_BUGS L1, L2, I3)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fake_cuda
from tensor_maps import ELEMENT_BYTES, Geometry

ALIGNMENT = 16
ALIGNED_ELEMENTS = ALIGNMENT // ELEMENT_BYTES
STRIDE_LIMIT = 2**40 // ELEMENT_BYTES
INT32_MAX = 2**31 - 1
#: Where the tensors of the property tests lie: far enough up for every extent that they draw.
ADDRESS = 2**47
MAX_EXTENT = 2**46 // ELEMENT_BYTES


def coordinates(bound, batch, offset, length, r, head, column):
    """What a kernel asks for: row r of a sequence of `length` rows that starts at row `offset` of its storage."""
    return column, head, bound - length + r, offset + length, batch


def strides_for(size, limit):
    """Supported strides (0: expanded) of a dimension; anything where the dimension has size 1."""
    if size == 1:
        return st.integers(-(2**62), 2**62)
    return st.integers(0, min(STRIDE_LIMIT - 1, limit) // ALIGNED_ELEMENTS).map(lambda n: n * ALIGNED_ELEMENTS)


@st.composite
def tensors(draw):
    """(shape, strides) of a dense or packed tensor of any size a GPU's address space can hold."""
    batch = draw(st.integers(1, 70_000))
    rows = draw(st.one_of(st.integers(1, 300), st.integers(1, INT32_MAX)))
    heads = draw(st.integers(1, 256))
    columns = draw(st.integers(2, 512))
    strides = [
        draw(strides_for(batch, MAX_EXTENT // batch)),
        draw(strides_for(rows, MAX_EXTENT // rows)),
        draw(strides_for(heads, MAX_EXTENT // heads)),
        1,
    ]
    shape = [batch, rows, heads, columns]
    return (shape[1:], strides[1:]) if draw(st.booleans()) else (shape, strides)


@given(st.data())
def test_every_coordinate_has_the_address_of_its_row(data):
    """L1, I3: base + sum(coordinate * stride) is the element's address, in 64 bits; in bounds iff r < length."""
    shape, strides = data.draw(tensors())
    *batches, rows, heads, columns = shape
    batch = data.draw(st.integers(0, batches[0] - 1)) if batches else 0
    offset = data.draw(st.integers(0, rows))
    length = data.draw(st.integers(0, rows - offset))
    r = data.draw(st.one_of(st.integers(0, max(0, length - 1)), st.integers(length, length + 512)))
    head = data.draw(st.integers(0, heads - 1))
    column = data.draw(st.integers(0, columns - 1))

    geometry = Geometry(fake_cuda.tensor(shape, strides=strides, address=ADDRESS))
    asked = coordinates(rows, batch, offset, length, r, head, column)
    assert geometry.in_bounds(asked) == (r < length)
    if r < length:
        index = [*([batch] if batches else []), offset + r, head, column]
        element = sum(i * stride for i, stride in zip(index, strides, strict=True) if i > 0)
        assert geometry.address(asked) == ADDRESS + ELEMENT_BYTES * element


@given(tensors())
def test_what_the_driver_demands_holds(tensor):
    shape, strides = tensor
    geometry = Geometry(fake_cuda.tensor(shape, strides=strides, address=ADDRESS))
    assert geometry.base >= 0
    assert geometry.base % ALIGNMENT == 0
    assert all(0 <= stride < 2**40 and stride % ALIGNMENT == 0 for stride in geometry.strides[1:])
    assert all(1 <= size <= 2**32 for size in geometry.sizes)
    # The largest coordinates, row = bound - 1 and origin = bound, are int32.
    assert geometry.sizes[2] - 1 <= INT32_MAX
    assert geometry.sizes[3] - 1 <= INT32_MAX


def views():
    """Views that callers pass, each (batch, rows, heads, columns) (L1)."""
    packed = torch.empty(2, 7, 3, 4, 64, dtype=torch.bfloat16)
    heads_first = torch.empty(2, 4, 7, 64, dtype=torch.bfloat16)
    rows_first = torch.empty(7, 2, 4, 64, dtype=torch.bfloat16)
    return {
        "q of a packed qkv": packed[:, :, 0],
        "v of a packed qkv": packed[:, :, 2],
        "heads before rows": heads_first.transpose(1, 2),
        "rows before batch": rows_first.transpose(0, 1),
        "every second row": torch.empty(2, 14, 4, 64, dtype=torch.bfloat16)[:, ::2],
        "head_dim 40 of 64": packed[:, :, 1, :, :40],
        "expanded batch": rows_first[:, :1].transpose(0, 1).expand(5, 7, 4, 64),
        "expanded heads": heads_first[:, :1].transpose(1, 2).expand(2, 7, 6, 64),
        "one row": packed[:, 3:4, 1],
        "one batch, junk stride": packed[1:, :, 0].as_strided((1, 7, 4, 64), (13, 768, 64, 1)),
        "one head, junk stride": packed[:, :, 0, :1].as_strided((2, 7, 1, 64), (5376, 768, 5, 1)),
        "wants a gradient": torch.empty(2, 7, 4, 64, dtype=torch.bfloat16, requires_grad=True),
    }


@pytest.mark.parametrize("name", views())
def test_views_of_torch_tensors(name):
    """L1: every row of every view is where torch says it is."""
    view = views()[name]
    geometry = Geometry(view)
    batch, rows, heads, columns = view.shape
    assert geometry.sizes == [columns, heads, rows, rows + 1, batch]
    for b in range(batch):
        for row in range(rows):
            for head in range(heads):
                asked = coordinates(rows, b, 0, rows, row, head, columns - 1)
                assert geometry.address(asked) == view[b, row, head, columns - 1].data_ptr()


@pytest.mark.parametrize("elements", [1, 2, 4, 8])
def test_misaligned_address(elements):
    """L2: an address that TMA cannot read is an error that names it; 8 elements (16 bytes) are aligned."""
    tensor = fake_cuda.tensor((1, 5, 2, 64), address=ADDRESS + ELEMENT_BYTES * elements)
    if elements == 8:
        assert Geometry(tensor).base % ALIGNMENT == 0
        return
    with pytest.raises(ValueError, match=rf"^k starts at .*{ELEMENT_BYTES * elements} bytes past .* required is .* 16"):
        Geometry(tensor, "k")


@pytest.mark.parametrize(
    ("shape", "strides", "address", "text"),
    [
        ((2, 5, 3, 64), (2048, 193, 64, 1), ADDRESS, r"q has a stride of 193 elements between rows; supported .* 8"),
        ((2, 5, 3, 64), (2048, 192, 60, 1), ADDRESS, r"q has a stride of 60 elements between heads"),
        ((2, 5, 3, 64), (2044, 192, 64, 1), ADDRESS, r"q has a stride of 2044 elements between sequences"),
        ((2, 5, 3, 64), (2048, -192, 64, 1), ADDRESS, r"q has a stride of -192 elements between rows"),
        ((2, 5, 3, 64), (2**39, 192, 64, 1), ADDRESS, r"stride of 549755813888 elements .* below 2\^39 elements"),
        ((2, 5, 3, 64), (2048, 192, 64, 2), ADDRESS, r"q has a stride of 2 in its last dimension; required is 1"),
        ((2**31, 3, 64), (192, 64, 1), ADDRESS, r"q has 2147483648 rows; supported is at most 2147483647"),
        ((2**31, 5, 3, 64), (192, 192, 64, 1), ADDRESS, r"q has 2147483648 sequences"),
        ((100, 3, 64), (192, 64, 1), 100 * 192, r"q has 100 rows of stride 384 bytes at address 0x4b00; required"),
    ],
)
def test_what_tma_does_not_support(shape, strides, address, text):
    with pytest.raises(ValueError, match=text):
        Geometry(fake_cuda.tensor(shape, strides=strides, address=address))


def test_the_largest_stride_is_supported():
    largest = STRIDE_LIMIT - ALIGNED_ELEMENTS
    geometry = Geometry(fake_cuda.tensor((2, 5, 3, 64), strides=(largest, 192, 64, 1), address=ADDRESS))
    assert geometry.strides[4] == 2**40 - ALIGNMENT


@pytest.mark.parametrize("dtype", [fake_cuda.FP32, fake_cuda.INT32])
def test_other_dtypes(dtype):
    with pytest.raises(TypeError, match=r"q has dtype (float32|int32); supported are float16 and bfloat16"):
        Geometry(fake_cuda.tensor((1, 5, 2, 64), dtype))
