"""The real engine on emulated cards: 4, 8 or 16 processes on two cores, which sleep where a card would compute.

python -m bench.emulated --model flux --pixels 1024

Real are the pipeline's and the transformer's own Python, patchpipe's, the schedule, the transport (gloo) and the links
it goes over, which tc shapes. A block's kernels are not: see ``bench/emulated_device.py``. Time is dilated: a card's
second lasts D seconds here, on the links too. What our own code takes of the processor is *not* dilated, so that it
weighs D times less than beside real cards; it is therefore measured and told apart, in microseconds a patch.

A few steps are run; S steps take what those took and a steady period for each further one. The steady period is
measured on the last stage, which is past the fill when it has done its first streamed step.

Not emulated: latency of the links (where the kernel has no netem; gloo's own, 0.1-0.3 ms undilated, stands in for it),
computing that slows down because of a transfer beside it, and the Python of the blocks themselves, which the planner's
card counts as 4 µs a kernel.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.contenders import AS_MEASURED
from bench.emulated_device import Costs, EmulatedDevice, emulate, noting_waits
from bench.emulated_links import Hosts, enter_host, shape_link, shares_of
from bench.emulated_models import MODELS
from bench.rounds import load, meet, save
from patchpipe import ParallelConfig
from patchpipe.layout.axes import Mesh
from patchpipe.layout.patching import fewest_patches
from patchpipe.layout.split import sizes_of
from patchpipe.models import plan_for
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import predict
from patchpipe.stage.balance import split_blocks
from patchpipe.tracing.busy import Stretch, busy
from patchpipe.tracing.timeline import Timeline, read
from tests.support.ranks import Place, run_ranks

CARD, LINK = "l40", "pcie4"
HYBRID, BRANCHES, STREAMED, TWICE = "pipefusion ring", "cfg2 pipefusion", "streamed pipefusion", "warm-up 2 pipefusion"
# Really run; others are the same in every step and run one.
STEPS = {"pipefusion": 6, HYBRID: 6, BRANCHES: 6, STREAMED: 8, TWICE: 7, "distrifusion": 8}
# Steps after which all are alike: DistriFusion's sends pile up first, and drafts are of the first steps.
ALIKE = {"pipefusion": 2, HYBRID: 2, BRANCHES: 2, STREAMED: 5, TWICE: 3, "distrifusion": 5}
# Seconds that a step is dilated to, so that the host's own part stays small: the more of them, the more often ranks
# wait for each other, since all of them then want the two cores at once.
PERIOD = {
    "pipefusion": 1.0, HYBRID: 4.0, BRANCHES: 1.5, STREAMED: 1.0, TWICE: 1.0, "distrifusion": 1.5, "ring": 6.0,
    "ulysses2 ring": 12.0,
}  # fmt: skip
OTHER_PERIOD = 5.0
PATCHES = (8, 9, 10, 11, 12, 14, 16, 20, 24)
TIMEOUT = 240.0


@dataclass(frozen=True)
class Run:
    """One layout on one workload.

    Attributes:
        name: The layout.
        model: One of ``MODELS``.
        pixels: Height and width.
        options: Of the ``ParallelConfig``.
        contended: Whether an exchange over PCIe degrades as published runs show, or gets what the sockets carry.
        dilation: Seconds here for one on the card.
        steps: Steps that are run.
        predicted: Seconds the planner predicts for all steps.
    """

    name: str
    model: str
    pixels: int
    options: dict[str, Any] = field(default_factory=dict)
    contended: bool = True
    dilation: float = 1.0
    steps: int = 1
    predicted: float = 0.0

    @property
    def kind(self) -> str:
        """The layout's name without its last degree, or the methods where PipeFusion is one."""
        name = self.name.rstrip("0123456789")
        return HYBRID if name.startswith("pipefusion") and " " in name else name

    @property
    def config(self) -> ParallelConfig:
        """The layout."""
        return ParallelConfig(**{**AS_MEASURED, **self.options}, timeout=TIMEOUT)

    @property
    def profile(self) -> Profile:
        """The card, which takes what one is published to take, and its link; the host is the real one."""
        profile = Profile.named(CARD, LINK)
        profile = replace(profile, device=replace(profile.device, host=0.0))
        if not self.contended:
            profile = replace(profile, link=replace(profile.link, contention=0.0))
        return MODELS[self.model].calibrated(self.pixels, profile)

    @property
    def batch(self) -> int:
        """Entries of a call's batch that a rank runs."""
        return Layout(MODELS[self.model].workload(self.pixels), self.config, self.profile).batch

    def planned(self) -> Run:
        """With the dilation that makes a step last long enough here, and what the planner says of it."""
        model, options = MODELS[self.model], dict(self.options)
        workload = model.workload(self.pixels)
        stages = Layout(workload, self.config, self.profile).stages
        if len(stages) > 1 and len(set(workload.blocks)) > 1:  # the tiny model does not show what they cost
            options["stage_blocks"] = sizes_of(stages)
            options.pop("share_blocks", None)
        found = predict(workload, ParallelConfig(**{**AS_MEASURED, **options}), self.profile)
        steps = max(STEPS.get(self.kind, 1), model.fewest)
        period = PERIOD.get(self.kind, OTHER_PERIOD) / (1 if self.kind in STEPS else steps)
        dilation = max(1.0, round(period / found.period, 1))
        return replace(self, options=options, dilation=dilation, steps=steps, predicted=found.seconds)


