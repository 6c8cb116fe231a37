"""A small GPT that learns Shakespeare's sonnets, its attention once this package's and otherwise PyTorch's.

    pip install . && python examples/train_gpt.py --out train_gpt

It runs on a Hopper GPU if there is one, otherwise on the CPU. Model, initial weights and batches are the same in all
runs; queries, keys and values are bfloat16, all else is float32. So loss curves differ by what attention rounds, and by
what training makes of that. PyTorch's attention in float32 is the truth. This package's curve agrees if

- over the first 50 steps it is at most twice as far from the truth as PyTorch's bfloat16 attention is, and
- the mean of the last 50 steps differs from the truth's by at most that mean's standard error. (Training amplifies
  differences, by chance more in one run than in another, so later steps tell no more than that.)

Otherwise the exit status is 1.

Writes train_gpt/losses.json and, where matplotlib is installed, train_gpt/losses.png.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn_3 import environment
from flash_attn_interface import flash_attn_func

ROOT = Path(__file__).resolve().parent
TEXT = ROOT / "data" / "sonnets.txt"
OURS, EXACT = "flash_attn_3", "SDPA, float32"
#: Distance from the exact curve that passes, in units of that of PyTorch's attention in bfloat16.
ALLOWED_RATIO = 2.0
#: How many steps are the first and the last ones.
JUDGED_STEPS = 50

#: q, k, v -> out, all (batch, seqlen, heads, head_dim) in bfloat16.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The model and its training."""

    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    seqlen: int = 128
    batch: int = 4
    steps: int = 300
    learning_rate: float = 2e-3
    seed: int = 0

    @property
    def features(self) -> int:
        return self.heads * self.head_dim


# -- attention -------------------------------------------------------------------------------------------


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attn_func(q, k, v, causal=True)


@contextlib.contextmanager
def computing_in_bfloat16() -> Iterator[None]:
    """Otherwise SDPBackend.MATH computes bfloat16 tensors in float32."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def sdpa(backend: SDPBackend, dtype: torch.dtype) -> Attention:
    """PyTorch's attention, computed in this dtype."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
        with sdpa_kernel(backend), computing_in_bfloat16():
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True)
        return out.transpose(1, 2).to(q.dtype)

    return attend


ATTENTIONS: dict[str, Attention] = {
    OURS: flash,
    "SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION, torch.bfloat16),
    "SDPA, bfloat16": sdpa(SDPBackend.MATH, torch.bfloat16),
    EXACT: sdpa(SDPBackend.MATH, torch.float32),
}


