"""Contenders in turns: what each takes beside the others in the same round is compared, never across rounds."""

from __future__ import annotations

import ctypes
import json
import platform
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from bench.contenders import PLAIN, Contender
from tests.support.ranks import Place

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parent.parent / "docs" / "images"
PATIENCE = timedelta(hours=1)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
FEW_STEPS = 2  # bring code and memory in

Figures = dict[str, list[dict[str, Any]]]


def take_turns(place: Place, shape: str, names: list[str], rounds: int, steps: int | None = None) -> Figures:
    """Times every contender once a round, after a few steps that bring its code and memory in.

    Only the one whose turn it is exists: connections of the others would cost 1 to 2 % of a core, for gloo's threads
    look a hundred times a second whether there is something to do, and on rank 1 that would cost plain nothing.

    Returns:
        This rank's seconds and other figures, by contender.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    found: Figures = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            with Contender(name, shape, place, steps) as contender:
                if not contender.idle:
                    contender.run(FEW_STEPS)
                meet(place, f"{turn}/{name}")
                if not contender.idle:
                    started = perf_counter()
                    contender.run()
                    found[name].append({"seconds": perf_counter() - started, **contender.figures()})
                meet(place, f"{turn}/{name}/done")
    return found


def keep_freed_memory() -> None:
    """Has a process reuse the memory of its tensors, as a GPU's allocator does.

    glibc gives large pieces back and asks for them anew; the kernel then clears every page, which here takes 8 % of
    plain diffusers' time and makes processes slow each other down. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**30)


def meet(place: Place, name: str) -> None:
    """A rank that waits here leaves the cores to the others."""
    if place.store is None:
        return
    place.store.set(f"bench/{name}/{place.rank}", "here")
    place.store.wait([f"bench/{name}/{rank}" for rank in range(place.world_size)], PATIENCE)


@dataclass(frozen=True)
class Row:
    """One contender's figures.

    Attributes:
        name: The contender.
        seconds: Of each round.
        ratios: Seconds of plain diffusers on one rank over its own, of each round.
        waited: Median seconds each rank waited for others.
        sent_bytes: What each rank sent in a request.
        patches: Patches of the latent.
    """

    name: str
    seconds: list[float]
    ratios: list[float]
    waited: list[float]
    sent_bytes: list[int]
    patches: int

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return median(self.ratios)

    def as_dict(self) -> dict[str, Any]:
        """For a file of results."""
        return {**self.__dict__, "speedup": self.speedup}


def rows_of(ranks: list[Figures]) -> list[Row]:
    """Every contender's figures; a request is over when rank 0 has its latents."""
    plain = [entry["seconds"] for entry in ranks[0][PLAIN]]
    rows = []
    for name, entries in ranks[0].items():
        seconds = [entry["seconds"] for entry in entries]
        rows.append(
            Row(
                name,
                seconds,
                [one / own for one, own in zip(plain, seconds, strict=True)],
                [median(entry["waited"] for entry in rank[name]) if rank[name] else 0.0 for rank in ranks],
                [rank[name][-1]["sent_bytes"] if rank[name] else 0 for rank in ranks],
                entries[-1]["patches"],
            )
        )
    return rows


def bound(steps: int, ranks: int, warmup: int = 1) -> float:
    """The best PipeFusion can do over one device: synchronous steps use one stage at a time."""
    return steps / (warmup + (steps - warmup) / ranks)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save(name: str, command: str, figures: dict[str, Any], results: Path = RESULTS) -> None:
    """Writes a file of results, which `python -m bench.report` reads."""
    results.mkdir(exist_ok=True)
    whole = {"command": command, "machine": machine(), **figures}
    (results / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")


def load(name: str) -> dict[str, Any] | None:
    """A file of results, if it is there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def with_earlier(earlier: dict[str, Any] | None, command: str, figures: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Adds the rows of an earlier run that this one did not measure; each stands beside plain diffusers of its own run.

    Returns:
        The commands of both runs, and the figures.
    """
    if earlier is None:
        return command, figures
    names = {name for row in figures["rows"] for name in (row["name"], f"{row['name']}:{row['patches']}")}
    kept = [row for row in earlier["rows"] if row["name"] not in names]
    return f"{earlier['command']}\n{command}", {**figures, "rows": [*figures["rows"], *kept]}