def runs_of(model: str, pixels: int, ranks: int) -> list[Run]:
    """PipeFusion at the planner's number of patches and at more, half as deep beside Ring, and every other method."""
    new = partial(Run, model=model, pixels=pixels)
    deep = {"pipefusion": ranks}
    best = best_cut(new, deep)
    found = [new(f"pipefusion{ranks}", options=one) for one in (best, {**best, "patches": ranks * 3 // 2})]
    if ranks >= 8:
        half = {"pipefusion": ranks // 2, "ring": 2}
        found += [new(f"pipefusion{ranks // 2} ring2", options=best_cut(new, half))]
    found += [new(f"ulysses{min(ranks, 8)}" + (f" ring{ranks // 8}" if ranks > 8 else ""), options=_shared(ranks, 8))]
    found += [new(f"ulysses{u} ring{ranks // u}", options=_shared(ranks, u)) for u in (4, 2) if ranks > u]
    found += [new(f"ring{ranks}", options={"ring": ranks})]
    found += [replace(run, contended=False) for run in found if run.config.ulysses > 2]
    found += [new(f"distrifusion{ranks}", options={"distrifusion": ranks})]
    found += [new(f"tensor{ranks}", options={"tensor": ranks})] if ranks <= 8 else []
    found += [new(f"streamed pipefusion{ranks}", options=best_cut(new, {**deep, "warmup": "streamed"}))]
    found += _guided(new, ranks, best) if new("", options=deep).batch % 2 == 0 and ranks == 8 else []
    return [run.planned() for run in found]


def _guided(new: Callable[..., Run], ranks: int, best: dict[str, Any]) -> list[Run]:
    """A branch of guidance for each half of the cards, and the two synchronous steps that a forecast takes."""
    half = ranks // 2
    return [
        new(f"cfg2 pipefusion{half}", options=best_cut(new, {"cfg": 2, "pipefusion": half})),
        new(f"cfg2 ring{half}", options={"cfg": 2, "ring": half}),
        new(f"cfg2 ulysses{half}", options={"cfg": 2, "ulysses": half}),
        new(f"warm-up 2 pipefusion{ranks}", options={**best, "warmup": 2}),
    ]


def _shared(ranks: int, ulysses: int) -> dict[str, Any]:
    ulysses = min(ulysses, ranks)
    return {"ulysses": ulysses, "ring": ranks // ulysses}


def best_cut(new: Callable[..., Run], options: dict[str, Any]) -> dict[str, Any]:
    """The options with the planner's best number of patches, of whole batches or of their halves."""
    stages, even = options["pipefusion"], new("", options=options).batch % 2 == 0
    tried = [
        {**options, "patches": count, **how}
        for halves, how in _ways(even, shares=options.get("warmup") is None)
        for count in {*PATCHES, *range(fewest_patches(stages, halves), stages + 3)}
        if count >= fewest_patches(stages, halves)
    ]
    return min(tried, key=lambda one: new("", options=one).planned().predicted)


def _ways(even: bool, *, shares: bool) -> list[tuple[int, dict[str, bool]]]:
    """How a batch may go through the stages: in one or in halves, whole blocks or shared ones."""
    whole = {"split_batch": False, "share_blocks": False}
    halves = [(2, {"split_batch": True})] if even else []
    shared = [(1, {**whole, "share_blocks": True})] if shares else []
    return [(1, whole), *shared, *halves]


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "flux",
    pixels: Annotated[int, typer.Option(help="Height and width.")] = 1024,
    ranks: Annotated[int, typer.Option(help="Cards.")] = 8,
    only: Annotated[str, typer.Option(help="Only layouts whose name begins like this.")] = "",
    trace: Annotated[Path | None, typer.Option(help="Keep the trace of the last PipeFusion run here.")] = None,
    write: Annotated[bool, typer.Option(help="Write bench/results.")] = True,
) -> None:
    """Emulates every method; needs root."""
    runs = [run for run in runs_of(model, pixels, ranks) if run.name.startswith(only)]
    with tempfile.TemporaryDirectory() as folder, Hosts(ranks):
        found = run_ranks(ranks, measure_all, runs, folder, timeout=1200)
        rows = []
        for index, run in enumerate(runs):
            file = Path(folder) / f"{index}.json"
            timeline = read(file) if file.exists() else None
            rows.append(summary(run, [rank[index] for rank in found], timeline))
            if trace and timeline:
                trace.write_text(file.read_text())
    show(f"{model} {pixels} px, {ranks} × {CARD} over {LINK}", rows)
    if write:
        command = f"python -m bench.emulated --model {model} --pixels {pixels} --ranks {ranks}"
        about = {"model": model, "pixels": pixels, "ranks": ranks, "card": CARD, "link": LINK}
        about["one"] = MODELS[model].seconds.get(pixels)
        name = f"emulated-{model}-{pixels}-{ranks}"
        save(name, command, {**about, "rows": merged((load(name) or {"rows": []})["rows"], rows) if only else rows})


# -- on each rank --------------------------------------------------------------------------------


def measure_all(place: Place, runs: list[Run], folder: str) -> list[dict[str, Any]]:
    """Every run in turn, in this process."""
    torch.set_num_threads(1)
    enter_host(place.rank)
    return [measure(place, run, f"{folder}/{index}.json") for index, run in enumerate(runs)]


def measure(place: Place, run: Run, file: str) -> dict[str, Any]:
    """One request, and when its steps ended on this rank.

    Returns:
        ``ended``, and ``marks`` at the beginning and after each step: the moment, the host's own seconds, the card's.
    """
    model, device = MODELS[run.model], EmulatedDevice(run.dilation)
    config = run.config
    pipe, call = model.pipeline(run.pixels, run.steps)
    costs = Costs(model.workload(run.pixels), run.profile, config.tensor)
    plan, stage = plan_for(pipe.transformer), Mesh(config.mesh_shape, place.rank).at("pipe")
    emulate(pipe.transformer, plan, costs, device, split_blocks(pipe.transformer, plan, config)[stage])
    shape_link(shares_of(run.profile.link, config, place.rank), model.scale() / run.dilation)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    marks: list[tuple[float, float, float]] = []
    step = pipe.scheduler.step

    def marked(*args: Any, **kwargs: Any) -> Any:
        marks.append((time.perf_counter(), device.host_seconds, device.worked))
        return step(*args, **kwargs)

    pipe.scheduler.step = marked
    meet(place, f"{file}/begin")
    used = time.process_time()
    with noting_waits(device):
        if config.pipefusion > 1:
            with pipe.patchpipe.tracing(file):
                pipe(**call, generator=torch.Generator().manual_seed(0))
        else:
            pipe(**call, generator=torch.Generator().manual_seed(0))
    ended = time.perf_counter()
    figures = {
        "ended": ended, "marks": [(*(device.started or (0.0, 0.0)), 0.0), *marks], "used": time.process_time() - used,
        "patches": pipe.patchpipe.last.patches, "sent": pipe.patchpipe.last.sent_bytes,
    }  # fmt: skip
    meet(place, f"{file}/end")
    patchpipe.restore(pipe)
    return figures


# -- figures -------------------------------------------------------------------------------------


def extrapolated(total: float, period: float, done: int, wanted: int) -> float:
    """Seconds of ``wanted`` steps, of which ``done`` were run in ``total`` seconds and further ones take a period."""
    return total + (wanted - done) * period


def summary(run: Run, ranks: list[dict[str, Any]], timeline: Timeline | None) -> dict[str, Any]:
    """A run's figures in the card's own, undilated seconds; ``host`` is in real ones."""
    first, last, dilation = ranks[0], ranks[-1], run.dilation
    begin = ALIKE.get(run.kind, 0)
    count = run.steps - begin
    wall = first["ended"] - first["marks"][0][0]
    period = (last["marks"][-1][0] - last["marks"][begin][0]) / count  # the last stage is past the fill by then
    steps = MODELS[run.model].steps
    seconds = extrapolated(wall, period, run.steps, steps) / dilation
    patches = first["patches"] if run.config.pipefusion > 1 else 1
    host = [(rank["marks"][-1][1] - rank["marks"][begin][1]) / count / patches for rank in ranks]
    card = [(rank["marks"][-1][2] - rank["marks"][begin][2]) / count / period for rank in ranks]
    return {
        **asdict(run), "patches": patches, "seconds": seconds, "period": period / dilation,
        "unhidden": seconds + steps * patches * max(host), "host": host, "card": card,
        "cores": sum(rank["used"] for rank in ranks) / wall,
        "busy": [one.chosen for one in busy(timeline, full(timeline))] if timeline else None,
        "sent": [rank["sent"] for rank in ranks],
    }  # fmt: skip


def full(timeline: Timeline) -> Stretch:
    """From when every stage is past the first streamed step to when the first one is done."""
    starts, stops = [], []
    for track in timeline.tracks:
        own = [event for event in track.events if event.kind == "compute" and event.where is not None]
        streamed = [event for event in own if event.where is not None and event.where.step > 1]
        starts.append(min(event.start_ns for event in streamed))
        stops.append(max(event.end_ns for event in own))
    return max(starts), min(stops)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which some were measured anew: those take the place of the old ones."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["name"], row["patches"], row["contended"]

    again = {key(row): row for row in new}
    known = {key(row) for row in old}
    return [again.get(key(row), row) for row in old] + [row for row in new if key(row) not in known]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table for the terminal."""
    table = Table("layout", "M", "D", "seconds", "planner", "unhidden", "busy %", "card %", "own µs/patch", "cores")
    for row in rows:
        busy_of = "" if not row["busy"] else " ".join(f"{share:.1%}"[:-1] for share in row["busy"])
        host = [seconds * 1e6 for seconds in row["host"]]
        table.add_row(
            row["name"] + ("" if row["contended"] else " *"), str(row["patches"]), f"{row['dilation']:.1f}",
            f"{row['seconds']:.2f}", f"{row['predicted']:.2f}", f"{row['unhidden']:.2f}", busy_of,
            f"{min(row['card']):.0%}-{max(row['card']):.0%}", f"{median(host):.0f} ≤{max(host):.0f}",
            f"{row['cores']:.2f}",
        )  # fmt: skip
    console = Console(width=150)
    console.print(f"{title}; * PCIe without contention")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
