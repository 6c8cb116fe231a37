"""The examples that train, for a few steps on the CPU, and their verdicts."""

import dataclasses
import functools
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import flash_attn_interface

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def examples_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


# -- the GPT ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def train_gpt(examples_path):
    return importlib.import_module("train_gpt")


@pytest.fixture
def small(train_gpt):
    return train_gpt.Settings(layers=2, heads=2, head_dim=16, seqlen=48, batch=2, steps=20)


def test_the_text_is_large_enough_and_plain(train_gpt):
    text, vocabulary = train_gpt.read_text()
    assert len(text) > 16000 and int(text.max()) + 1 == vocabulary < 80
    assert train_gpt.TEXT.read_bytes().isascii()


def test_batches_are_the_same_every_time(train_gpt, small):
    text, _ = train_gpt.read_text()
    drawn = [list(train_gpt.batches(text, small)) for _ in range(2)]
    assert all(map(torch.equal, *drawn)) and {batch.shape for batch in drawn[0]} == {(2, 49)}
    other = next(train_gpt.batches(text, dataclasses.replace(small, seed=1)))
    assert not torch.equal(drawn[0][0], other)


def test_the_gpt_learns_and_agrees(train_gpt, small, tmp_path):
    comparison = train_gpt.run(small, "cpu", tmp_path)
    assert comparison.agrees
    assert len(set(comparison.noise.values())) == 2, "the versions round in different ways"
    content = json.loads((tmp_path / "losses.json").read_text())
    assert content["agrees"] is True and content["commit"]
    assert 0 < content["comparison"]["distance"] <= content["allowed"]
    assert list(content["losses"]) == list(train_gpt.ATTENTIONS)
    for curve in content["losses"].values():
        assert len(curve) == small.steps and curve[-1] < curve[0] - 0.5
    pytest.importorskip("matplotlib")
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_attention_that_is_slightly_wrong_does_not_agree(train_gpt, small, tmp_path):
    """Scores five per cent too large: invisible in the loss itself."""

    def wrong(q, k, v):
        return flash_attn_interface.flash_attn_func(q, k, v, causal=True, softmax_scale=1.05 * q.shape[-1] ** -0.5)

    comparison = train_gpt.run(small, "cpu", tmp_path, {**train_gpt.ATTENTIONS, train_gpt.OURS: wrong})
    assert not comparison.agrees
    curves = json.loads((tmp_path / "losses.json").read_text())["losses"]
    assert abs(curves[train_gpt.OURS][-1] - curves[train_gpt.EXACT][-1]) < 0.01


def curves(train_gpt, start: float, end: float) -> dict[str, list[float]]:
    """A hundred steps whose losses are 1.9 and 2.1 in turns, this package's with these errors in its two halves."""
    exact = [1.9, 2.1] * 50
    errors = {"SDPA, flash": [1e-3] * 100, "SDPA, bfloat16": [-5e-4] * 100, train_gpt.EXACT: [0.0] * 100}
    errors[train_gpt.OURS] = [start] * 50 + [end] * 50
    return {name: [x + error for x, error in zip(exact, each, strict=True)] for name, each in errors.items()}


#: The standard error of the last fifty steps.
END_ERROR = 0.1 * math.sqrt(50 / 49) / math.sqrt(50)


@pytest.mark.parametrize(
    ("start", "end", "agrees"),
    [
        (0.0, 0.0, True),
        (1.9e-3, 0.0, True),
        (-2.1e-3, 0.0, False),
        (0.0, 0.99 * END_ERROR, True),
        (0.0, -1.01 * END_ERROR, False),
        (math.nan, 0.0, False),
        (0.0, math.nan, False),
        (math.inf, 0.0, False),
    ],
)
def test_what_agrees(train_gpt, start, end, agrees):
    comparison = train_gpt.Comparison.of(curves(train_gpt, start, end))
    assert comparison.agrees is agrees
    assert comparison.noise == pytest.approx({"SDPA, flash": 1e-3, "SDPA, bfloat16": 5e-4})
    assert comparison.end_error == pytest.approx(END_ERROR)


@pytest.mark.parametrize(("distance", "status"), [(1e-3, 0), (3e-3, 1)])
def test_the_exit_status(train_gpt, monkeypatch, capsys, distance, status):
    comparison = train_gpt.Comparison(distance, {"SDPA, flash": 1e-3}, end_difference=0.0, end_error=0.01)
    asked = []
    monkeypatch.setattr(train_gpt, "run", lambda *arguments: asked.append(arguments) or comparison)
    assert train_gpt.main(["--steps", "7", "--seed", "3", "--out", "somewhere"]) == status
    ((settings, _, out),) = asked
    assert (settings.steps, settings.seed, out) == (7, 3, Path("somewhere"))
    assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_no_picture_without_matplotlib(train_gpt, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    settings = train_gpt.Settings(layers=1, heads=1, head_dim=8, seqlen=16, batch=1, steps=2)
    train_gpt.run(settings, "cpu", tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["losses.json"]


# -- the Llama -------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama(examples_path):
    pytest.importorskip("transformers")
    return importlib.import_module("huggingface_llama_training")


@pytest.fixture
def attention_on_the_cpu(monkeypatch):
    """Transformers asks for a CUDA device and an installed distribution; the function itself needs neither."""
    flash = pytest.importorskip("transformers.modeling_flash_attention_utils")
    monkeypatch.setattr(flash, "is_flash_attn_3_available", lambda *args, **kwargs: True)
    matrix = flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX[3]
    for check in ("general_availability_check", "pkg_availability_check"):
        monkeypatch.setitem(matrix, check, lambda *args, **kwargs: True)
    monkeypatch.setitem(matrix, "supported_devices", ((lambda: True, "cpu"),))
    monkeypatch.setattr(flash, "_loaded_implementation", None)  # the function is looked up once


def test_the_llama_follows_eager_attention(llama, attention_on_the_cpu, capsys):
    assert llama.compare(3, "cpu") == 0
    assert "flash attention follows eager attention" in capsys.readouterr().out


def test_a_llama_with_wrong_attention_does_not(llama, attention_on_the_cpu, monkeypatch, capsys):
    right = flash_attn_interface.flash_attn_varlen_func

    @functools.wraps(right)  # transformers passes only what the signature has
    def wrong(*args, softmax_scale, **kwargs):
        return right(*args, softmax_scale=1.1 * softmax_scale, **kwargs)

    monkeypatch.setattr(flash_attn_interface, "flash_attn_varlen_func", wrong)
    assert llama.compare(3, "cpu") == 1
    assert "FAILED" in capsys.readouterr().out


def test_padding_is_not_predicted(llama):
    (batch,) = llama.batches(1, "cpu")
    is_token = batch["attention_mask"].bool()
    assert is_token.sum(1).tolist() == list(llama.LENGTHS)
    assert torch.equal(batch["labels"][is_token], batch["input_ids"][is_token])
    assert (batch["labels"][~is_token] == llama.IGNORED).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="would train")
def test_the_llama_needs_a_gpu(llama, capsys):
    assert llama.main([]) == 2
    assert "A GPU is needed" in capsys.readouterr().out
