"""Result files: where they lie, and what stands at their head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flash_attn_3 import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def describe(suite: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of a result file; its measurements go under "rows"."""
    return {
        "suite": suite,
        "date": environment.date(),
        "commit": environment.commit(ROOT),
        "device": environment.device(),
        "versions": environment.versions(),
        "settings": settings,
        "rows": [],
    }


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
