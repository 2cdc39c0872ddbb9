"""Writes the tables of docs/benchmarks.md and docs/planner.md anew from the files of results.

python -m bench.report

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a file in bench/results without its ending.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from bench.planner import predictions
from bench.rounds import load

DOCUMENTS = tuple(Path(__file__).parent.parent / "docs" / name for name in ("benchmarks.md", "planner.md"))
_TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Renders every table whose results are there; the others stay as they are."""
    for document in DOCUMENTS:
        document.write_text(_TABLE.sub(_rendered, document.read_text()))


def _rendered(found: re.Match[str]) -> str:
    figures = load(found[2])
    if figures is None:
        return found[0]
    text = predictions(figures) if "choices" in figures else table(figures)
    return f"{found[1]}{text}{found[3]}"


def table(figures: dict[str, Any]) -> str:
    """The command, the machine and a row for each contender, in Markdown."""
    about, limit = figures["machine"], figures["bound"]
    lines = [
        "```bash",
        figures["command"],
        "```",
        "",
        f"{about['cpu']}, torch {about['torch']}, {figures['steps']} steps.",
    ]
    if "link" in figures:
        lines[-1] += (
            f" rho {figures['rho']:.2f}: a layer takes {figures['layer_seconds'] * 1e3:.0f} ms here, so the link is "
            f"shaped to {figures['bandwidth'] * 8 / 1e6:.0f} Mbit/s. The planner takes {figures['choice']}."
        )
    columns = ["method", "patches", "seconds", "speed-up (spread)", "of PipeFusion's bound", "waited, by rank", "sent"]
    columns += ["predicted"] if "link" in figures else []
    lines += ["", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    lines += [_row(row, limit) for row in figures["rows"]]
    return "\n".join(lines) + "\n"


def _row(row: dict[str, Any], limit: float) -> str:
    share = f"{row['speedup'] / limit:.0%}" if row["name"].startswith("pipefusion") else ""
    spread = f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}"
    waited = " / ".join(f"{seconds:.1f} s" for seconds in row["waited"])
    sent = " / ".join(f"{size / 1e6:.0f} MB" for size in row["sent_bytes"])
    return (
        f"| {row['name']} | {row['patches']} | {median(row['seconds']):.1f} | {row['speedup']:.2f}× ({spread}) | "
        f"{share} | {waited} | {sent} |{_predicted(row)}"
    )


def _predicted(row: dict[str, Any]) -> str:
    if "predicted" not in row:
        return ""
    return f" {row['predicted']:.1f} s |" if row["predicted"] else "  |"


if __name__ == "__main__":
    main()
