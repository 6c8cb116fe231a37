"""A Hugging Face Llama whose attention is this package, held against eager attention.

    pip install . transformers && python examples/huggingface_llama.py

Transformers finds the package as it finds FlashAttention-3: an installed distribution `flash_attn_3` with the module
`flash_attn_interface` (so PYTHONPATH alone is not enough), and a CUDA device. The model has random weights; nothing
is downloaded. Its logits in bfloat16, once with `attn_implementation="flash_attention_3"` and once with "eager", are
compared to eager attention in float32 with the same weights. The example passes if the error of flash attention is at
most twice the error of eager attention: both are bfloat16 noise, and neither is the truth.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

#: Error of flash attention that passes, in units of the error of eager attention in the same dtype.
ALLOWED_RATIO = 2.0

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    # Large enough that attention weights are far from uniform: the scores' standard deviation is about 2.
    initializer_range=0.06,
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Tokens (b, s) and which of them are no padding (b, s)."""

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @staticmethod
    def make(name: str, lengths: list[int], padding_side: str, device: str) -> Batch:
        longest = max(lengths)
        columns = torch.arange(longest, device=device)
        rows = torch.tensor(lengths, device=device)[:, None]
        is_token = columns >= longest - rows if padding_side == "left" else columns < rows
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(CONFIG.vocab_size, is_token.shape, generator=generator, device=device)
        return Batch(name, ids.masked_fill(~is_token, 0), is_token.long())


@functools.cache
def random_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.bfloat16).state_dict()


def build_model(attention: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The same weights every time, those of a bfloat16 model."""
    # A model writes its attention into the configuration that it is given, so each gets its own.
    config = copy.deepcopy(CONFIG)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    model.load_state_dict(random_weights())
    return model.to(device).eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of all tokens, and of each last token again as a decoding step from the cache: (tokens, vocabulary)."""
    is_token = batch.attention_mask.bool()
    whole = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[is_token]
    prompt = model(input_ids=batch.input_ids[:, :-1], attention_mask=batch.attention_mask[:, :-1], use_cache=True)
    step = model(
        input_ids=batch.input_ids[:, -1:],
        attention_mask=batch.attention_mask,
        past_key_values=prompt.past_key_values,
    ).logits[:, -1]
    return torch.cat([whole, step[is_token[:, -1]]]).float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not torch.cuda.is_available():
        print('A GPU is needed: transformers allows attn_implementation="flash_attention_3" on CUDA devices only.')
        return 2
    device = "cuda"
    batches = [
        Batch.make("equal lengths", [300, 300, 300], "right", device),
        Batch.make("right padding", [300, 17, 129, 1], "right", device),
        Batch.make("left padding", [300, 17, 129, 1], "left", device),
    ]
    exact = build_model("eager", torch.float32, device)
    eager = build_model("eager", torch.bfloat16, device)
    flash = build_model("flash_attention_3", torch.bfloat16, device)

    print("largest error of the logits against float32")
    print(f"{'batch':<16}{'logits':>9}{'eager error':>13}{'flash error':>13}{'ratio':>8}")
    passed = True
    for batch in batches:
        truth = logits_of(exact, batch)
        eager_error = float((logits_of(eager, batch) - truth).abs().max())
        flash_error = float((logits_of(flash, batch) - truth).abs().max())
        ratio = flash_error / eager_error
        ok = ratio <= ALLOWED_RATIO  # false for NaN, too
        passed &= ok
        magnitude = float(truth.abs().max())
        print(
            f"{batch.name:<16}{magnitude:>9.2f}{eager_error:>13.4f}{flash_error:>13.4f}{ratio:>8.2f}"
            f"   {'ok' if ok else 'FAILED'}"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
