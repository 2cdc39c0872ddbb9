"""``patchpipe demo``: the bundled model in several ways, side by side, with what each took and how alike they are."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from patchpipe.cli import options, pictures
from patchpipe.cli.pictures import Tile
from patchpipe.cli.view import View, likeness
from patchpipe.config import PLAIN, AutoLayout, ParallelConfig
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.files import check_new, free_name

if TYPE_CHECKING:
    from PIL import Image

    from patchpipe.engine import Engine

EPILOG = """
[bold]Examples[/]

  [green]patchpipe demo[/]

  [green]patchpipe demo[/] "owl, flat style" --rounds 3 -o owl.png
"""
PROMPTS = ("red apple, 3d style", "cat face, twemoji style", "rainbow, noto style", "frog, 3d style")
DEFAULT_OUT = Path("demo.png")
BUSY = 0.5  # processes that want a core already, to a core
PAYS = (
    "PipeFusion pays where links are slow (PCIe, Ethernet) or the model is too large for one card: see "
    "`patchpipe plan --model flux.1-dev --devices 8 --device l40`"
)
Prompts = Annotated[list[str] | None, typer.Argument(help="What to paint. [dim]Default: four things it can.[/]")]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Sheet to write. [dim]Default: demo.png, or the next number.[/]"),
]
Rounds = Annotated[int, typer.Option(help="Timed runs of each picture in each way.")]


@dataclass(frozen=True)
class Way:
    """A way to paint, and what came of it.

    Attributes:
        name: For people.
        engine: It, running.
        told: Why it is there.
        seconds: Of every timed run.
        painted: The picture of each prompt.
    """

    name: str
    engine: Engine
    told: str
    seconds: list[float] = field(default_factory=list)
    painted: list[Image.Image] = field(default_factory=list)

    @property
    def typical(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def likeness(self, reference: Way) -> str:
        """Of the picture that differs most."""
        pairs = zip(reference.painted, self.painted, strict=True)
        return likeness(min(pictures.psnr(one, other) for one, other in pairs))


def demo(
    prompts: Prompts = None,
    out: Out = None,
    force: options.Force = False,
    rounds: Rounds = 2,
    devices: options.Devices = None,
    _debug: options.Debug = False,
) -> None:
    """Paint with the bundled model on one device and on all, side by side, with seconds and likeness."""
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} must be 1 or more")
    target = pictures.check_target(out or (DEFAULT_OUT if force else free_name(DEFAULT_OUT)))
    check_new(target, force)
    view = View()
    _tell_load(view)
    with _ways(view, options.read_devices(devices)) as ways:
        _paint(view, ways, tuple(prompts or PROMPTS), rounds)
        _show(view, ways)
    pictures.write_picture(_sheet(ways, tuple(prompts or PROMPTS)), target)
    view.console.print(f"[green]→[/] {target}", soft_wrap=True)


def _tell_load(view: View) -> None:
    waiting, cores = os.getloadavg()[0], os.cpu_count() or 1
    if waiting > BUSY * cores:
        view.console.print(
            f"[yellow]note:[/] this machine is busy ({waiting:.1f} processes want its {cores} cores): times will be "
            f"longer than they need be, most of all those of several processes"
        )


@contextmanager
def _ways(view: View, devices: str | list[str] | None) -> Iterator[list[Way]]:
    """Plain diffusers, the planner's layout and PipeFusion, all started."""
    from patchpipe.engine import Engine
    from patchpipe.engine.choosing import devices_for

    everything = list(devices_for(AutoLayout(), devices, None))
    cores = max(1, len(everything)) if everything[0] == "cpu" else 1
    with ExitStack() as running:

        def start(name: str, config: Any, places: list[str], threads: int | None, told: str) -> Way:
            with view.waiting(f"starting {name}"):
                engine = running.enter_context(Engine(MODEL_DIR, config, places, threads=threads))
            return Way(name, engine, told or engine.layout_reason or "")

        ways = [start("plain diffusers", PLAIN, everything[:1], 1 if cores > 1 else None, "the measure")]
        if len(everything) == 1:
            view.console.print("There is one device: nothing to spread over.")
        else:
            if cores > 1:
                ways.append(start(f"plain, {cores} threads", PLAIN, everything[:1], cores, "threads alone"))
            auto = AutoLayout(request=call_defaults(), plain=False)
            best = start("the planner's choice", auto, everything, 1 if cores > 1 else None, "")
            assert best.engine.config is not None
            ways.append(replace(best, name=best.engine.config.describe().rpartition(" · ")[0]))
            stages = ParallelConfig(pipefusion=min(len(everything), 4))
            threads = 1 if cores > 1 else None
            ways.append(
                start(f"pipefusion {stages.pipefusion}", stages, everything[: stages.pipefusion], threads, PAYS)
            )
        yield ways


def _paint(view: View, ways: list[Way], prompts: tuple[str, ...], rounds: int) -> None:
    """Every prompt in every way in turn, after one untimed request on each."""
    call = call_defaults()
    with view.waiting("one untimed request each"):
        for way in ways:
            way.engine.generate(prompt=prompts[0], seed=0, **{**call, "num_inference_steps": 4})
    for prompt in prompts:
        for turn in range(rounds):
            for way in ways:
                with view.painting(f"{way.name}: {prompt}") as on_progress:
                    result = way.engine.generate(prompt=prompt, seed=0, on_progress=on_progress, **call)
                way.seconds.append(result.seconds)
                if turn == 0:
                    way.painted.extend(pictures.as_pictures(result.images, way.engine.ranks[0].pipeline_class))


def _show(view: View, ways: list[Way]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("way", no_wrap=True)
    for name in ("workers", "seconds", "speed-up", "likeness"):
        table.add_column(name, justify="right", no_wrap=True)
    first, quickest = ways[0], min(ways, key=lambda way: way.typical)
    for way in ways:
        times = f"{way.typical:.2f}", f"{first.typical / way.typical:.2f}×"
        cells = (way.name, str(len(way.engine.devices)), *times, "–" if way is first else way.likeness(first))
        table.add_row(*cells, style="bold green" if way is quickest and way is not first else "")
    view.console.print(table)
    for way in ways:
        if way.engine.layout_reason is not None:
            view.console.print(f"The planner takes [bold]{way.name}[/]: {way.told}.")
    if len(ways) > 1:
        view.console.print(f"{PAYS}.")


def _sheet(ways: list[Way], prompts: tuple[str, ...]) -> Image.Image:
    shown = [way for way in ways if "threads" not in way.name]
    labels = [f"{way.name}: {way.typical:.2f} s" for way in shown]
    tiles = []
    for index, prompt in enumerate(prompts):
        alike = [pictures.psnr(shown[0].painted[index], way.painted[index]) for way in shown[1:]]
        told = ", ".join("identical" if math.isinf(one) else f"{one:.0f} dB" for one in alike)
        tiles.append(Tile([way.painted[index] for way in shown], labels, f"{prompt} ({told})" if told else prompt))
    return pictures.sheet(tiles)
