"""``--lora PATH[:SCALE]``: reading it, and loading what it names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchpipe.engine import Engine


@dataclass(frozen=True)
class Lora:
    """A LoRA that was asked for: where it is, and its strength."""

    path: str
    scale: float = 1.0


def read_loras(texts: Sequence[str] | None) -> tuple[Lora, ...]:
    """Reads ``PATH`` or ``PATH:SCALE``; a path that exists as it stands may have a colon in it.

    Raises:
        FileNotFoundError: There is no such file, folder or hub id.
        ValueError: What follows the colon is no number.
    """
    return tuple(_read(text) for text in texts or ())


def _read(text: str) -> Lora:
    from patchpipe.engine.loras import find_lora  # with the engine comes torch, too slow for --help

    path, colon, tail = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return Lora(find_lora(text))
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise ValueError(f"--lora {text!r}: there is no such path, and {tail!r} is no strength such as 0.8")
    return Lora(find_lora(path), scale)


def load_loras(engine: Engine, loras: Sequence[Lora]) -> None:
    """Loads them one after the other; an engine that cannot is closed."""
    try:
        for lora in loras:
            engine.load_lora(lora.path, scale=lora.scale)
    except BaseException:
        engine.close()
        raise
