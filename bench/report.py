"""Writes the tables of docs/benchmarks.md and docs/planner.md anew from the files of results.

python -m bench.report

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a file in bench/results without its ending.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median
from typing import Any

from bench import emulated_report
from bench.contenders import BESIDE, COMPILED, NOT_OURS
from bench.one_device import cells
from bench.planner import predictions
from bench.rounds import load

DOCUMENTS = tuple(Path(__file__).parent.parent / "docs" / name for name in ("benchmarks.md", "planner.md"))
_TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


LINKS = {
    "loopback": "loopback-flux-wide-2", "as slow as NVLink": "links-flux-nvlink", "as PCIe": "links-flux-pcie",
    "as 25 GbE": "links-flux-25gbe",
}  # fmt: skip
METHODS = {
    "pipefusion": "PipeFusion",
    "ulysses": "Ulysses",
    "ring": "Ring",
    "tensor": "tensor",
    "distrifusion": "DistriFusion",
}


def main() -> None:
    """Renders every table whose results are there; the others stay as they are."""
    for document in DOCUMENTS:
        document.write_text(_TABLE.sub(_rendered, document.read_text()))


def _rendered(found: re.Match[str]) -> str:
    text = _text(found[2])
    return found[0] if text is None else f"{found[1]}{text}{found[3]}"


def _text(name: str) -> str | None:
    if name == "summary":
        return summary()
    if name == emulated_report.SUMMARY:
        return emulated_report.summary_table()
    figures = load(name)
    if figures is None:
        return None
    if name.startswith(emulated_report.SUMMARY):
        return emulated_report.table(figures)
    if "patches_of_one" in figures:
        return patches_of_one(figures)
    if "layouts" in figures:
        return compiled(figures)
    if "around" in figures:
        return around(figures)
    if "forecast" in figures:
        return forecast(figures)
    if "forecast_cpu" in figures:
        return forecast_here(figures)
    return predictions(figures) if "choices" in figures else table(figures)


def compiled(figures: dict[str, Any]) -> str:
    """Eager and compiled blocks on one rank and on several, in Markdown."""
    lines = ["```bash", figures["command"], "```", "", f"{figures['machine']['cpu']}, {figures['steps']} steps.", ""]
    lines += ["| ranks | method | patches | seconds | beside plain on one rank (spread) | beside itself, eager |"]
    lines += ["| --- " * 6 + "|"]
    for layout in figures["layouts"]:
        eager: dict[str, float] = {}
        for row in layout["rows"]:
            seconds = median(row["seconds"])
            name, compiled, _ = row["name"].partition(COMPILED)
            eager.setdefault(name, seconds)
            beside = f"{eager[name] / seconds:.2f}×" if compiled else ""
            lines.append(
                f"| {layout['ranks']} | {row['name']} | {row['patches']} | {seconds:.1f} | {_speedup(row)} | {beside} |"
            )
    return "\n".join(lines) + "\n"


def patches_of_one(figures: dict[str, Any]) -> str:
    """One device with more and more patches, in Markdown."""
    lines = ["```bash", figures["command"], "```", "", f"{figures['machine']['cpu']}, {figures['dtype']}.", ""]
    lines += ["| patches | tokens | ms a step | beside plain diffusers | spread | ms a patch |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {' | '.join(cells(one))} |" for one in figures["patches_of_one"]]
    return "\n".join(lines) + "\n"


def summary() -> str:
    """FLUX-shaped models on two ranks: each method's speed-up over one rank, by link, in Markdown."""
    found = {title: load(name) for title, name in LINKS.items()}
    columns = {title: {row["name"]: row for row in figures["rows"]} for title, figures in found.items() if figures}
    lines = [f"| | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for method, title in METHODS.items():
        cells = [f"{rows[method]['speedup']:.2f}×" if method in rows else "–" for rows in columns.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def around(figures: dict[str, Any]) -> str:
    """What surrounds the blocks, beside all of a patch's work on a stage, in Markdown."""
    lines = ["```bash", figures["command"], "```", "", f"Seconds are those of one {figures['card'].upper()}.", ""]
    lines += [
        "| model | stage | GFLOP of its blocks | around: FLOPs | bytes | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in figures["around"]:
        shares = [f"{row[name]:.2%}" for name in ("flops", "bytes", "seconds")]
        cells = [row["model"], f"{row['stage']} of {figures['stages']}", f"{row['gigaflops']:.0f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def forecast(figures: dict[str, Any]) -> str:
    """What a forecast adds to a patch, in Markdown."""
    lines = ["```bash", figures["command"], "```", "", f"Seconds are those of one {figures['card'].upper()}.", ""]
    lines += ["| model | bytes moved | seconds | fused: bytes | fused: seconds |", "| --- " * 5 + "|"]
    lines += [
        f"| {row['model']} | {row['bytes']:+.0%} | {row['seconds']:+.1%} | {row['fused_bytes']:+.0%} | "
        f"{row['fused_seconds']:+.1%} |"
        for row in figures["forecast"]
    ]
    return "\n".join(lines) + "\n"


def forecast_here(figures: dict[str, Any]) -> str:
    """What a forecast adds on this machine's processor, in Markdown."""
    lines = [
        "```bash",
        figures["command"],
        "```",
        "",
        f"{figures['machine']['cpu']}, {figures['patches']} patches.",
        "",
    ]
    lines += ["| dtype | a block's patch | added to the first patch | to each of the others | of a step |"]
    lines += ["| --- " * 5 + "|"]
    for row in figures["forecast_cpu"]:
        cells = [f"{1000 * row[name]:.1f} ms" for name in ("block", "first", "others")]
        lines.append(f"| {row['dtype']} | {' | '.join(cells)} | {row['share']:+.1%} |")
    return "\n".join(lines) + "\n"


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
    return "\n".join(lines) + "\n" + _busy_ranks(figures["rows"], limit)


def _busy_ranks(rows: list[dict[str, Any]], limit: float) -> str:
    """What ranks that merely work at the same time lose, and what is left of the bound then."""
    beside = next((row["speedup"] for row in rows if row["name"] == BESIDE), None)
    found = [row["speedup"] for row in rows if row["name"].startswith("pipefusion")]
    if beside is None or not found:
        return ""
    return (
        f"\nTwo independent ranks that work at the same time each run at {beside:.2f}× the speed of one alone. "
        f"Corrected for that, PipeFusion reaches {max(found) / limit / beside:.0%} of its bound.\n"
    )


def _speedup(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f}× ({min(row['ratios']):.2f}-{max(row['ratios']):.2f})"


def _row(row: dict[str, Any], limit: float) -> str:
    share = f"{row['speedup'] / limit:.1%}" if row["name"].startswith("pipefusion") else ""
    counted = row["name"] not in NOT_OURS
    waited = " / ".join(f"{seconds:.1f} s" for seconds in row["waited"]) if counted else ""
    sent = " / ".join(f"{size / 1e6:.0f} MB" for size in row["sent_bytes"]) if counted else ""
    return (
        f"| {row['name']} | {row['patches']} | {median(row['seconds']):.1f} | {_speedup(row)} | "
        f"{share} | {waited} | {sent} |{_predicted(row)}"
    )


def _predicted(row: dict[str, Any]) -> str:
    if "predicted" not in row:
        return ""
    return f" {row['predicted']:.1f} s |" if row["predicted"] else "  |"


if __name__ == "__main__":
    main()
