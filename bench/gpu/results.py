"""The file of results: whole at any time, and grown by every part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SAME = ("card", "torch", "cuda")  # what must be alike for figures of two runs to stand in one file


class Results:
    """What the parts have found, on disk whenever it changes.

    Args:
        path: The file. Parts of an earlier run on such a machine stay until they are run anew.
        machine: What it is found on.
        command: What found it.
    """

    def __init__(self, path: Path, machine: dict[str, Any], command: str) -> None:
        self.path = path
        earlier = _read(path)
        alike = earlier is not None and all(earlier["machine"].get(name) == machine.get(name) for name in SAME)
        parts = earlier["parts"] if alike and earlier is not None else {}
        self.whole: dict[str, Any] = {"command": command, "machine": machine, "parts": parts}

    def put(self, letter: str, part: dict[str, Any]) -> None:
        """Writes what a part has found, in place of what it found before."""
        self.whole["parts"] = dict(sorted({**self.whole["parts"], letter: part}.items()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(json.dumps(self.whole, indent=1) + "\n")
        os.replace(aside, self.path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "parts" in found and "machine" in found else None
