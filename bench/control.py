"""How long a request takes to be paused, to go on, to be carried away and to change its degree, on this machine.

python -m bench.control
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter, sleep
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bench.rounds import save
from patchpipe import Engine, ParallelConfig
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.engine import Elastic, Progress, Ticket

PROMPT = "a red heart, flat style"
PATIENCE = 300.0


class Clock:
    """When things happened to one request."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.states: list[tuple[str, float]] = []

    def on_progress(self, _: Progress) -> None:
        self.steps.append(perf_counter())

    def on_state(self, ticket: Ticket) -> None:
        self.states.append((ticket.state, perf_counter()))

    def last(self, state: str) -> float:
        return next(when for what, when in reversed(self.states) if what == state)

    @property
    def step(self) -> float:
        """Median seconds of a step."""
        return median(later - sooner for sooner, later in zip(self.steps, self.steps[1:], strict=False))


def main(
    steps: Annotated[int, typer.Option(help="Steps of each request.")] = 40,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 256,
    rounds: Annotated[int, typer.Option(help="Times each is done.")] = 10,
) -> None:
    """Measures, prints a table and writes bench/results."""
    call = {**call_defaults(), "prompt": PROMPT, "height": size, "width": size, "num_inference_steps": steps, "seed": 0}
    found: dict[str, list[float]] = {}
    with Engine(MODEL_DIR, ParallelConfig(pipefusion=2), devices="cpu", threads=1) as engine:
        step = pausing(engine, call, rounds, found)
        carrying(engine, call, rounds, found)
    with Engine(MODEL_DIR, Elastic(2), devices="cpu", threads=1) as engine:
        moving(engine, call, rounds, found)
    table = Table("what", "median ms", "least", "most")
    for name, seconds in found.items():
        table.add_row(name, *(f"{1e3 * value:.1f}" for value in (median(seconds), min(seconds), max(seconds))))
    console = Console()
    console.print(f"bundled model, {size} pixels, 2 ranks of one thread; a step takes {1e3 * step:.1f} ms")
    console.print(table)
    command = f"python -m bench.control --steps {steps} --size {size} --rounds {rounds}"
    save("control", command, {"steps": steps, "size": size, "step_seconds": step, "seconds": found})


def pausing(engine: Engine, call: dict[str, Any], rounds: int, found: dict[str, list[float]]) -> float:
    """Pauses one request again and again; gives the seconds of a step."""
    clock = Clock()
    ticket = submit(engine, call, clock)
    for keep in ("device", "host", "nothing"):
        for _ in range(rounds):
            if ticket.over:
                ticket = submit(engine, call, clock)
            pause(ticket, clock, keep, found)
    ticket.cancel()
    ticket.wait_for(timeout=PATIENCE)
    return clock.step


def submit(engine: Engine, call: dict[str, Any], clock: Clock, **more: Any) -> Ticket:
    ticket = engine.submit(**call, on_progress=clock.on_progress, on_state=clock.on_state, **more)
    ticket.wait_for("running", timeout=PATIENCE)
    return ticket


def pause(ticket: Ticket, clock: Clock, keep: Any, found: dict[str, list[float]]) -> None:
    asked, before = perf_counter(), len(clock.steps)
    ticket.pause(keep)
    if ticket.wait_for("paused", timeout=PATIENCE) != "paused":
        return
    note(found, f"pause, keys kept: {keep} (from asking, in the midst of a step)", clock.last("paused") - asked)
    if len(clock.steps) > before:
        note(found, f"pause, keys kept: {keep} (from the end of the step)", clock.last("paused") - clock.steps[-1])
    asked = perf_counter()
    ticket.resume()
    ticket.wait_for("running", timeout=PATIENCE)
    note(found, f"resume, keys kept: {keep}", clock.last("running") - asked)


def carrying(engine: Engine, call: dict[str, Any], rounds: int, found: dict[str, list[float]]) -> None:
    """Saves paused requests, and goes on with what was saved."""
    clock = Clock()
    for _ in range(rounds):
        ticket = submit(engine, call, clock)
        ticket.pause()
        ticket.wait_for("paused", timeout=PATIENCE)
        began = perf_counter()
        checkpoint = ticket.checkpoint(PATIENCE)
        note(found, f"checkpoint of a paused request ({len(checkpoint.data) / 2**20:.1f} MiB)", perf_counter() - began)
        began = perf_counter()
        again = submit(engine, call, clock, checkpoint=checkpoint)
        note(found, "go on with a checkpoint, until its next step begins", clock.last("running") - began)
        again.cancel()
        again.wait_for(timeout=PATIENCE)


def moving(engine: Engine, call: dict[str, Any], rounds: int, found: dict[str, list[float]]) -> None:
    """Changes the degree of a request."""
    clock = Clock()
    for _ in range(rounds):
        ticket = submit(engine, call, clock, ranks=(0,))
        for name, ranks in (("1 to 2", (0, 1)), ("2 to 1", (1,))):
            done = len(clock.steps)
            wait_until(lambda done=done: len(clock.steps) > done)
            ticket.move(ranks)
            ticket.wait_for("moving", timeout=PATIENCE)
            saved = clock.last("moving")
            ticket.wait_for("running", timeout=PATIENCE)
            note(found, f"change of degree, {name} (from the end of the step)", clock.last("running") - clock.steps[-1])
            note(found, f"change of degree, {name} (of it on the new ranks)", clock.last("running") - saved)
        ticket.cancel()
        ticket.wait_for(timeout=PATIENCE)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = perf_counter() + PATIENCE
    while not true() and perf_counter() < deadline:
        sleep(0.0005)


def note(found: dict[str, list[float]], name: str, seconds: float) -> None:
    found.setdefault(name, []).append(seconds)


if __name__ == "__main__":
    typer.run(main)
