"""Kernel sets, and the command line that shows, writes and compiles them."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_3 import codegen, compiler, generate, heuristics, presets, tile_table
from flash_attn_3.backward_config import Accumulation
from flash_attn_3.backward_plan import BackwardProblem, plan_backward
from flash_attn_3.config import Dtype, Mask, Schedule, Score, SeqLayout
from flash_attn_3.heuristics import forward_config
from flash_attn_3.problem import ForwardProblem, normalize_mask

SCRIPT = Path(__file__).resolve().parents[2] / "hopper" / "generate_kernels.py"
CORE = presets.core_configs()
ALL = presets.all_configs()

lengths = st.one_of(st.integers(0, 300), st.integers(0, 1 << 20))
head_dims = st.integers(1, 32).map(lambda eighths: 8 * eighths)
masks = st.builds(
    normalize_mask,
    st.booleans(),
    st.tuples(st.integers(-1, 500), st.integers(-1, 500)),
    st.sampled_from((0, 128)),
    lengths,
    lengths,
)
problems = st.builds(
    ForwardProblem,
    dtype=st.sampled_from(Dtype),
    batch=st.integers(0, 1000),
    max_seqlen_q=lengths,
    max_seqlen_k=lengths,
    heads_q=st.just(48),
    heads_kv=st.sampled_from((1, 2, 3, 6, 8, 16, 48)),
    head_dim=head_dims,
    head_dim_v=st.one_of(head_dims, st.integers(1, 64).map(lambda eighths: 8 * eighths)),
    mask=masks,
    score=st.sampled_from(Score),
    seq_layout=st.sampled_from(SeqLayout),
    num_sms=st.sampled_from((1, 78, 132)),
)


# -- sets ------------------------------------------------------------------------------------------------------------


def test_core_is_the_common_set():
    axes = {(c.FAMILY, c.head_dim, c.head_dim_v, c.dtype, c.mask, c.seq_layout, c.score) for c in CORE}
    assert axes == {
        (family, d, d, dtype, mask, layout, Score.SCALED)
        for family in ("fwd", "bwd")
        for d in (64, 128)
        for dtype in Dtype
        for mask in (Mask.FULL, Mask.CAUSAL)
        for layout in SeqLayout
    }
    assert len(CORE) == len(set(CORE))
    assert set(CORE) <= set(ALL)


def test_a_preset_has_the_kernels_of_every_length(monkeypatch):
    """One more class of lengths in the table is one more kernel of each kind in the sets, beside those of few rows."""
    table = tile_table.forward_tiles()
    key = tile_table.TileKey(128, 128, Mask.CAUSAL, Score.SCALED)
    longest = table.choices[key][-1]
    short = tile_table.TileChoice(1, tile_table.ForwardTile(64, 16, schedule=Schedule.INTRA_WARPGROUP), 1)
    split = tile_table.TileTable((), {**table.choices, key: (short, longest)})
    monkeypatch.setattr(heuristics, "forward_tiles", lambda: split)
    configs = [c for c in presets.core_configs() if (c.FAMILY, c.head_dim, c.mask) == ("fwd", 128, Mask.CAUSAL)]
    block_m, block_n = longest.tile.block_m, longest.tile.block_n
    assert {(c.block_m, c.block_n) for c in configs} == {(64, 16), (64, block_n), (block_m, block_n)}
    assert len(configs) == 3 * len(Dtype) * len(SeqLayout)


def test_all_covers_every_axis():
    axes = {(c.dtype, c.mask, c.seq_layout, c.score) for c in ALL}
    assert len(axes) == len(Dtype) * len(Mask) * len(SeqLayout) * len(Score)
    assert {(c.head_dim, c.head_dim_v) for c in ALL} >= {
        (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 256)
    }  # fmt: skip


@given(problems)
def test_the_planner_chooses_from_all(problem):
    try:
        config = forward_config(problem)
    except ValueError as error:
        assert "head_dim" in str(error)
        return
    assert config in presets._all_configs()


@given(problems, st.sampled_from(Accumulation))
def test_the_planner_of_the_backward_pass_chooses_from_all(problem, accumulation):
    """Value head dims other than the head dim exist beside head dims up to 64 only."""
    reachable = problem.head_dim_v == problem.head_dim or problem.head_dim <= 64
    if reachable and max(problem.head_dim, problem.head_dim_v) <= 128:
        assert plan_backward(BackwardProblem(problem, accumulation)).config in presets._all_configs()


def test_presets_by_name():
    assert presets.load("none") == []
    assert presets.load("core") == CORE
    assert presets.load("all") == ALL


def test_kernels_from_a_file(tmp_path):
    file = tmp_path / "kernels.txt"
    file.write_text(f"# mine\n\n{ALL[5].name}\n  {ALL[3].name}  # twice\n{ALL[5].name}\n")
    assert presets.load(str(file)) == [ALL[5], ALL[3]]


def test_unknown_set():
    with pytest.raises(ValueError, match="kernel set 'most' is not supported; it must be none, core, all, or a"):
        presets.load("most")


def test_unknown_kernel_name_suggests_the_closest():
    wrong = CORE[0].name.replace("d64", "d65")
    with pytest.raises(ValueError, match=f"no kernel named '{wrong}'; did you mean .*{CORE[0].name}"):
        presets.resolve([wrong])


# -- command line ----------------------------------------------------------------------------------------------------


def test_list(capsys):
    assert generate.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == [config.name for config in CORE]
    assert generate.main(["--list", "--preset", "all"]) == 0
    assert capsys.readouterr().out.split() == [config.name for config in ALL]


def test_emit(capsys):
    assert generate.main(["--emit", ALL[-1].name]) == 0
    assert capsys.readouterr().out == codegen.render(ALL[-1])


def test_out(tmp_path, capsys):
    assert generate.main(["--out", str(tmp_path / "sources")]) == 0
    written = {path.name: path.read_text() for path in (tmp_path / "sources").iterdir()}
    assert written == {f"{config.name}.cu": codegen.render(config) for config in CORE}


def test_out_of_chosen_kernels(tmp_path):
    assert generate.main(["--out", str(tmp_path), "--kernel", ALL[2].name, "--kernel", ALL[9].name]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {ALL[2].name, ALL[9].name}


def test_build_into_a_folder(workbench, tmp_path, capsys):
    assert generate.main(["--build", str(tmp_path / "out"), "--kernel", ALL[0].name]) == 0
    (entry,) = (tmp_path / "out").iterdir()
    assert entry.name.startswith(ALL[0].name) and (entry / "kernel.cubin").is_file()
    assert ALL[0].name in capsys.readouterr().err
    assert not workbench.cache.exists()


def test_build_into_the_users_cache(workbench):
    assert generate.main(["--kernel", ALL[0].name, "--build"]) == 0
    assert compiler.get_kernel(ALL[0]).folder.parent == workbench.cache
    assert workbench.num_compilations() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--emit", "fwd_nothing"], "error: there is no kernel named 'fwd_nothing'"),
        (["--list", "--preset", "most"], "error: kernel set 'most' is not supported"),
        (["--build", "--jobs", "0"], "error: jobs=0 is not supported; it must be a positive integer"),
    ],
)
def test_errors_are_one_line_and_a_status(workbench, capsys, arguments, message):
    assert generate.main(arguments) == 1
    assert capsys.readouterr().err.startswith(message)


def test_compile_errors_reach_the_command_line(workbench, capsys):
    workbench.write_compiler("echo no such atom >&2; exit 2")
    assert generate.main(["--kernel", ALL[0].name, "--build"]) == 1
    assert "no such atom" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--list", "--kernel", "a", "--preset", "core"]])
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        generate.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the script is part of the source tree only")
def test_script_runs_without_torch(tmp_path):
    # The build uses these modules where torch is not installed.
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--list"], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.split()) == (0, [config.name for config in CORE]), run.stderr
