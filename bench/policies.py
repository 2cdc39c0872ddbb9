"""Scheduling policies on real workers: pictures and clips in the service, beside what the simulator predicts for them.

python -m bench.policies
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.rounds import load, save
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.engine import Elastic, Engine
from patchpipe.engine.processes import warm
from patchpipe.scheduling import POLICIES, Costs, Request, Scheduler, Shape, TableCosts, policy_named
from patchpipe.scheduling.simulator.arrivals import Ask, arrivals, requests
from patchpipe.scheduling.simulator.simulate import Fleet, simulate
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.steer.costs import SWITCHES, LiveCosts, Machine
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Event, Painted, Work
from tests import tiny

RANKS = 2
PATIENCE = 1200.0
CALIBRATION = 6  # steps
BLOCKS = 16  # of the tiny Wan, so that its steps are not too short beside all else
TOGETHER = 4  # pictures in flight together at most
CLIP = {"height": 96, "width": 96, "num_frames": 33, "max_sequence_length": 8, "guidance_scale": 3.0}
PICTURE = {"height": 128, "width": 128}


@dataclass(frozen=True)
class Kind:
    """One kind of request.

    Attributes:
        shape: Its shape.
        call: The pipeline's arguments.
        steps: Its steps.
        seconds: Of a step, by number of workers, on workers that do nothing else.
        ends: Seconds beside the steps.
    """

    shape: Shape
    call: dict[str, Any]
    steps: int
    seconds: dict[int, float]
    ends: float

    @property
    def alone(self) -> float:
        """Seconds of it on one worker."""
        return self.steps * self.seconds[1] + self.ends


class Noted:
    """What the service measured in a run: all of it, where the service itself keeps averages of what was last.

    Args:
        costs: Those of the service, which are told as before.
        shapes: What will be asked for.
    """

    def __init__(self, costs: LiveCosts, shapes: Sequence[Shape]) -> None:
        self.first = {(shape, degree): costs.step(shape, 1, degree) for shape in shapes for degree in (1, RANKS)}
        self.steps: dict[tuple[Shape, int, int], list[float]] = {}
        self.starts: dict[Shape, list[float]] = {}
        self.ends: dict[Shape, list[float]] = {}
        self.switches: dict[str, list[float]] = {}
        for name in ("measured", "started", "ended", "switched"):
            setattr(costs, name, self._before(getattr(costs, name), getattr(self, f"_{name}")))

    def _before(self, then: Callable[..., None], first: Callable[..., None]) -> Callable[..., None]:
        def both(*args: Any) -> None:
            first(*args)
            then(*args)

        return both

    def _measured(self, shape: Shape, batch: int, degree: int, seconds: float) -> None:
        self.steps.setdefault((shape, batch, degree), []).append(seconds)

    def _started(self, shape: Shape, seconds: float) -> None:
        self.starts.setdefault(shape, []).append(seconds)

    def _ended(self, shape: Shape, seconds: float) -> None:
        self.ends.setdefault(shape, []).append(seconds)

    def _switched(self, shape: Shape, switch: str, seconds: float) -> None:
        self.switches.setdefault(switch, []).append(seconds)

    def told(self) -> dict[str, Any]:
        """Its means, and how many of each."""
        return {
            "steps": [
                {"shape": str(shape), "batch": batch, "degree": degree, **_mean(seconds)}
                for (shape, batch, degree), seconds in sorted(self.steps.items(), key=str)
            ],
            "starts": {str(shape): _mean(seconds) for shape, seconds in self.starts.items()},
            "ends": {str(shape): _mean(seconds) for shape, seconds in self.ends.items()},
            "switches": {name: _mean(seconds) for name, seconds in sorted(self.switches.items())},
        }

    def costs(self, believed: TableCosts) -> TableCosts:
        """What all took on average; as believed where nothing was measured."""
        steps = {key: fmean(seconds) for key, seconds in self.steps.items()}
        shapes = {key[0]: seconds for key, seconds in steps.items() if key[1:] == (1, 1)}
        factors = {shape: seconds / believed.step(shape, 1, 1) for shape, seconds in shapes.items()}
        rest = {key: factors.get(key[0], 1.0) * seconds for key, seconds in believed.steps.items()}
        switches = {name: max(0.0, fmean(seconds)) for name, seconds in self.switches.items()}
        return TableCosts(
            rest | steps,
            pause=switches.get("pause", believed.pause),
            resume=switches.get("resume", believed.resume),
            change=switches.get("change", believed.change),
            decode={**believed.decode, **{shape: fmean(seconds) for shape, seconds in self.ends.items()}},
            encode={shape: max(0.0, fmean(seconds)) for shape, seconds in self.starts.items()},
        )


def _mean(seconds: list[float]) -> dict[str, float]:
    return {"seconds": fmean(seconds), "count": len(seconds)}


@dataclass(frozen=True)
class Load:
    """What is asked of every policy.

    Attributes:
        minutes: How long requests come.
        busy: Share of the workers' time that they would take, each on one worker.
        clips: Share of the requests that are clips.
        scale: Deadlines, times the seconds alone on one worker.
        seed: Of chance.
    """

    minutes: float
    busy: float
    clips: float
    scale: float
    seed: int

    def draw(self, kinds: Sequence[Kind]) -> list[Request]:
        """The requests."""
        chance = random.Random(self.seed)
        shares = {"picture": 1 - self.clips, "clip": self.clips}
        asks = [Ask(kind.shape, kind.steps, shares[kind.shape.kind]) for kind in kinds]
        seconds = sum(shares[kind.shape.kind] * kind.alone for kind in kinds)
        per_minute = 60 * RANKS * self.busy / seconds
        by_shape = {kind.shape: kind for kind in kinds}
        times = arrivals(per_minute, round(per_minute * self.minutes), chance)
        return requests(asks, times, lambda shape, steps: self.scale * by_shape[shape].alone, chance)


def main(
    minutes: Annotated[float, typer.Option(help="Minutes of requests for each policy.")] = 3.0,
    busy: Annotated[float, typer.Option(help="Share of the workers' time that the requests take.")] = 0.85,
    clips: Annotated[float, typer.Option(help="Share of clips.")] = 0.3,
    scale: Annotated[float, typer.Option(help="Deadlines, times the seconds alone on one worker.")] = 2.0,
    picture_seconds: Annotated[float, typer.Option(help="Seconds a picture is to take on one worker.")] = 1.5,
    clip_seconds: Annotated[float, typer.Option(help="Seconds a clip is to take on one worker.")] = 12.0,
    seed: Annotated[int, typer.Option(help="Of chance.")] = 1,
    policies: Annotated[str, typer.Option(help="Which, in order.")] = ",".join(POLICIES),
) -> None:
    """Measures, prints a table and writes bench/results, beside runs with other options."""
    console, asked_for = Console(), Load(minutes, busy, clips, scale, seed)
    command = (
        f"python -m bench.policies --minutes {minutes:g} --busy {busy:g} --clips {clips:g} --scale {scale:g} "
        f"--picture-seconds {picture_seconds:g} --clip-seconds {clip_seconds:g} --seed {seed} --policies {policies}"
    )
    earlier = [run for run in (load("policies") or {}).get("runs", ()) if run["command"] != command]
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, warm():
        wan = tiny.save("wan", Path(folder) / "wan", blocks=BLOCKS)
        (wan / "call.json").write_text(json.dumps({**CLIP, "output_type": "np"}))
        sources = {"pictures": str(MODEL_DIR), "clips": str(wan)}
        kinds = calibrated(sources, {"pictures": picture_seconds, "clips": clip_seconds})
        asked = asked_for.draw(kinds)
        console.print(f"{len(asked)} requests a policy; {[(str(k.shape), k.steps, k.seconds, k.ends) for k in kinds]}")
        for name in policies.split(","):
            row, noted = measured(name, sources, kinds, asked, Path(folder) / name)
            row["predicted"] = predicted(name, believed(kinds), asked)
            row["predicted_as_it_ran"] = predicted(name, noted.costs(believed(kinds)), asked, noted)
            rows[name] = row
            console.print(name, rows[name])
            told = [{"shape": str(k.shape), "steps": k.steps, "step_seconds": k.seconds, "ends": k.ends} for k in kinds]
            run = {"command": command, "requests": len(asked), "kinds": told, "policies": rows}
            save("policies", command, {"runs": [*earlier, run]})  # as far as it came


# -- what steps take -------------------------------------------------------------------------------


def calibrated(sources: dict[str, str], wanted: dict[str, float]) -> list[Kind]:
    """Measures steps of each kind by number of workers, and chooses how many steps a request has."""
    found = []
    for name, own in (("pictures", PICTURE), ("clips", CLIP)):
        call = {**call_defaults(sources[name]), **own, "prompt": "a red heart, flat style"}
        shape = Shape(name, call["width"], call["height"], call.get("num_frames", 1))
        with Engine(sources[name], Elastic(RANKS), devices="cpu", threads=1) as engine:
            figures = {degree: timed(engine, call, tuple(range(degree))) for degree in (2, 1)}
        seconds = {degree: step for degree, (step, _) in sorted(figures.items())}
        steps = max(4, round((wanted[name] - figures[1][1]) / seconds[1]))
        found.append(Kind(shape, call, steps, seconds, figures[1][1]))
    return found


def timed(engine: Engine, call: dict[str, Any], ranks: tuple[int, ...]) -> tuple[float, float]:
    """Median seconds of a step, and those beside the steps."""
    figures = []
    for _ in range(2):
        times: list[float] = []
        began = time.perf_counter()
        given = {**call, "num_inference_steps": CALIBRATION, "seed": 0, "ranks": ranks}
        engine.submit(**given, on_progress=lambda _, times=times: times.append(time.perf_counter())).result(PATIENCE)
        step = median(later - sooner for sooner, later in itertools.pairwise(times))
        figures.append((step, max(0.0, time.perf_counter() - began - CALIBRATION * step)))
    return median(step for step, _ in figures), median(ends for _, ends in figures)


# -- a policy on real workers ------------------------------------------------------------------------


def measured(
    policy: str, sources: dict[str, str], kinds: list[Kind], asked: list[Request], folder: Path
) -> tuple[dict[str, Any], Noted]:
    """Serves the requests; what became of them, and what the service measured."""
    made: list[Service] = []
    models = [
        Model(
            name,
            source,
            lambda source=source: Engine(source, Elastic(RANKS), devices="cpu", threads=1),
            lambda: made[0].model_changed(),
        )
        for name, source in sources.items()
    ]
    for model in models:
        model.start()
    folder.mkdir()
    settings = Settings(folder=folder, policy=policy, limits=Limits(waiting=1000), in_flight=TOGETHER)
    made.append(Service(settings, models))
    try:
        noted = Noted(made[0].painters.costs, [kind.shape for kind in kinds])  # type: ignore[attr-defined]
        return {**served(made[0], kinds, asked), **noted.told()}, noted
    finally:
        made[0].close()


def served(service: Service, kinds: list[Kind], asked: list[Request]) -> dict[str, Any]:
    """Submits each request when it is due to come, and waits for all."""
    ends: dict[str, tuple[float, bool]] = {}
    calls = {kind.shape: kind.call for kind in kinds}
    tickets = []
    began, load = time.monotonic(), os.getloadavg()[0]

    def listening(name: str) -> Any:
        def hear(event: Event) -> None:
            if isinstance(event, (Painted, Ended)):
                ends[name] = (time.monotonic() - began, isinstance(event, Painted))

        return hear

    for number, request in enumerate(asked):
        time.sleep(max(0.0, began + request.arrival - time.monotonic()))
        arguments = {**calls[request.shape], "num_inference_steps": request.steps}
        within = request.deadline - request.arrival
        work = Work(
            request.id, request.shape.model, request.kind, arguments, (number,), request.steps, deadline_s=within
        )
        tickets.append(service.submit(work, listening(request.id)))
    for ticket in tickets:
        ticket.wait(PATIENCE)
    threading.Event().wait(0.1)
    figures = service.metrics.registry
    return {
        "met": shares(asked, {name: end for name, (end, painted) in ends.items() if painted}),
        "seconds": time.monotonic() - began,
        "preemptions": total(figures, "patchpipe_preemptions_total"),
        "degree_changes": total(figures, "patchpipe_degree_changes_total"),
        "failed": sum(not painted for _, painted in ends.values()),
        "load_average": [load, os.getloadavg()[0]],
    }


def total(registry: Any, name: str) -> float:
    return sum(one.value for family in registry.collect() for one in family.samples if one.name == name)


def shares(asked: list[Request], ends: dict[str, float]) -> dict[str, float]:
    """Shares of deadlines met: of all, and by class."""
    found = {}
    for name in ("all", "picture", "clip"):
        own = [request for request in asked if name in ("all", request.kind)]
        found[name] = sum(ends.get(one.id, float("inf")) <= one.deadline for one in own) / max(1, len(own))
    return found


# -- the same in simulated time ------------------------------------------------------------------------


def believed(kinds: list[Kind]) -> TableCosts:
    """What is known before a run: what was timed, and the service's first beliefs about pauses."""
    steps = {
        (kind.shape, batch, degree): batch * seconds
        for kind in kinds
        for degree, seconds in kind.seconds.items()
        for batch in (range(1, TOGETHER + 1) if kind.shape.kind == "picture" else (1,))
    }
    decode = {kind.shape: kind.ends for kind in kinds}
    return TableCosts(steps, SWITCHES["pause"], SWITCHES["resume"], SWITCHES["change"], decode)


def predicted(policy: str, costs: TableCosts, asked: list[Request], noted: Noted | None = None) -> dict[str, Any]:
    """What the simulator makes of the same requests at these costs; they are learned where a run shows how it began."""
    known: Costs = costs
    if noted is not None:
        machine = Machine(RANKS, (1, RANKS), TOGETHER, elastic=True)
        known = LiveCosts(machine, lambda shape, degree: noted.first[shape, degree])
    found = simulate(asked, Fleet(RANKS, RANKS), Scheduler(policy_named(policy), known), costs)
    [counts] = found.counts
    met = shares(asked, {one.request.id: one.end for one in found.served if one.end is not None})
    return {**met, "pauses": counts.pauses, "changes": counts.changes, "moves": counts.moves}


if __name__ == "__main__":
    typer.run(main)
