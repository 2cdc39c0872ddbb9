"""Draws every method's speed-up on loopback and on shaped links, from the files of results.

python -m bench.plot
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.contenders import BESIDE, PLAIN
from bench.rounds import IMAGES, load

SHAPES = {"flux": "FLUX-shaped", "sd3": "SD3-shaped", "pixart": "PixArt-shaped"}
LOOPBACK = {"flux": "flux-wide"}
LINKS = {"nvlink": "NVLink", "pcie": "PCIe", "25gbe": "25 GbE"}
COLOURS = {
    "pipefusion": "#1f6feb", "distrifusion": "#d1782c", "ulysses": "#3a9d5d", "ring": "#8a63d2", "tensor": "#b0485a",
    "diffusers-ulysses": "#9aa4ae",
}  # fmt: skip
BAR = 0.72
OUT = IMAGES / "benchmarks.png"


def main() -> None:
    """Draws what has been measured so far."""
    print(f"wrote {draw(panels(), OUT)}")


def panels() -> list[tuple[str, dict[str, Any]]]:
    """Title and figures of each result that is there."""
    named = [(f"{title}, loopback", f"loopback-{LOOPBACK.get(shape, shape)}-2") for shape, title in SHAPES.items()]
    named += [
        (f"{title}, {link}", f"links-{shape}-{key}") for shape, title in SHAPES.items() for key, link in LINKS.items()
    ]
    found = [(title, load(name)) for title, name in named]
    return [(_titled(title, figures), figures) for title, figures in found if figures is not None]


def _titled(title: str, figures: dict[str, Any]) -> str:
    return f"{title} (ρ {figures['rho']:.2f})" if "rho" in figures else title


def draw(found: list[tuple[str, dict[str, Any]]], out: Path) -> Path:
    """One panel for each result, three in a row.

    Raises:
        ValueError: Nothing has been measured yet.
    """
    if not found:
        raise ValueError("there are no results to draw: run `python -m bench.loopback` first")
    rows = -(-len(found) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(11, 2.5 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, found, strict=False):
        _panel(axis, *panel)
    for axis in list(axes.flat)[len(found) :]:
        axis.axis("off")
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return out


def _panel(axis: Any, title: str, figures: dict[str, Any]) -> None:
    rows = [row for row in figures["rows"] if row["name"] not in (PLAIN, BESIDE)]
    for place, row in enumerate(rows):
        name = row["name"].partition(":")[0]
        axis.bar(place, row["speedup"], BAR, color=COLOURS[name])
        look = {"ha": "center", "va": "top", "fontsize": 7, "color": "white"}  # inside, away from the prediction's mark
        axis.text(place, row["speedup"] - 0.03, f"{row['speedup']:.2f}", **look)
        if row.get("predicted"):
            plain = median(ratio * own for ratio, own in zip(row["ratios"], row["seconds"], strict=True))  # of its run
            axis.plot(place, plain / row["predicted"], "_", color="black", markersize=16)
    axis.axhline(figures["bound"], color=COLOURS["pipefusion"], linestyle=":", linewidth=1)
    axis.axhline(1, color="#9aa4ae", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=6.5)
    axis.set_ylim(0, 2.25)
    axis.set_title(title, fontsize=9)
    axis.set_ylabel("× one rank", fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _label(row: dict[str, Any]) -> str:
    name = row["name"].partition(":")[0]
    return f"{name}\nM = {row['patches']}" if name == "pipefusion" else name.replace("-ulysses", "'\nUlysses")


if __name__ == "__main__":
    main()
