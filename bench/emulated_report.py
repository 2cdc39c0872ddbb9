"""Tables of the emulated cards for docs/benchmarks.md: see ``bench/report.py``."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.rounds import load

Row = dict[str, Any]
SUMMARY = "emulated"
SEQUENCE = ("ulysses", "ring")
COLUMNS = (
    "layout", "patches", "dilation", "seconds", "planner", "busy by rank", "a patch on the card", "own code a patch",
    "nothing hidden",
)  # fmt: skip
WORKLOADS = [(model, pixels) for model in ("pixart", "sd3", "flux") for pixels in (1024, 2048)]
NAMES = {"pixart": "PixArt-α", "sd3": "SD3-medium", "flux": "FLUX.1-dev"}
# Times that PipeFusion is faster than the best other method on 8×L40: arXiv 2405.14430, section 5.
PUBLISHED = {
    ("pixart", 1024): 1.48, ("pixart", 2048): 1.55, ("sd3", 1024): 1.57, ("sd3", 2048): 1.30,
    ("flux", 1024): 1.23, ("flux", 2048): 1.25,
}  # fmt: skip


def summary_table(ranks: int = 8) -> str | None:
    """PipeFusion beside the best of the others, a row for each model and size; ``None`` where nothing is there."""
    columns = ("model", "1 card", "PipeFusion (stages, M)", "best sequence parallel", "planner", "gain", "published",
               "the same, no contention", "planner", "gain", "DistriFusion", "tensor")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for model, pixels in WORKLOADS:
        figures = load(f"emulated-{model}-{pixels}-{ranks}")
        if figures is not None:
            lines.append(_summary_row(figures, PUBLISHED[model, pixels]))
    return "\n".join(lines) + "\n" if len(lines) > 2 else None


def _summary_row(figures: Row, published: float) -> str:
    rows = figures["rows"]
    ours = fastest(rows, "pipefusion")
    cells = [
        f"{NAMES[figures['model']]} {figures['pixels']} px",
        f"{figures['one']:.2f} s" if figures["one"] else "–",
        f"{ours['seconds']:.2f} s ({ours['name'].removeprefix('pipefusion')}, {ours['patches']})",
        *_others(ours, rows),
        f"{published:.2f}×",
        *_others(ours, rows, contended=False),
        *(_seconds(rows, name) for name in ("distrifusion", "tensor")),
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(rows: list[Row], method: str) -> str:
    if not any(row["name"].startswith(method) for row in rows):
        return "–"
    row = fastest(rows, method)
    return f"{row['seconds']:.2f} s (planner {row['predicted']:.2f} s)"


def _others(ours: Row, rows: list[Row], contended: bool = True) -> tuple[str, str, str]:
    """The best other method here, the best by the planner's word, and the gain over the better of the two."""
    best = fastest(rows, *SEQUENCE, contended=contended)
    planned = fastest(rows, *SEQUENCE, contended=contended, by="predicted")
    gain = min(best["seconds"], planned["predicted"]) / ours["seconds"]
    return f"{best['seconds']:.2f} s ({best['name']})", f"{planned['predicted']:.2f} s", f"**{gain:.2f}×**"


def fastest(rows: list[Row], *methods: str, contended: bool = True, by: str = "seconds") -> Row:
    """The quickest row of some methods; without contention, a layout that it does not touch counts as it is."""
    mine = [row for row in rows if row["name"].startswith(methods)]
    if not contended:
        eased = {row["name"] for row in mine if not row["contended"]}
        mine = [row for row in mine if not row["contended"] or row["name"] not in eased]
    else:
        mine = [row for row in mine if row["contended"]]
    return min(mine, key=lambda row: row[by])


def table(figures: Row) -> str:
    """The command, the machine and a row for each layout, in Markdown."""
    about = figures["machine"]
    lines = [
        "```bash",
        figures["command"],
        "```",
        "",
        f"{NAMES[figures['model']]}, {figures['pixels']} px, {figures['ranks']} × {figures['card'].upper()}; "
        f"{about['cores']} cores of {about['cpu']}. Seconds are the card's own, dilation taken out.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
        *map(_row, figures["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _row(row: Row) -> str:
    busy = row["busy"] or row["card"]
    name = row["name"] + ("" if row["contended"] else ", no contention")
    return (
        f"| {name} | {row['patches']} | {row['dilation']:.1f} | {row['seconds']:.2f} | {row['predicted']:.2f} | "
        f"{min(busy):.1%}-{max(busy):.1%} | {row['period'] / row['patches'] * 1e3:.1f} ms | "
        f"{median(row['host']) * 1e3:.1f} ms | {row['unhidden']:.2f} |"
    )
