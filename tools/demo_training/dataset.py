"""The prepared pictures: an index (``pictures.json``) and one ``uint8`` array per size.

``pictures-128.npy`` holds every picture, ``pictures-256.npy`` only those that the transformer sees. Rows of
an array follow the order of the index.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .captions import Caption, split_held_out

INDEX = "pictures.json"


@dataclass(frozen=True)
class Entry:
    """One line of the index.

    Args:
        concept: The concept's name.
        style: The set it comes from.
        core: Whether the transformer sees it (the autoencoder sees all).
        held_out: Whether both trainings leave it out.
    """

    concept: str
    style: str
    core: bool
    held_out: bool

    @property
    def caption(self) -> Caption:
        """What the picture shows, in words."""
        return Caption(self.concept, self.style)


def make_entries(captions: list[Caption], concepts: set[str], held_out: list[str]) -> list[Entry]:
    """Mark each caption as core or not, held out or not.

    Raises:
        ValueError: A concept has no picture, or the held-out rule is broken (see ``split_held_out``).
    """
    unknown = concepts - {caption.concept for caption in captions}
    if unknown:
        raise ValueError(f"concepts without a picture: {', '.join(sorted(unknown))}")
    core = [caption for caption in captions if caption.concept in concepts]
    held = {core[i] for i in split_held_out(core, held_out)[1]}
    return [Entry(c.concept, c.style, c.concept in concepts, c in held) for c in captions]


@dataclass(frozen=True)
class Pictures:
    """Entries with their pictures, ``uint8`` of shape (n, size, size, 3)."""

    entries: list[Entry]
    pixels: NDArray[np.uint8]

    def pick(self, *, core: bool | None = None, held_out: bool | None = None) -> Pictures:
        """Select the entries with the given marks."""
        rows = [
            i
            for i, entry in enumerate(self.entries)
            if core in (None, entry.core) and held_out in (None, entry.held_out)
        ]
        return Pictures([self.entries[i] for i in rows], self.pixels[rows])

    @property
    def captions(self) -> list[Caption]:
        """One caption per picture."""
        return [entry.caption for entry in self.entries]


def array_path(folder: Path, size: int) -> Path:
    return folder / f"pictures-{size}.npy"


def at_size(entries: list[Entry], size: int) -> list[Entry]:
    """The entries whose pictures the array of one size holds."""
    return entries if size == 128 else [entry for entry in entries if entry.core]


def save_index(folder: Path, entries: list[Entry], source: dict[str, Any]) -> None:
    """Write the index with a note of where the pictures come from."""
    data = {"source": source, "entries": [asdict(entry) for entry in entries]}
    (folder / INDEX).write_text(json.dumps(data, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def load_pictures(folder: Path, size: int = 128) -> Pictures:
    """Open the prepared pictures of one size.

    Raises:
        FileNotFoundError: The folder was not prepared, or not at this size.
        ValueError: The array and the index disagree.
    """
    for path in (folder / INDEX, array_path(folder, size)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run: train_demo.py prepare {folder} --size {size}")
    records = json.loads((folder / INDEX).read_text(encoding="utf-8"))["entries"]
    entries = at_size([Entry(**record) for record in records], size)
    pixels = np.load(array_path(folder, size), mmap_mode="r")
    if pixels.shape != (len(entries), size, size, 3):
        raise ValueError(f"{array_path(folder, size)} does not fit {INDEX}; run prepare again")
    return Pictures(entries, pixels)
