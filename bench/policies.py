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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.rounds import load, save
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.engine import Elastic, Engine
from patchpipe.engine.processes import warm
from patchpipe.scheduling import POLICIES, Request, Scheduler, Shape, TableCosts, policy_named
from patchpipe.scheduling.simulator.arrivals import Ask, arrivals, requests
from patchpipe.scheduling.simulator.simulate import Fleet, simulate
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Limits, Settings
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Ended, Event, Painted, Work
from tests import tiny

RANKS = 2
PATIENCE = 1200.0
CALIBRATION = 6  # steps
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
        wan = tiny.save("wan", Path(folder) / "wan")
        (wan / "call.json").write_text(json.dumps({**CLIP, "output_type": "np"}))
        sources = {"pictures": str(MODEL_DIR), "clips": str(wan)}
        kinds = calibrated(sources, {"pictures": picture_seconds, "clips": clip_seconds})
        asked = asked_for.draw(kinds)
        console.print(f"{len(asked)} requests a policy; {[(str(k.shape), k.steps, k.seconds, k.ends) for k in kinds]}")
        for name in policies.split(","):
            row = measured(name, sources, kinds, asked, Path(folder) / name)
            row["predicted"] = predicted(name, kinds, asked)
            row["predicted_as_it_ran"] = predicted(name, as_it_ran(kinds, row), asked)
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
) -> dict[str, Any]:
    """Serves the requests; what became of them."""
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
    made.append(Service(Settings(folder=folder, policy=policy, limits=Limits(waiting=1000)), models))
    try:
        return served(made[0], kinds, asked)
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
    costs = service._decider.costs
    learned = {str(kind.shape): {degree: costs.step(kind.shape, 1, degree) for degree in (1, 2)} for kind in kinds}
    return {
        "met": shares(asked, {name: end for name, (end, painted) in ends.items() if painted}),
        "seconds": time.monotonic() - began,
        "preemptions": total(figures, "patchpipe_preemptions_total"),
        "degree_changes": total(figures, "patchpipe_degree_changes_total"),
        "failed": sum(not painted for _, painted in ends.values()),
        "step_seconds": learned,
        "ends": {str(kind.shape): costs.ends(kind.shape, 1) for kind in kinds},
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


def as_it_ran(kinds: list[Kind], row: dict[str, Any]) -> list[Kind]:
    """The kinds with the seconds that the service had learned by the end of its run: other programs slow steps down."""
    steps, ends = row["step_seconds"], row["ends"]
    return [replace(kind, seconds=steps[str(kind.shape)], ends=ends[str(kind.shape)]) for kind in kinds]


def predicted(policy: str, kinds: list[Kind], asked: list[Request]) -> dict[str, float]:
    """What the simulator makes of the same requests, with these seconds of a step."""
    steps = {(kind.shape, 1, degree): seconds for kind in kinds for degree, seconds in kind.seconds.items()}
    costs = TableCosts(steps, pause=0.005, resume=0.02, change=0.2, decode={kind.shape: kind.ends for kind in kinds})
    found = simulate(asked, Fleet(RANKS, RANKS), Scheduler(policy_named(policy), costs))
    return shares(asked, {one.request.id: one.end for one in found.served if one.end is not None})


if __name__ == "__main__":
    typer.run(main)
