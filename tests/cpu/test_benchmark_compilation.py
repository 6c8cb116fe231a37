"""What compiling the kernels may cost, and how it is reported."""

import pytest
from benchmarks import bars, compilation, report


def row(name: str, seconds: float = 3.0, peak: int = 320_000_000, stores: int | None = 0, loads: int = 0) -> dict:
    return {
        "name": name,
        "compile_seconds": 2 * seconds,
        "compile_cpu_seconds": seconds,
        "compile_peak_bytes": peak,
        "registers": 168,
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "cubin_bytes": 250_000,
    }


def failed(*rows: dict) -> list[str]:
    return [verdict.text for verdict in bars.judge("compile", rows) if not verdict.holds]


def test_budgets():
    assert failed(row("bwd_a", 10.0, 1_200_000_000), row("bwd_b")) == []
    assert failed(row("bwd_a", 10.1), row("bwd_b")) == [
        "bwd_a, the slowest to compile, s of CPU time: 10.100, at most 10.0"
    ]
    assert failed(row("bwd_a"), row("bwd_b", peak=1_300_000_000)) == [
        "bwd_b, the largest to compile, GB: 1.300, at most 1.2"
    ]


@pytest.mark.parametrize(("stores", "loads"), [(8, 0), (0, 8), (None, 0)])
def test_spills(stores, loads):
    (text,) = failed(row("bwd_a"), row("bwd_b", stores=stores, loads=loads))
    assert text == "2 backward kernels without spills: but for bwd_b"


def test_of_forward_kernels_only_spills_are_judged_here():
    assert failed(row("fwd_a", 99.0)) == []
    assert failed(row("fwd_a"), row("fwd_b", loads=4), row("bwd_a")) == [
        "2 forward kernels without spills: but for fwd_b"
    ]


def test_a_family_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(compilation.compiler, "build_many", lambda configs, *a, **k: asked.extend(configs) or [])
    compilation.measure("core", [], 1, ["bwd"])
    assert asked == [config for config in compilation.presets.core_configs() if config.name.startswith("bwd_")]
    assert asked and not compilation.measure("core", [], 1)["bars"]
    assert {config.FAMILY for config in asked} == set(compilation.FAMILIES)


def test_the_report_tells_the_passes_apart():
    rows = [row("fwd_a", 1.0), row("bwd_a"), row("bwd_b", stores=8)]
    verdicts = [{"bar": v.bar, "holds": v.holds, "text": v.text} for v in bars.judge("compile", rows)]
    result = {"rows": rows, "wall_seconds": 9.0, "settings": {"jobs": 2}, "bars": verdicts}
    text = report._compile_table(result)
    assert text.startswith(
        "3 kernels in 9 s, 2 at a time; of the 1 forward kernels the slowest takes 2.0 s, the largest 0.32 GB; "
        "of the 2 backward kernels the slowest takes 6.0 s, the largest 0.32 GB."
    )
    assert "without spills: but for bwd_b: **no**" in text


def test_the_report_lists_few_kernels_and_not_many():
    result = {"wall_seconds": 9.0, "settings": {"jobs": 2}, "bars": []}
    for count, is_listed in ((report.MOST_LISTED_KERNELS, True), (report.MOST_LISTED_KERNELS + 1, False)):
        text = report._compile_table(result | {"rows": [row("fwd_a")] * count})
        assert ("| fwd_a |" in text) == is_listed
