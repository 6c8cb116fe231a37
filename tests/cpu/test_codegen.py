"""The generator: every kernel that can be chosen renders, and says what its configuration says."""

import dataclasses
import re
from pathlib import Path

import pytest

from flash_attn_3 import codegen, config, presets, toolchain
from flash_attn_3.config import ConfigError, Dtype, ForwardConfig, KernelConfig, KernelEnum

ALL_CONFIGS = presets.all_configs()
COMMON_MMA_N = (8, 16, 32, 64, 96, 128, 192, 256)


def traits_of(source: str) -> dict[str, str]:
    """Constant name -> value, read back from the generated text."""
    return dict(re.findall(r"static constexpr [\w:]+ (k\w+) = ([\w:]+);", source))


def camel(name: str) -> str:
    return "k" + name.title().replace("_", "")


@pytest.mark.parametrize("kernel", ALL_CONFIGS, ids=lambda kernel: kernel.name)
def test_every_config_validates_and_renders(kernel: ForwardConfig):
    kernel.validate()
    source = codegen.render(kernel)

    traits = traits_of(source)
    assert list(traits) == [camel(field.name) for field in dataclasses.fields(kernel)]
    for field in dataclasses.fields(kernel):
        value = getattr(kernel, field.name)
        assert traits[camel(field.name)] == (f"fa::{value.cpp}" if isinstance(value, KernelEnum) else str(value))

    assert source.count(f" {kernel.name}(const __grid_constant__ fa::ForwardParams params)") == 1
    assert f"__launch_bounds__({kernel.num_threads}, 1)" in source
    extended = kernel.block_n not in COMMON_MMA_N or kernel.head_dim_v not in COMMON_MMA_N
    assert ("CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED" in source) == extended
    assert source.index("#include") > source.find("#define")


def test_names_and_sources_are_unique():
    assert len(ALL_CONFIGS) > 100
    assert len({kernel.name for kernel in ALL_CONFIGS}) == len(ALL_CONFIGS)
    assert len({codegen.render(kernel) for kernel in ALL_CONFIGS}) == len(ALL_CONFIGS)


@pytest.mark.parametrize(
    "derived",
    [
        "num_consumer_warpgroups",
        "num_threads",
        "smem_bytes",
        "producer_registers",
        "consumer_registers",
        "swizzle_bytes",
        "swizzle_bytes_v",
    ],
)
def test_derived_values_are_tied_to_the_headers(derived):
    for kernel in ALL_CONFIGS:
        expected = f"static_assert(fa::ForwardShape<Traits>::{camel(derived)} == {getattr(kernel, derived)},"
        assert expected in codegen.render(kernel)


@pytest.mark.parametrize(("dtype", "operands"), [(Dtype.BF16, "BF16BF16"), (Dtype.FP16, "F16F16")])
def test_mma_atoms(dtype, operands):
    kernel = next(c for c in ALL_CONFIGS if (c.dtype, c.head_dim, c.head_dim_v) == (dtype, 192, 128))
    source = " ".join(codegen.render(kernel).split())
    gmma = "cute::SM90::GMMA::"
    assert f"using QkMma = {gmma}MMA_64x128x16_F32{operands}_SS< {gmma}Major::K, {gmma}Major::K>;" in source
    assert f"using PvMma = {gmma}MMA_64x128x16_F32{operands}_RS< {gmma}Major::K, {gmma}Major::MN>;" in source


def kernel_enums() -> list[type[KernelEnum]]:
    return [value for value in vars(config).values() if isinstance(value, type) and issubclass(value, KernelEnum)][1:]


@pytest.mark.parametrize("enum", kernel_enums(), ids=lambda enum: enum.__name__)
def test_enums_have_twins_in_the_headers(enum):
    text = Path(toolchain.find_kernel_headers() / "core" / "enums.h").read_text()
    twin = re.search(rf"enum class {enum.__name__}\b[^{{]*{{([^}}]*)}}", text)
    assert twin, f"core/enums.h has no enum class {enum.__name__}"
    body = re.sub(r"//.*", "", twin[1])
    assert re.findall(r"\bk\w+", body) == [member.value for member in enum]


def test_invalid_config_is_refused():
    with pytest.raises(ConfigError, match="num_stages=1"):
        codegen.render(dataclasses.replace(ALL_CONFIGS[0], num_stages=1))


def test_unknown_family_is_refused():
    with pytest.raises(TypeError, match="must be a ForwardConfig, got KernelConfig"):
        codegen.render(KernelConfig())


def test_a_flag_is_no_int():
    # bool passes isinstance(int); in C++ it would silently become 1.
    with pytest.raises(TypeError, match="num_stages must be an int or a KernelEnum, got True"):
        codegen._constant("num_stages", True)
