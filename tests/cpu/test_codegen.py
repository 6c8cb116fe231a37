"""The generator: every kernel that can be chosen renders, and says what its configuration says."""

import dataclasses
import re
from pathlib import Path

import pytest

from flash_attn_3 import codegen, config, presets, toolchain
from flash_attn_3.backward_config import Accumulation, BackwardConfig, DqPath, WarpgroupSplit
from flash_attn_3.config import ConfigError, Dtype, ForwardConfig, KernelConfig, KernelEnum, Score

ALL_CONFIGS = presets.all_configs()
FORWARD_CONFIGS = [config for config in ALL_CONFIGS if isinstance(config, ForwardConfig)]
BACKWARD_CONFIGS = [config for config in ALL_CONFIGS if isinstance(config, BackwardConfig)]
COMMON_MMA_N = (8, 16, 32, 64, 96, 128, 192, 256)


def traits_of(source: str) -> dict[str, str]:
    """Constant name -> value, read back from the generated text."""
    return dict(re.findall(r"static constexpr [\w:]+ (k\w+) = ([\w:]+);", source))


def camel(name: str) -> str:
    return "k" + name.title().replace("_", "")


@pytest.mark.parametrize("kernel", ALL_CONFIGS, ids=lambda kernel: kernel.name)
def test_every_config_validates_and_renders(kernel: KernelConfig):
    kernel.validate()
    source = codegen.render(kernel)

    traits = traits_of(source)
    assert list(traits) == [camel(field.name) for field in dataclasses.fields(kernel)]
    for field in dataclasses.fields(kernel):
        value = getattr(kernel, field.name)
        assert traits[camel(field.name)] == (f"fa::{value.cpp}" if isinstance(value, KernelEnum) else str(value))

    assert "#include" in source


@pytest.mark.parametrize("kernel", FORWARD_CONFIGS, ids=lambda kernel: kernel.name)
def test_a_forward_pass_is_one_kernel(kernel: ForwardConfig):
    source = codegen.render(kernel)
    assert entry_points(source) == {kernel.name: (kernel.num_threads, "ForwardParams")}
    extended = not {kernel.block_n, kernel.half_keys, kernel.head_dim_v} <= set(COMMON_MMA_N)
    assert ("CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED" in source) == extended
    assert source.index("#include") > source.find("#define")


@pytest.mark.parametrize("kernel", BACKWARD_CONFIGS, ids=lambda kernel: kernel.name)
def test_a_backward_pass_is_three_kernels(kernel: BackwardConfig):
    source = codegen.render(kernel)
    assert entry_points(source) == {
        kernel.name: (384, "BackwardParams"),
        f"{kernel.name}_preprocess": (256, "BackwardParams"),
        f"{kernel.name}_postprocess": (512 if kernel.cluster_size == 2 else 256, "BackwardParams"),
    }
    assert "CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED" not in source


def entry_points(source: str) -> dict[str, tuple[int, str]]:
    """Symbol -> (threads of a CTA, type of the parameter)."""
    pattern = (
        r'extern "C" __global__ void __launch_bounds__\((\d+), 1\)\s+(\w+)\(const __grid_constant__ fa::(\w+) params\)'
    )
    return {symbol: (int(threads), params) for threads, symbol, params in re.findall(pattern, source)}


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
        shape = "ForwardShape" if kernel in FORWARD_CONFIGS else "BackwardShape"
        expected = f"static_assert(fa::{shape}<Traits>::{camel(derived)} == {getattr(kernel, derived)},"
        assert expected in codegen.render(kernel)


