"""What ``evaluate`` prints and writes."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path

from diffusers import FluxPipeline

from .captions import STYLES, Caption
from .console import CONSOLE, table
from .dataset import Pictures, load_pictures
from .evaluate import LEVELS, SHEET, losses, mark_held_out, paint, sheet
from .retrieval import as_pixels, bank_of, features, load_features, retrieve


def require_features() -> None:
    """Fail now, not after painting, where the feature packages are absent."""
    load_features()


def print_losses(pipe: FluxPipeline, data: Path, draws: int) -> None:
    """Print the flow loss of seen and held-out pairs at four noise levels."""
    core = load_pictures(data).pick(core=True)
    rows = []
    for name, held_out in (("held out", True), ("seen", False)):
        part = core.pick(held_out=held_out)
        rows.append((name, len(part.entries), *losses(pipe, part, draws=draws)))
    table("flow loss", ("pairs", "n", *(f"s={level}" for level in LEVELS)), rows)


def write_sheet(pipe: FluxPipeline, out: Path, model: Path, size: int, guidance: float) -> None:
    """Paint the fixed captions and write them as one PNG; held-out captions get a star."""
    images = paint(pipe, SHEET, size=size, guidance=guidance)
    file = model / "heldout.txt"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    captions = mark_held_out(SHEET, [Caption.parse(line) for line in lines])
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, captions).save(out, optimize=True)
    CONSOLE.print(f"wrote {out} ({out.stat().st_size / 1000:.0f} KB); * = held out of training")


def print_retrieval(pipe: FluxPipeline, data: Path, count: int, distractors: int, guidance: float) -> None:
    """Paint held-out captions and print how often the named picture is the nearest real one."""
    network, pictures = load_features(), load_pictures(data)
    wanted = pictures.pick(held_out=True).captions[:count]
    bank = bank_of(pictures, bank_concepts(pictures, distractors))
    with CONSOLE.status(f"features of {len(bank.entries)} real pictures"):
        real = features(network, bank.pixels)
    painted = features(network, as_pixels(paint(pipe, [str(c) for c in wanted], guidance=guidance)))
    result = retrieve(painted, wanted, real, bank.captions)
    values = [getattr(result, part.name) for part in fields(result)]
    table("retrieval, held-out pairs", [part.name for part in fields(result)], [values])


def bank_concepts(pictures: Pictures, distractors: int, seed: int = 0) -> set[str]:
    """The trained concepts and some others that all four styles draw, chosen by a fixed seed."""
    styles: dict[str, set[str]] = {}
    for entry in pictures.entries:
        styles.setdefault(entry.concept, set()).add(entry.style)
    trained = {entry.concept for entry in pictures.entries if entry.core}
    others = sorted(c for c, drawn in styles.items() if len(drawn) == len(STYLES) and c not in trained)
    return trained | set(random.Random(seed).sample(others, min(distractors, len(others))))
