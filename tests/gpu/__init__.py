"""Tests that launch kernels, and programs that make their calls without pytest (sanitizers, the list of kernels).

The helpers beside this folder have names of their own, under which all tests import them. pytest knows where they are
from `conftest.py`; the programs know it from here.
"""

import sys
from pathlib import Path

_TESTS = str(Path(__file__).resolve().parent.parent)
if _TESTS not in sys.path:
    sys.path.insert(0, _TESTS)
