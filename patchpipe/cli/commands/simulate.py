"""``patchpipe simulate``: how many deadlines policies meet, on up to thousands of devices, before any is rented."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.options import option
from patchpipe.files import check_new, write_text

if TYPE_CHECKING:
    from patchpipe.scheduling.policies import Policy
    from patchpipe.scheduling.simulator.arrivals import Bursts, Deadline
    from patchpipe.scheduling.simulator.measure import Figures, Mean, Waited
    from patchpipe.scheduling.simulator.paper import Bases
    from patchpipe.scheduling.simulator.sweep import Ground, Load

EPILOG = """
[bold]Examples[/]

  Pictures and clips on eight cards, as in the GENSERVE paper, compared with its figures:

  [green]patchpipe simulate[/] --paper

  Deadlines met against load, drawn:

  [green]patchpipe simulate[/] --loads 12,18,24,30,36 -o loads.png --json loads.json

  Bursts, more clips, and late requests refused at once:

  [green]patchpipe simulate[/] --bursts --clips 0.8 --admission --policies fcfs,balanced

  A fleet, and how long a decision takes in it:

  [green]patchpipe simulate[/] --devices 10000 --loads 30000 --requests 20000 --seeds 1 --policies balanced

  Your own models, costs and requests:

  [green]patchpipe simulate[/] --scenario mine.json --trace yesterday.csv --devices 16
