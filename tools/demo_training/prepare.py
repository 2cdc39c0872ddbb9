"""``prepare``: from the four icon packages to arrays of pictures."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import Progress

from . import console
from .dataset import Entry, array_path, at_size, make_entries, save_index
from .icons import PACKAGES, Icon, common_concepts, fetch, read_icons
from .raster import render


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def prepare(
    out: Path, cache: Path, concepts: Path | None, held_out: Path, sizes: list[int], workers: int
) -> list[Entry]:
    """Fetch, rasterise and write everything; return the index.

    Args:
        out: Folder for the arrays and the index.
        cache: Folder for the downloaded packages.
        concepts: File of concept names, or ``None`` for every concept drawn in all four styles.
        held_out: File of captions to keep out of training.
        sizes: Picture sides in pixels, 128 and perhaps 256.
        workers: Processes that rasterise.
    """
    icons = read_icons(fetch(cache))
    names = common_concepts(icons) if concepts is None else read_lines(concepts)
    entries = make_entries([icon.caption for icon in icons], set(names), read_lines(held_out))
    out.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        kept = set(at_size(entries, size))
        chosen = [icon for icon, entry in zip(icons, entries, strict=True) if entry in kept]
        _write_array(array_path(out, size), chosen, size, workers)
    save_index(out, entries, {"packages": PACKAGES, "concepts": len(names)})
    return entries


def _write_array(path: Path, icons: list[Icon], size: int, workers: int) -> None:
    partial_path = path.with_suffix(".part.npy")
    array = np.lib.format.open_memmap(partial_path, mode="w+", dtype=np.uint8, shape=(len(icons), size, size, 3))
    with Progress(console=console.CONSOLE) as progress, ProcessPoolExecutor(workers) as pool:
        task = progress.add_task(f"rasterising at {size}", total=len(icons))
        pictures = pool.map(partial(render, size=size), icons, chunksize=32)
        for row, picture in enumerate(pictures):
            array[row] = picture
            progress.advance(task)
    array.flush()
    os.replace(partial_path, path)


def summary(entries: list[Entry]) -> list[tuple[str, int, int, int]]:
    """Per style: pictures, those the transformer trains on, those held out."""
    total = Counter(entry.style for entry in entries)
    core = Counter(entry.style for entry in entries if entry.core and not entry.held_out)
    held = Counter(entry.style for entry in entries if entry.held_out)
    return [(style, total[style], core[style], held[style]) for style in PACKAGES]
