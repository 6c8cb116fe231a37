#!/usr/bin/env python3
"""Show, write and compile the generated kernels; see ``--help``. Works from the source tree, without torch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from flash_attn_3.generate import main

if __name__ == "__main__":
    sys.exit(main())