def test_derived_values_of_the_backward_pass_are_tied_to_the_headers():
    for kernel in BACKWARD_CONFIGS:
        source = codegen.render(kernel)
        for twin in (
            f"fa::BackwardShape<Traits>::kClusterSize == {kernel.cluster_size},",
            f"fa::BackwardShape<Traits>::kTileKeys == {kernel.tile_keys},",
            f"fa::BackwardShape<Traits>::kDkColumns == {kernel.dk_columns},",
            f"fa::BackwardShape<Traits>::kDvColumns == {kernel.dv_columns},",
            f"fa::BackwardShape<Traits>::kNumDqParts == {kernel.num_dq_parts},",
            f"fa::BackwardShape<Traits>::kDqColumns == {kernel.dq_columns},",
            f"fa::BackwardShape<Traits>::kDqSliceColumns == {kernel.dq_slice_columns},",
            f"fa::Preprocess<Traits>::kNumThreads == {kernel.preprocess_threads},",
            f"fa::Postprocess<Traits>::kNumThreads == {kernel.postprocess_threads},",
        ):
            assert f"static_assert({twin}" in source


@pytest.mark.parametrize(("dtype", "operands"), [(Dtype.BF16, "BF16BF16"), (Dtype.FP16, "F16F16")])
def test_mma_atoms(dtype, operands):
    kernel = next(c for c in FORWARD_CONFIGS if (c.dtype, c.head_dim, c.head_dim_v) == (dtype, 192, 128))
    source = " ".join(codegen.render(kernel).split())
    gmma = "cute::SM90::GMMA::"
    assert f"using QkMma = {gmma}MMA_64x128x16_F32{operands}_SS< {gmma}Major::K, {gmma}Major::K>;" in source
    assert f"using PvMma = {gmma}MMA_64x128x16_F32{operands}_RS< {gmma}Major::K, {gmma}Major::MN>;" in source


@pytest.mark.parametrize(
    ("dims", "score", "dv", "dk", "dq"),
    [
        ((64, 64), Score.SCALED, ("64", "RS"), ("64", "RS"), ["64"]),  # dq: of half of the rows
        ((64, 64), Score.SOFTCAP, ("64", "RS"), ("64", "RS"), ["32"]),
        ((64, 128), Score.SCALED, ("128", "RS"), ("64", "RS"), ["32"]),
        ((128, 128), Score.SCALED, ("128", "RS"), ("128", "RS"), ["64"]),
        ((192, 128), Score.SCALED, ("128", "RS"), ("192", "SS"), ["64", "32"]),
        ((192, 128), Score.SOFTCAP, ("64", "SS"), ("96", "SS"), ["96"]),
        ((192, 192), Score.SCALED, ("96", "SS"), ("96", "SS"), ["96"]),
        ((256, 256), Score.SCALED, ("128", "SS"), ("128", "SS"), ["64"]),
    ],
)
def test_mma_atoms_of_the_backward_pass(dims, score, dv, dk, dq):
    kernel = next(c for c in BACKWARD_CONFIGS if (c.head_dim, c.head_dim_v, c.score) == (*dims, score))
    source = " ".join(codegen.render(kernel).split())
    atoms = re.findall(r"using (\w+) = \S+MMA_64x(\d+)x16_F32\w+?_([SR]S)< \S+::(\w+), \S+::(\w+)>;", source)
    assert atoms == [
        ("ScoresMma", str(kernel.block_m), "SS", "K", "K"),
        ("DvMma", *dv, "K", "MN"),
        ("DkMma", *dk, "K", "MN"),
        *((name, columns, "SS", "MN", "MN") for name, columns in zip(("DqMma", "DqRestMma"), dq, strict=False)),
    ]


def kernel_enums() -> list[type[KernelEnum]]:
    values = (*vars(config).values(), Accumulation, WarpgroupSplit, DqPath)
    return [value for value in values if isinstance(value, type) and issubclass(value, KernelEnum)][1:]


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
    with pytest.raises(TypeError, match="must be a ForwardConfig or a BackwardConfig, got KernelConfig"):
        codegen.render(KernelConfig())


def test_a_flag_is_no_int():
    # bool passes isinstance(int); in C++ it would silently become 1.
    with pytest.raises(TypeError, match="num_stages must be an int or a KernelEnum, got True"):
        codegen._constant("num_stages", True)
