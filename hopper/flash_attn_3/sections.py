"""How many heads a launch works on together: sections of heads, of which the last one gets what is left.

``csrc/kernels/core/schedule.h`` has the order in which the tiles of a section are handed out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

#: Of a head's tiles at most so many are looked at for how much they differ.
MAX_TILES_LOOKED_AT = 256
#: Tiles differ little if their mean is more than this share of the longest.
MEAN_OF_EQUAL_TILES = 0.9


def heads_that_end_evenly(steps: Callable[[int], int], num_tiles: int, num_workers: int) -> int:
    """Heads whose tiles take all workers together half as long again as one of them the longest tile.

    With fewer, a section that begins with its longest tiles ends with them alone. Where tiles differ little there is
    nothing to put last: 1.

    Args:
        steps: of the main loop, of each of a head's tiles; its time.
        num_tiles: of a head; positive.
        num_workers: what takes a tile at a time: multiprocessors, or clusters of them.
    """
    looked_at = [max(1, steps(tile)) for tile in range(num_tiles - 1, -1, -num_tiles // MAX_TILES_LOOKED_AT)]
    longest, mean = max(looked_at), sum(looked_at) / len(looked_at)
    if mean > MEAN_OF_EQUAL_TILES * longest:
        return 1
    return math.ceil(1.5 * num_workers * longest / (num_tiles * mean))
