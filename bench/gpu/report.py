"""Writes the results of docs/gpu.md anew from bench/results/gpu.json.

python -m bench.gpu.report
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu.catalogue import PARTS
from bench.gpu.machine import ROOT

RESULTS, PAGE = ROOT / "bench" / "results" / "gpu.json", ROOT / "docs" / "gpu.md"
_PLACE = re.compile(r"(<!-- gpu results -->\n).*?(<!-- end -->)", re.DOTALL)
NONE_YET = (
    "**There are no figures yet**: the command has not been run on a GPU. What this page says of GPUs is unproven.\n"
)

Row = dict[str, Any]


def rendered(results: dict[str, Any] | None) -> str:
    """The results in Markdown; without any, a sentence that says so."""
    if results is None or all(part["status"] == "skipped" for part in results["parts"].values()):
        return NONE_YET
    machine = results["machine"]
    about = f"{machine['gpus']} × {machine['card']}, torch {machine['torch']}, CUDA {machine['cuda']}"
    lines = [f"{about}, diffusers {machine['diffusers']}, Python {machine['python']}.", ""]
    if not machine["gpus"]:
        lines = ["**No GPU**: tiny shapes on a CPU, which show that the code runs and nothing else.", ""]
    lines += ["| part | what it shows | outcome | rows | seconds |", "| --- " * 5 + "|"]
    lines += [_summary(letter, part) for letter, part in results["parts"].items()]
    for part in PARTS:
        found = results["parts"].get(part.letter)
        if found is not None and found["rows"]:
            lines += ["", f"### {part.letter}: {part.title}", "", *_TABLES[part.letter](found["rows"])]
    return "\n".join(lines) + "\n"


def _summary(letter: str, part: dict[str, Any]) -> str:
    why = f": {part['why']}" if "why" in part else ""
    return (
        f"| {letter} | {part['title']} | {part['status']}{_cell(why)} | {len(part['rows'])} | {part['seconds']:.0f} |"
    )


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: str, rows: list[list[Any]]) -> list[str]:
    columns = head.split(", ")
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _verdict(row: Row) -> str:
    return {True: "yes", False: "**no**", None: ""}[row["ok"]] + (f" ({row['why']})" if "why" in row else "")


def _number(row: Row, name: str, form: str = ".2g") -> str:
    return format(row[name], form) if isinstance(row.get(name), int | float) else ""


def _laws(rows: list[Row]) -> list[str]:
    table = [[row["title"], _verdict(row), _number(row, "apart"), row.get("repeats", "")] for row in rows]
    return _table("case, bit-equal, largest difference, plain repeats itself", table)


def _layouts(rows: list[Row]) -> list[str]:
    table = [
        [row["title"], _verdict(row), _number(row, "apart"), _number(row, "from_one_device"), _number(row, "seconds"),
         row.get("text", "")]
        for row in rows
    ]  # fmt: skip
    return _table(
        "layout, as it must be, from the host's transport, from one device, seconds, what rank 0 reads", table
    )


def _speed(rows: list[Row]) -> list[str]:
    patches = [row for row in rows if "patch_seconds" in row]
    blocks = [row for row in rows if "milliseconds" in row]
    first = [
        [row["title"], row["tokens"], _number(row, "ratio", ".3f"), f"{row['patch_seconds'] * 1e3:.1f}"]
        for row in patches
    ]
    second = [
        [row["kind"], row["tokens"], _number(row, "milliseconds", ".2f"), _number(row, "predicted", ".2f")]
        for row in blocks
    ]
    lines = _table("one rank, tokens of a patch, step beside plain, ms a patch", first)
    return [*lines, "", *_table("block, image rows, ms, ms as the planner says", second)]


def _attention(rows: list[Row]) -> list[str]:
    kernels = sorted({kernel for row in rows for kernel in row.get("kernels", {})})
    table = [
        [row["title"], *(row.get("kernels", {}).get(kernel, "") for kernel in kernels), _verdict(row)] for row in rows
    ]
    return _table(", ".join(["method", *kernels, "a fused kernel"]).replace("method,", "model and method,"), table)


def _compiled(rows: list[Row]) -> list[str]:
    table = [
        [row["title"], _number(row, "first_seconds", ".1f"), f"{row['step_seconds'] * 1e3:.1f}", row["graphs"]]
        for row in rows
    ]
    return _table("blocks, first request (s), ms a step, graphs", table)


def _waits(rows: list[Row]) -> list[str]:
    def places(row: Row) -> str:
        return "; ".join(f"{place} ({count})" for place, count in row.get("waits", {}).items()) or "none"

    table = [[row["title"], places(row) if "waits" in row else "", _verdict(row)] for row in rows]
    return _table("model and method, waits between the second and the last step, no more than plain", table)


def _memory(rows: list[Row]) -> list[str]:
    def mega(row: Row, *names: str) -> str:
        return f"{sum(row[name] for name in names) / 1e6:,.1f}" if names[0] in row else ""

    table = [
        [row["title"], mega(row, "peak"), mega(row, "formula_store", "formula_working"), mega(row, "store"),
         mega(row, "formula_store"), _verdict(row)]
        for row in rows
    ]  # fmt: skip
    return _table("rank and layout, peak beside weights (MB), formula, keys and values (MB), formula, fits", table)


def _forecasts(rows: list[Row]) -> list[str]:
    def spent(row: Row, name: str) -> str:
        return f"{row[name]['host']:.2f} / {row[name]['device']:.2f}"

    names = [f"{name}_milliseconds" for name in ("none", "torch", "fused")]
    table = [
        [row["title"], row["passes"], _number(row, "difference"), *(spent(row, name) for name in names), _verdict(row)]
        for row in rows
    ]
    return _table("dtype, passes, difference, ms without (host / device), torch's operations, fused, fused", table)


def _offloading(rows: list[Row]) -> list[str]:
    def giga(row: Row, name: str) -> str:
        return f"{row[name] / 1e9:.2f}" if name in row else ""

    table = [
        [row["title"], f"{row['step_seconds'] * 1e3:.0f}", giga(row, "streamed"), giga(row, "peak"),
         giga(row, "expected_peak"), _verdict(row)]
        for row in rows
    ]  # fmt: skip
    return _table("weights, ms a step or prompt, GB copied, peak (GB), formula, as it must be", table)


_TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "a": _laws, "b": _layouts, "c": _speed, "d": _attention, "e": _compiled, "f": _waits, "g": _memory, "h": _forecasts,
    "i": _offloading,
}  # fmt: skip


def main(
    results: Annotated[Path, typer.Option(help="The file of results.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="The page that has a place for them.")] = PAGE,
) -> None:
    """Writes the results into the page."""
    found = json.loads(results.read_text()) if results.exists() else None
    page.write_text(_PLACE.sub(lambda place: f"{place[1]}{rendered(found)}{place[2]}", page.read_text()))


if __name__ == "__main__":
    typer.run(main)