# -- the model -------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and beside the identity."""

    def __init__(self, settings: Settings, attention: Attention):
        super().__init__()
        features = settings.features
        self.settings, self.attention = settings, attention
        self.norm1, self.norm2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.project = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.mlp = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (b, s, features)
        heads = (3, self.settings.heads, self.settings.head_dim)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, heads).bfloat16().unbind(2)  # (b, s, h, d) each
        x = x + self.project(self.attention(q, k, v).flatten(2).float())
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (b, s) -> logits of the next ones (b, s, vocabulary)."""

    def __init__(self, settings: Settings, vocabulary: int, attention: Attention):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, settings.features)
        self.positions = nn.Parameter(torch.randn(settings.seqlen, settings.features))
        self.blocks = nn.Sequential(*(Block(settings, attention) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(settings.features)
        self.head = nn.Linear(settings.features, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions)))


# -- training --------------------------------------------------------------------------------------------


def read_text() -> tuple[torch.Tensor, int]:
    """The text as numbers of its characters, and how many different ones there are."""
    text = TEXT.read_text()
    characters = sorted(set(text))
    return torch.tensor([characters.index(character) for character in text]), len(characters)


def batches(text: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Pieces of the text from random places: (batch, seqlen + 1) in each step."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.steps):
        begins = torch.randint(len(text) - settings.seqlen, (settings.batch, 1), generator=generator)
        yield text[begins + torch.arange(settings.seqlen + 1)]


def train(attention: Attention, settings: Settings, device: str) -> list[float]:
    """The loss of each step, in nats per character."""
    text, vocabulary = read_text()
    torch.manual_seed(settings.seed)
    model = GPT(settings, vocabulary, attention).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    losses = []
    for batch in batches(text, settings):
        batch = batch.to(device)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


# -- comparison ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How loss curves differ from the exact one, in nats.

    Attributes:
        distance: of this package's curve, root mean square over the first steps.
        noise: the same of PyTorch's attention in bfloat16, for each version.
        end_difference: of the mean over the last steps, this package's from the exact one.
        end_error: standard error of the exact one.
    """

    distance: float
    noise: dict[str, float]
    end_difference: float
    end_error: float

    @staticmethod
    def of(curves: Mapping[str, list[float]]) -> Comparison:
        tensors = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}
        exact = tensors.pop(EXACT)
        differences = {name: curve - exact for name, curve in tensors.items()}
        end = differences[OURS][-JUDGED_STEPS:].mean().item()
        noise = {name: x[:JUDGED_STEPS].square().mean().sqrt().item() for name, x in differences.items()}
        last = exact[-JUDGED_STEPS:]
        return Comparison(noise.pop(OURS), noise, end, last.std().item() / len(last) ** 0.5)

    @property
    def allowed(self) -> float:
        return ALLOWED_RATIO * max(self.noise.values())

    @property
    def agrees(self) -> bool:
        return self.distance <= self.allowed and abs(self.end_difference) <= self.end_error  # false for NaN, too


def plot(curves: Mapping[str, list[float]], path: Path) -> None:
    """The curves, and below them their differences from the exact one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    exact = torch.tensor(curves[EXACT])
    figure, (losses, differences) = pyplot.subplots(2, sharex=True, figsize=(7, 6), height_ratios=(2, 1))
    for name, curve in curves.items():
        width = 2.5 if name == OURS else 1.0
        losses.plot(curve, linewidth=width, label=name)
        differences.plot((torch.tensor(curve) - exact).tolist(), linewidth=width)
    losses.set_ylabel("loss, nats per character")
    losses.legend()
    differences.set_ylabel("difference from float32")
    differences.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# -- command line ----------------------------------------------------------------------------------------


def run(settings: Settings, device: str, out: Path, attentions: Mapping[str, Attention] = ATTENTIONS) -> Comparison:
    """Train with every attention; writes curves and picture."""
    curves = {}
    for name, attention in attentions.items():
        start = time.perf_counter()
        curves[name] = train(attention, settings, device)
        print(f"{name:<16}loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f} in {time.perf_counter() - start:.0f} s")
    comparison = Comparison.of(curves)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "date": environment.date(),
        "commit": environment.commit(ROOT.parent),
        "device": environment.device(),
        "versions": environment.versions(),
        "settings": dataclasses.asdict(settings),
        "losses": curves,
        "comparison": dataclasses.asdict(comparison),
        "allowed": comparison.allowed,
        "agrees": comparison.agrees,
    }
    (out / "losses.json").write_text(json.dumps(content, indent=1) + "\n")
    try:
        plot(curves, out / "losses.png")
    except ImportError:
        print("no picture: matplotlib is not installed")
    return comparison


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if the curves do not agree."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("train_gpt"), metavar="FOLDER", help="default: train_gpt")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)  # tensors are so small that threads would mostly wait for each other
    settings = dataclasses.replace(defaults, steps=options.steps, seed=options.seed)
    comparison = run(settings, options.device, options.out)
    noise = ", ".join(f"{name} {value:.1e}" for name, value in comparison.noise.items())
    print(
        f"nats from {EXACT}, first steps: {noise}; {OURS} {comparison.distance:.1e}, at most {comparison.allowed:.1e}"
    )
    print(f"last steps: {OURS} {comparison.end_difference:+.1e}, at most {comparison.end_error:.1e}")
    print("the curves agree within noise" if comparison.agrees else "FAILED: the curves differ by more than noise")
    return 0 if comparison.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
