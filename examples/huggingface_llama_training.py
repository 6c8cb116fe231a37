"""A Hugging Face Llama trained with this package's attention, held against eager attention.

    pip install . transformers && python examples/huggingface_llama_training.py --train-steps 50

The model of `huggingface_llama.py` learns Shakespeare's sonnets from padded batches, three times from the same random
weights: with `attn_implementation="flash_attention_3"` and with "eager", both under bfloat16 autocast, and with "eager"
in float32. What bfloat16 changes in eager attention's loss is noise. The example passes if flash attention follows
eager attention within it: over all steps, the two are no farther apart than eager attention in bfloat16 and float32.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_llama import build_model

TEXT = Path(__file__).resolve().parent / "data" / "sonnets.txt"
#: Lengths of a batch's sequences, the shorter ones padded at the right.
LENGTHS = (128, 128, 75, 20)
LEARNING_RATE = 1e-3
#: Label of a token that is not to be predicted.
IGNORED = -100
#: Run -> attention, and the dtype of autocast.
RUNS = {
    "float32": ("eager", None),
    "eager": ("eager", torch.bfloat16),
    "flash": ("flash_attention_3", torch.bfloat16),
}


def batches(steps: int, device: str) -> Iterator[dict[str, torch.Tensor]]:
    """Pieces of the text from random places, as the model's arguments: (sequences, longest)."""
    text = torch.tensor(list(TEXT.read_bytes()))
    columns, lengths = torch.arange(max(LENGTHS)), torch.tensor(LENGTHS)[:, None]
    is_token = columns < lengths
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        begins = torch.randint(len(text) - max(LENGTHS), lengths.shape, generator=generator)
        tokens = text[begins + columns].masked_fill(~is_token, 0)
        arguments = {"input_ids": tokens, "attention_mask": is_token.long()}
        arguments["labels"] = tokens.masked_fill(~is_token, IGNORED)
        yield {name: x.to(device) for name, x in arguments.items()}


def train(attention: str, autocast: torch.dtype | None, steps: int, device: str) -> torch.Tensor:
    """The loss of each step, in nats per token: (steps,)."""
    model = build_model(attention, torch.float32, device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for batch in batches(steps, device):
        with torch.autocast(device, autocast) if autocast else contextlib.nullcontext():
            loss = model(**batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses).cpu()


def distance(losses: torch.Tensor, others: torch.Tensor) -> float:
    """Root mean square over all steps."""
    return float((losses - others).square().mean().sqrt())


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 if flash attention does not follow eager attention, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=50, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print('A GPU is needed: transformers allows attn_implementation="flash_attention_3" on CUDA devices only.')
        return 2
    return compare(options.train_steps, "cuda")


def compare(steps: int, device: str) -> int:
    """Train all runs; returns the exit status."""
    losses = {name: train(*settings, steps, device) for name, settings in RUNS.items()}
    print("loss at each step, nats per token")
    print("step" + "".join(f"{name:>10}" for name in losses))
    for step in sorted({*range(0, steps, 10), steps - 1}):
        print(f"{step:>4}" + "".join(f"{curve[step]:>10.4f}" for curve in losses.values()))
    noise = distance(losses["eager"], losses["float32"])
    difference = distance(losses["flash"], losses["eager"])
    ok = difference <= noise  # false for NaN, too
    print(f"distance, nats: eager from float32 {noise:.1e}, flash from eager {difference:.1e}")
    print("flash attention follows eager attention" if ok else "FAILED: flash attention is farther away than noise")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
