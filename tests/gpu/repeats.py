"""Equal calls, compared on the device without waiting for it, and what to do to the GPU meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from .calls import Call, Results

#: Part of the free GPU memory that is taken away beside other traffic.
BALLAST = 0.8
_COPIED_BYTES = 2**26


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def _nothing() -> None:
    pass


def check_repeats(
    call: Call,
    repeats: int,
    before_each: Callable[[], None] = _nothing,
    check: Callable[[Results], None] | None = None,
) -> None:
    """Call, check, call again so many times: every result is bitwise the first, or if it need not be, right as well.

    Of results that may differ in their last bits, the smallest and the largest numbers are kept, and judged at the end.
    ``check`` judges in the place of the call's own.
    """
    check = check or call.check
    first = call.run()
    check(first)
    differing = torch.zeros(len(first), dtype=torch.int64, device=first[0].device)
    least, largest = first[0].clone(), first[0].clone()
    for _ in range(repeats):
        before_each()
        again = call.run()
        differing += torch.stack([(_bits(x) != _bits(y)).any() for x, y in zip(first, again, strict=True)])
        torch.minimum(least, again[0], out=least)
        torch.maximum(largest, again[0], out=largest)
    found = differing.tolist()
    if call.adds_in_any_order:
        for extreme in (least, largest):
            check((extreme, *first[1:]))
        found[0] = 0
    assert not any(found), f"of {repeats} repeats so many differ in each result: {found}"


@contextlib.contextmanager
def other_traffic(neighbour: Call) -> Iterator[Callable[[], None]]:
    """Leave little memory, and give a function that has another stream copy memory and make the neighbour's call.

    The neighbour's CTAs take multiprocessors away, so that those of other calls start and end in another order each
    time.
    """
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(int(free * BALLAST), dtype=torch.uint8, device="cuda")
    copies = torch.empty(2, _COPIED_BYTES, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def more() -> None:
        with torch.cuda.stream(stream):
            copies[0].copy_(copies[1])
            neighbour.run()

    try:
        yield more
    finally:
        torch.cuda.synchronize()
        del ballast
        torch.cuda.empty_cache()


@contextlib.contextmanager
def no_memory_caching() -> Iterator[None]:
    """Memory that is freed is gone, as with PYTORCH_NO_CUDA_MEMORY_CACHING=1."""
    torch.cuda.empty_cache()
    torch.cuda.memory.caching_allocator_enable(False)
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.memory.caching_allocator_enable(True)