"""
_LOAD, _MACHINE, _RUN = "Requests", "Devices and policies", "Runs and results"

Policies = Annotated[
    str | None,
    option(_MACHINE, "fcfs, sjf, srtf, edf, genserve, balanced. [dim]Default: all.[/]", "--policies", metavar="NAME,…"),
]
Devices = Annotated[int, option(_MACHINE, "Devices.", "--devices", default=True)]
GroupSize = Annotated[
    int, option(_MACHINE, "Devices of a group: a request runs within one, such as a node.", "--group", default=True)
]
Degree = Annotated[
    int, option(_MACHINE, "Devices of a clip under policies that do not choose them.", "--degree", default=True)
]
Admit = Annotated[
    bool,
    option(_MACHINE, "Refuse at once what would be late; it counts as missed.", "--admission"),
]
CostError = Annotated[
    float,
    option(_MACHINE, "Largest factor by which steps are longer or shorter than expected.", "--error", default=True),
]
ScenarioFile = Annotated[
    Path | None,
    option(
        _LOAD, "Models, costs and shares, as JSON. [dim]Default: those of --paper.[/]", "--scenario", metavar="FILE"
    ),
]
TraceFile = Annotated[
    Path | None,
    option(_LOAD, "CSV of requests: arrival, model, width, height, frames, steps.", "--trace", metavar="FILE"),
]
Loads = Annotated[str, option(_LOAD, "Requests a minute.", "--loads", metavar="N,…", default=True)]
Count = Annotated[int, option(_LOAD, "Requests of a run.", "--requests", default=True)]
Clips = Annotated[float, option(_LOAD, "Share of the requests that are clips.", "--clips", default=True)]
InBursts = Annotated[bool, option(_LOAD, "Arrivals in bursts, four times as dense as the calm.", "--bursts")]
Scale = Annotated[float, option(_LOAD, "Factor on all deadlines.", "--scale", default=True)]
BasesGiven = Annotated[
    str | None,
    option(
        _LOAD,
        "Deadlines of pictures and of clips, as multiples of their seconds on one device. "
        "[dim]Default: fitted to the paper's FCFS; 3,3 with --scenario.[/]",
        "--bases",
        metavar="P,C",
    ),
]
Paper = Annotated[bool, option(_RUN, "Compare with the paper's figures, also for its policy RASP.", "--paper")]
Seeds = Annotated[int, option(_RUN, "Number of runs, each with another random seed.", "--seeds", default=True)]
Out = Annotated[Path | None, option(_RUN, "Drawing of deadlines met against load.", "-o", "--output", metavar="FILE")]
Report = Annotated[Path | None, option(_RUN, "Write all figures; - for standard output.", "--json", metavar="FILE")]


def simulate(
    policies: Policies = None,
    devices: Devices = 8,
    group: GroupSize = 8,
    degree: Degree = 1,
    admission: Admit = False,
    error: CostError = 1.0,
    scenario: ScenarioFile = None,
    trace: TraceFile = None,
    loads: Loads = "24",
    requests: Count = 100,
    clips: Clips = 0.5,
    bursts: InBursts = False,
    scale: Scale = 1.0,
    bases: BasesGiven = None,
    paper: Paper = False,
    seeds: Seeds = 20,
    out: Out = None,
    json_file: Report = None,
    force: options.Force = False,
    _debug: options.Debug = False,
) -> None:
    """Simulate the service: deadlines met by each scheduling policy, by load, on any number of devices."""
    if seeds < 1 or requests < 1:
        raise ValueError(f"--seeds {seeds} and --requests {requests} must be 1 or more")
    for path in (out, json_file):
        if path is not None and path != Path("-"):
            check_new(path, force)
    if paper and (scenario or trace):
        raise ValueError("--paper has requests of its own: leave out --scenario and --trace")
    console = Console(highlight=False, stderr=json_file == Path("-"))
    ask = _Ask(_numbers("--loads", loads), requests, seeds, degree, paper)
    chosen = _policies(policies, degree, paper)
    with _progress(console) as display:
        bar = display.add_task("fitting", total=None)
        ground, load, fitted = _set_up(
            scenario, trace, (devices, group), error, admission, ask, clips, bursts, scale, bases
        )
        total = len(load.trace or range(requests)) * len(ask.loads) * len(chosen) * seeds
        display.update(bar, total=total, description="simulating")
        found = ask.sweep(chosen, load, ground, lambda count: display.advance(bar, count))
    _show(console, found, fitted, paper)
    told = {"devices": devices, "seeds": seeds, "bases": fitted and [fitted.picture, fitted.clip], "scale": scale}
    text = json.dumps({**told, "figures": [one.as_dict() for one in found]}, indent=1) + "\n"
    if json_file == Path("-"):
        print(text, end="")
    elif json_file is not None:
        write_text(text, json_file)
        console.print(f"[green]→[/] {escape(str(json_file))}", soft_wrap=True)
    if out is not None:
        from patchpipe.scheduling.simulator.draw import draw

        draw(found, f"{devices} devices, {seeds} runs of {requests} requests", out)
        console.print(f"[green]→[/] {escape(str(out))}", soft_wrap=True)


@dataclass(frozen=True)
class _Ask:
    """What is to be run."""

    loads: list[float]
    requests: int
    seeds: int
    degree: int
    paper: bool

    def sweep(self, chosen: list[tuple[str, Policy]], load: Load, ground: Ground, on_done: Any) -> list[Figures]:
        from patchpipe.scheduling.simulator.sweep import sweep

        seeds = 1 if load.trace and ground.error == 1 else self.seeds
        return list(sweep(chosen, self.loads[:1] if load.trace else self.loads, load, ground, seeds, on_done))


def _policies(names: str | None, degree: int, paper: bool) -> list[tuple[str, Policy]]:
    from patchpipe.scheduling.policies import POLICIES, Ordered, policy_named
    from patchpipe.scheduling.simulator import paper as published

    wanted = list(POLICIES) if names is None else [name.strip() for name in names.split(",")]
    found = [(name, policy_named(name, degree)) for name in wanted]
    if paper and names is None:
        found.insert(3, ("rasp", Ordered("fcfs", degrees=published.RASP)))
    return found


def _set_up(
    scenario: Path | None, trace: Path | None, size: tuple[int, int], error: float, admission: bool, ask: _Ask,
    clips: float, bursts: bool, scale: float, bases: str | None,
) -> tuple[Ground, Load, Bases]:  # fmt: skip
    from patchpipe.scheduling.simulator import paper
    from patchpipe.scheduling.simulator.arrivals import Bursts, read_trace
    from patchpipe.scheduling.simulator.scenario import read_scenario
    from patchpipe.scheduling.simulator.simulate import Fleet
    from patchpipe.scheduling.simulator.sweep import Ground, Load

    costs, asks = (paper.costs(), paper.asks(clips)) if scenario is None else read_scenario(scenario)
    ground = Ground(Fleet(*size), costs, error, admission)
    fitted = _bases(bases, scenario, ask)
    deadline: Deadline = paper.deadlines(costs, fitted, scale)
    shape: Bursts | None = Bursts() if bursts else None
    traced = read_trace(trace, deadline) if trace is not None else ()
    return ground, Load(asks, deadline, ask.requests, shape, traced), fitted


def _bases(text: str | None, scenario: Path | None, ask: _Ask) -> Bases:
    from patchpipe.scheduling.simulator import paper

    if text is not None:
        numbers = _numbers("--bases", text)
        if len(numbers) != 2:
            raise ValueError(f"--bases {text} must be two numbers, of pictures and of clips, such as 2,3")
        return paper.Bases(*numbers)
    return (
        paper.Bases(3.0, 3.0)
        if scenario is not None
        else paper.fitted(ask.degree, max(20, ask.seeds if ask.paper else 0))
    )


def _numbers(name: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise ValueError(f"{name} {text} must be numbers above 0, with commas between them")
    return found


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} requests"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


# -- what is shown -------------------------------------------------------------------------------


def _show(console: Console, found: list[Figures], fitted: Bases, paper: bool) -> None:
    several = len({one.per_minute for one in found}) > 1
    title = f"Deadlines of pictures {fitted.picture:.2f} and clips {fitted.clip:.2f} times their seconds on one device"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("policy")
    heads = ["a minute"] if several else []
    heads += [
        "met, %",
        "pictures",
        "clips",
        *(["paper"] if paper else []),
        "picture P90",
        "clip P50 / P99",
        "busy",
        "decision",
    ]
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        table.add_row(*_cells(one, several, paper), style="bold green" if one.policy == "balanced" else "")
    needed = Measurement.get(console, console.options.update(width=200), table).maximum
    console.width = max(console.width, needed)  # rather wrapped than cut off
    console.print(table)
    refused = {one.policy: one for one in found if one.refused > 0}
    for name, one in refused.items():
        console.print(f"{name}: {one.refused:.0%} refused; of what was accepted {one.kept:.0%} in time")
    console.print("[dim]met: mean over runs ± half of its 95 % interval; decision: mean and largest milliseconds[/]")


def _cells(one: Figures, several: bool, paper: bool) -> list[str]:
    picture, clip = one.waited["picture"], one.waited["clip"]
    return [
        one.policy,
        *([f"{one.per_minute:g}"] if several else []),
        *(_percent(one.met[name]) for name in ("all", "picture", "clip")),
        *([_published(one.policy)] if paper else []),
        _seconds(picture, "p90"),
        f"{_seconds(clip, 'median')} / {_seconds(clip, 'p99')}",
        f"{one.busy:.0%}",
        f"{one.decision[0]:.2f} · {one.decision[2]:.1f} ms",
    ]


def _percent(mean: Mean) -> str:
    return "–" if mean.value != mean.value else f"{100 * mean.value:.0f} ± {100 * mean.half:.0f}"


def _seconds(waited: Waited, name: str) -> str:
    value = getattr(waited, name)
    return "–" if value != value else f"{value:.1f} s"


def _published(policy: str) -> str:
    from patchpipe.scheduling.simulator.paper import PUBLISHED

    row = PUBLISHED.get(policy)
    return "–" if row is None else " / ".join(f"{100 * part:.0f}" for part in row)
