"""The planner's predictions against published latencies of xDiT and PipeFusion.

python -m bench.planner
python -m bench.planner --held-out    # rows that nothing in the planner was fitted to

A group is one model at one resolution on one kind of card and link. Its single-device time calibrates the compute rate;
every other row is predicted as xDiT runs it: see ``patchpipe.planner.machine.system.XDIT``. No parameter belongs to
a row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby, product
from math import prod
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.rounds import save
from patchpipe.config import ParallelConfig
from patchpipe.planner import XDIT, Profile, Workload, calibrated, predict, preset_named

DATA = Path(__file__).parent / "data" / "published-latency.csv"
HELD_OUT = DATA.with_name("published-latency-held-out.csv")
PATCHES = (2, 4, 8, 16, 32)  # that the paper searched
SINGLE, BEST, BEST_SEQUENCE = "single", "best", "best sequence parallel"
_DEGREE = re.compile(r"([a-z]+)(\d+)")
_SHORT = {"u": "ulysses", "r": "ring", "pp": "pipefusion", "pipe": "pipefusion", "tp": "tensor", "sp": "ulysses"}
_NVLINK = {"a100": "nvlink3"}  # of other cards: nvlink4
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Published:
    """One published time.

    Attributes:
        model: The model.
        resolution: ``1024``, or ``1280x720x129`` for a video.
        steps: Denoising steps.
        gpu: The card.
        link: What joins the cards.
        devices: Cards.
        config: ``single``, ``ulysses4*cfg2`` and the like, ``best``, or ``best sequence parallel``.
        seconds: What it took.
        source: Where it is published.
    """

    model: str
    resolution: str
    steps: int
    gpu: str
    link: str
    devices: int
    config: str
    seconds: float
    source: str

    @property
    def group(self) -> Key:
        """Rows with the same single-device time."""
        return self.model, self.resolution, str(self.steps), self.gpu, self.link


@dataclass(frozen=True)
class Compared:
    """A published row beside its prediction."""

    row: Published
    predicted: float
    layout: str

    @property
    def error(self) -> float:
        """Relative error, above 0 where the prediction is too slow."""
        return self.predicted / self.row.seconds - 1


@dataclass(frozen=True)
class Choice:
    """The fastest row of a group and of its predictions, where several layouts of as many devices were published."""

    group: Key
    devices: int
    published: str
    predicted: str


def read_rows(path: Path = DATA) -> list[Published]:
    """Reads a table of published times."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Published(
                **{**row, "steps": int(row["steps"]), "devices": int(row["devices"]), "seconds": float(row["seconds"])}
            )
            for row in csv.DictReader(file)
        ]


def compare(rows: list[Published]) -> list[Compared]:
    """Predicts every row of more than one device whose group has a single-device time."""
    found = []
    for _, members in groupby(sorted(rows, key=lambda row: row.group), key=lambda row: row.group):
        group = list(members)
        single = next((row for row in group if row.config == SINGLE), None)
        workload = workload_of(group[0])
        if single is None or workload is None:
            continue
        profile = calibrated(workload, profile_of(single), single.seconds)
        found += [_predicted(row, workload, profile) for row in group if row.config != SINGLE]
    return found


def workload_of(row: Published) -> Workload | None:
    """What was run; ``None`` where it is no preset of the planner."""
    name = re.sub(r"\s*\(.*\)", "", row.model).lower()
    preset = preset_named(name)
    if preset is None:
        return None
    sizes = [int(part) for part in row.resolution.split("x")]
    width, height = sizes[:2] if len(sizes) > 1 else sizes * 2
    frames = sizes[2] if len(sizes) > 2 else 1
    workload = preset.workload(height, width, steps=row.steps, frames=frames)
    return replace(workload, text=XDIT.text.get(preset.name, preset.text))


def profile_of(row: Published) -> Profile:
    """What it ran on."""
    link = row.link.lower()
    return Profile.named(row.gpu, _NVLINK.get(row.gpu.lower(), "nvlink4") if link == "nvlink" else link)


def _predicted(row: Published, workload: Workload, profile: Profile) -> Compared:
    warmup = XDIT.warmup_of(workload.model)
    tried = [
        (predict(workload, config, profile, XDIT).seconds, config)
        for degrees in _degrees(row, workload)
        for config in _configs(degrees, workload, warmup, "(compiled)" in row.model)
    ]
    seconds, config = min(tried, key=lambda one: one[0])
    return Compared(row, seconds, config.describe())


