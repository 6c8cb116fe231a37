"""`python -m flash_attn_3.demo`: attention on this machine, checked against float64 and timed against PyTorch.

On a Hopper GPU the package's kernels run; a progress line shows those that have to be compiled first. Elsewhere the
same calls run on the CPU, on small shapes. The exit status is 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from . import compiler
from .config import Dtype, ForwardConfig, Score, SeqLayout
from .errors import CacheError, KernelCompileError, KernelNotBuiltError
from .flash_attn_interface import flash_attn_func
from .heuristics import plan_forward
from .jobs import job_count
from .problem import HOPPER_SMS, ForwardProblem, normalize_mask

#: A result passes if its error is at most this multiple of PyTorch's own, which is mostly the rounding to bfloat16.
ALLOWED_RATIO = 2.0
#: Larger than the L2 cache of a Hopper GPU (50 MB).
FLUSH_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """q is (batch, seqlen, heads_q, head_dim), k and v have heads_kv heads; bfloat16."""

    batch: int
    seqlen: int
    heads_q: int
    heads_kv: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> float:
        products = 4.0 * self.batch * self.heads_q * self.seqlen**2 * self.head_dim
        return products / 2 if self.causal else products

    def kernel(self, num_sms: int) -> ForwardConfig:
        """The kernel that the planner chooses for this shape."""
        problem = ForwardProblem(
            dtype=Dtype.BF16,
            batch=self.batch,
            max_seqlen_q=self.seqlen,
            max_seqlen_k=self.seqlen,
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim,
            mask=normalize_mask(self.causal, (-1, -1), 0, self.seqlen, self.seqlen),
            score=Score.SCALED,
            seq_layout=SeqLayout.DENSE,
            num_sms=num_sms,
        )
        return plan_forward(problem).config

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return f"{self.batch} x {self.seqlen}, {self.heads_q}/{self.heads_kv} heads, d {self.head_dim}, {mask}"


GPU_SHAPES = [
    Shape(2, 8192, 32, 32, 64, causal=True),
    Shape(2, 8192, 16, 16, 128, causal=False),
    Shape(2, 8192, 16, 16, 128, causal=True),
    Shape(4, 4096, 32, 8, 128, causal=True),
    Shape(2, 8192, 8, 8, 256, causal=True),
]
CPU_SHAPES = [
    Shape(1, 256, 4, 4, 64, causal=True),
    Shape(2, 300, 4, 2, 128, causal=False),
    Shape(2, 300, 4, 2, 128, causal=True),
    Shape(1, 200, 2, 1, 256, causal=True),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    _parse(arguments)
    on_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    if on_gpu:
        print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
        _prepare_kernels([shape.kernel(num_sms=HOPPER_SMS) for shape in GPU_SHAPES])
    else:
        print(f"{_why_cpu()}: the same calls run on the CPU, through a slow model of the kernels.")
        _show_one_compilation(CPU_SHAPES[-2].kernel(num_sms=HOPPER_SMS))
    passed = _show_table(GPU_SHAPES if on_gpu else CPU_SHAPES, "cuda" if on_gpu else "cpu")
    print("All results are right." if passed else "FAILED: a result is wrong.")
    return 0 if passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn_3.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return parser.parse_args(arguments)


def _why_cpu() -> str:
    if not torch.cuda.is_available():
        return "No GPU here"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} is no Hopper GPU (compute capability {major}.{minor}, not 9.0)"


# -- kernels ---------------------------------------------------------------------------------------------


def _prepare_kernels(configs: list[ForwardConfig]) -> None:
    """Find or compile the kernels, side by side, with a progress line."""
    configs = list(dict.fromkeys(configs))
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(job_count()) as pool:
        pending = [pool.submit(compiler.get_kernel, config) for config in configs]
        for done, future in enumerate(concurrent.futures.as_completed(pending), start=1):
            kernel = future.result()
            print(f"kernel {done}/{len(configs)} ready after {time.perf_counter() - start:5.1f} s: {kernel.symbol}")


def _show_one_compilation(config: ForwardConfig) -> None:
    """Compile a kernel that nobody can launch here, to show what that takes."""
    print(f"Compiling {config.name} ... ", end="", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            meta = compiler.compile_one(config, folder, announce=False).meta
    except (KernelNotBuiltError, CacheError) as error:
        print(f"skipped: {error}")
    except KernelCompileError as error:
        print(f"failed: {error}")
        raise
    else:
        seconds, memory = meta["compile_seconds"], meta["compile_peak_bytes"] / 1e9
        print(f"{seconds:.1f} s, {memory:.2f} GB, {meta['registers']} registers, {_spills(meta)}")


def _spills(meta: dict[str, object]) -> str:
    spilled = (meta["spill_store_bytes"] or 0) + (meta["spill_load_bytes"] or 0)
    return f"{spilled} bytes spilled" if spilled else "no spills"


# -- the table -------------------------------------------------------------------------------------------


def _show_table(shapes: list[Shape], device: str) -> bool:
    """Print one row per shape; whether all results are right."""
    print()
    print(f"{'shape (batch x seqlen)':<40}{'error':>10}{'time':>12}{'TFLOP/s':>10}{'PyTorch error':>15}{'time':>12}")
    passed = True
    for shape in shapes:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(shape.batch, shape.seqlen, heads, shape.head_dim, device=device, dtype=torch.bfloat16)
            for heads in (shape.heads_q, shape.heads_kv, shape.heads_kv)
        )
        ours = functools.partial(flash_attn_func, q, k, v, causal=shape.causal)
        torchs = functools.partial(_torch_attention, q, k, v, shape)
        error, torch_error = _errors(ours(), torchs(), q, k, v, shape)
        right = error <= ALLOWED_RATIO * torch_error  # false for NaN, too
        passed &= right
        ms, torch_ms = _median_ms(ours, device), _median_ms(torchs, device)
        print(
            f"{shape!s:<40}{error:>10.1e}{ms:>9.3f} ms{shape.flops / ms / 1e9:>10.3g}{torch_error:>15.1e}"
            f"{torch_ms:>9.3f} ms{'' if right else '   WRONG'}",
            flush=True,
        )
    print("error: largest difference to float64")
    return passed


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=shape.causal, enable_gqa=shape.heads_q != shape.heads_kv
    )
    return out.transpose(1, 2)


def _errors(
    ours: torch.Tensor, torchs: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape
) -> tuple[float, float]:
    """Largest difference of both results to attention in float64, computed head by head."""
    error = torch_error = torch.zeros((), dtype=torch.float64, device=q.device)
    hidden = torch.ones(shape.seqlen, shape.seqlen, dtype=torch.bool, device=q.device).triu(1)
    for sequence in range(shape.batch):
        for head in range(shape.heads_q):
            kv_head = head // (shape.heads_q // shape.heads_kv)
            scores = q[sequence, :, head].double() @ k[sequence, :, kv_head].double().T * shape.head_dim**-0.5
            if shape.causal:
                scores.masked_fill_(hidden, float("-inf"))
            exact = torch.softmax(scores, -1) @ v[sequence, :, kv_head].double()
            # torch.maximum passes NaN on, so a NaN in a result cannot be lost here.
            error = torch.maximum(error, (ours[sequence, :, head] - exact).abs().max())
            torch_error = torch.maximum(torch_error, (torchs[sequence, :, head] - exact).abs().max())
    return float(error), float(torch_error)


def _median_ms(function: Callable[[], object], device: str, repeats: int = 20) -> float:
    """Milliseconds of a call, from a cold L2 cache on a GPU."""
    if device == "cpu":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for _ in range(3):
        function()
    for begin, end in events:
        flush.zero_()
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


if __name__ == "__main__":
    sys.exit(main())
