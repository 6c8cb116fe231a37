"""A few small gradients for compute-sanitizer, with everything but our kernels on the CPU.

    for tool in memcheck synccheck racecheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 --report-api-errors no \\
            --kernel-name kns=bwd_ python -m tests.gpu.sanitizer_gradients || exit 1
    done
"""

from __future__ import annotations

from flash_attn_3.backward_config import BACKWARD_HEAD_DIM_TILES

from .cases import KERNEL_MASKS, GradientCase
from .gradients import Gradients, check_gradients, differentiate, make_incoming
from .harness import make_tensors
from .sanitizer_subset import on_device, run_all

LENS_Q, LENS_K = (70, 0, 1, 200), (130, 5, 0, 200)

CASES = [
    *(
        GradientCase(d, batch=1, seqlen_q=200, seqlen_k=333, heads_q=2, heads_kv=1, **mask.options)
        for d in BACKWARD_HEAD_DIM_TILES
        for mask in KERNEL_MASKS
    ),
    *(
        GradientCase(d, lens_q=LENS_Q, lens_k=LENS_K, heads_q=2, heads_kv=1, spare_q=3, spare_k=70, causal=True)
        for d in BACKWARD_HEAD_DIM_TILES
    ),
    GradientCase(64, 128, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, causal=True),
    GradientCase(192, 128, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, causal=True),
    GradientCase(72, batch=1, seqlen_q=3, seqlen_k=100, heads_q=1, heads_kv=1),
    GradientCase(64, batch=1, seqlen_q=129, seqlen_k=129, heads_q=1, heads_kv=1, softcap=15.0),
    *(
        GradientCase(d, batch=1, seqlen_q=300, seqlen_k=300, heads_q=2, heads_kv=1, causal=True, deterministic=True)
        for d in (128, 256)
    ),
]


def run_case(case: GradientCase, device: str = "cuda") -> Gradients:
    """Differentiate and check one case; the reference stays on the CPU, so the sanitizer sees our kernels alone."""
    tensors = make_tensors(case, "cpu")
    incoming = make_incoming(case, tensors)
    gradients = differentiate(case, on_device(tensors, device), incoming.to(device))
    gradients = tuple(gradient.cpu() for gradient in gradients)
    check_gradients(case, tensors, incoming, gradients)
    return gradients


if __name__ == "__main__":
    run_all(CASES, run_case)
