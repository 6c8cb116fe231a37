"""`pip install .` at the root of the repository; the build itself is described in hopper/setup.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / "hopper" / "setup.py"), run_name="__main__")