def _degrees(row: Published, workload: Workload) -> Iterator[dict[str, int]]:
    """The degrees a row names, or all that its words leave open."""
    if row.config not in (BEST, BEST_SEQUENCE):
        yield {_SHORT.get(name, name): int(size) for name, size in _DEGREE.findall(row.config)}
        return
    names = ("ulysses", "ring") if row.config == BEST_SEQUENCE else ("cfg", "pipefusion", "ulysses", "ring")
    sizes = [size for size in range(1, row.devices + 1) if row.devices % size == 0]
    for chosen in product(sizes, repeat=len(names)):
        degrees = dict(zip(names, chosen, strict=True))
        fits = degrees.get("cfg", 1) <= workload.branches and workload.heads % degrees["ulysses"] == 0
        if prod(chosen) == row.devices and fits:
            yield degrees


def _configs(degrees: dict[str, int], workload: Workload, warmup: int, compiled: bool) -> Iterator[ParallelConfig]:
    shared = degrees.get("ulysses", 1) * degrees.get("ring", 1)
    if degrees.get("pipefusion", 1) == 1:
        yield _unchecked(**degrees, warmup=warmup, compile=compiled)
        return
    for patches in PATCHES:
        if patches * shared <= workload.rows.count:
            yield _unchecked(**degrees, patches=patches, warmup=warmup, compile=compiled)


def _unchecked(**given: int) -> ParallelConfig:
    """A layout of xDiT's, which also runs products of methods that patchpipe refuses as untested."""
    names = {field.name for field in fields(ParallelConfig)}
    if not given.keys() <= names:
        raise ValueError(f"{', '.join(sorted(given.keys() - names))} is no method of parallelism known here")
    config = object.__new__(ParallelConfig)
    for field in fields(ParallelConfig):
        object.__setattr__(config, field.name, given.get(field.name, field.default))
    return config


def choices(compared: list[Compared]) -> list[Choice]:
    """The best of every group and number of devices that has several published layouts."""
    found = []
    key = lambda one: (one.row.group, one.row.devices)  # noqa: E731
    for (group, devices), members in groupby(sorted(compared, key=key), key=key):
        listed = list(members)
        if len(listed) > 1:
            published = min(listed, key=lambda one: one.row.seconds).row.config
            predicted = min(listed, key=lambda one: one.predicted).row.config
            found.append(Choice(group, devices, published, predicted))
    return found


def summary(compared: list[Compared]) -> dict[str, Any]:
    """Rows, errors and choices as plain data."""
    errors = [abs(one.error) for one in compared]
    picked = choices(compared)
    return {
        "rows": [
            {**asdict(one.row), "predicted": one.predicted, "error": one.error, "layout": one.layout}
            for one in compared
        ],
        "median_error": median(errors),
        "worst_error": max(errors),
        "choices": [asdict(one) for one in picked],
        "right": sum(one.published == one.predicted for one in picked),
    }


def predictions(figures: dict[str, Any]) -> str:
    """The rows and the summary, in Markdown."""
    lines = [
        "| model | resolution | devices | layout | published | predicted | error | predicted as |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in figures["rows"]:
        lines.append(
            f"| {row['model']} | {row['resolution']} | {row['devices']}×{row['gpu']} | {row['config']} | "
            f"{row['seconds']:.2f} s | {row['predicted']:.2f} s | {row['error']:+.0%} | {row['layout']} |"
        )
    right, asked = figures["right"], len(figures["choices"])
    return "\n".join(
        [
            *lines,
            "",
            f"Median error {figures['median_error']:.1%}, largest {figures['worst_error']:.1%}; the fastest layout is "
            f"right in {right} of the {asked} groups that list several for as many devices.",
            "",
        ]
    )


def main(
    held_out: Annotated[bool, typer.Option("--held-out", help="Rows that nothing was fitted to.")] = False,
    data: Annotated[Path | None, typer.Option(help="A table of published times of your own.")] = None,
    write: Annotated[bool, typer.Option(help="Write bench/results, unless the table is your own.")] = True,
) -> None:
    """Predicts, prints a table and writes bench/results."""
    rows = read_rows(data or (HELD_OUT if held_out else DATA))
    figures = summary(compare(rows))
    table = Table("model", "resolution", "devices", "layout", "published s", "predicted s", "error", "as")
    for row in figures["rows"]:
        table.add_row(
            row["model"], row["resolution"], f"{row['devices']} {row['gpu']}", row["config"], f"{row['seconds']:.2f}",
            f"{row['predicted']:.2f}", f"{row['error']:+.0%}", row["layout"],
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"median error {figures['median_error']:.1%}, worst {figures['worst_error']:.1%}")
    for choice in figures["choices"]:
        console.print(f"{' '.join(choice['group'])}: best {choice['published']}, predicted {choice['predicted']}")
    if write and data is None:
        suffix = ("-held-out", " --held-out") if held_out else ("", "")
        save(f"planner{suffix[0]}", f"python -m bench.planner{suffix[1]}", figures)


if __name__ == "__main__":
    typer.run(main)
