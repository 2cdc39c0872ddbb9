"""``patchpipe quality``: how near the pictures of a layout are to those of one device, for a model of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.commands.demo import PROMPTS
from patchpipe.config import WarmupKind
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.errors import UnsupportedModel
from patchpipe.files import check_new, free_name, write_text

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from patchpipe.cli.quality.measure import Setting
    from patchpipe.engine import Engine
    from patchpipe.loading.folder import PipelineFolder
    from patchpipe.planner import Workload

EPILOG = """
[bold]Examples[/]

  [green]patchpipe quality[/]                                    the bundled model

  [green]patchpipe quality[/] ./FLUX.1-dev --dtype bf16 --prompts prompts.txt --patches 4,8 --warmup 1,2,streamed

  [green]patchpipe quality[/] --patches 8 --forecast on --distrifusion 4 -o forecast.html

  [green]patchpipe quality[/] --scheduler euler:stochastic_sampling=true
"""
DEFAULT_OUT = Path("quality.html")
SWITCH = {"on": True, "off": False}
_PANEL = "Settings to compare"

Prompts = Annotated[
    Path | None, options.option(_PANEL, "File with a prompt on each line. [dim]Default: four prompts.[/]", "--prompts")
]
Patches = Annotated[str, options.option(_PANEL, "Numbers of patches.", "--patches", metavar="M,…", default=True)]
Warmups = Annotated[
    str,
    options.option(_PANEL, "Synchronous steps, streamed or auto.", "--warmup", metavar="W,…", default=True),
]
Forecasts = Annotated[
    str,
    options.option(_PANEL, "Forecast stale rows: on, off or both.", "--forecast", metavar="on,off", default=True),
]
Ranks = Annotated[
    str | None,
    options.option(
        _PANEL,
        "DistriFusion on so many ranks too, each a process. [dim]Default: none.[/]",
        "--distrifusion",
        metavar="R,…",
    ),
]
Batch = Annotated[int, options.option(_PANEL, "Pictures painted at once.", "--batch", metavar="N", default=True)]
Out = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Page to write; the figures go beside it as .json. [dim]Default: quality.html[/]"
    ),
]
On = Annotated[
    str,
    options.option(
        _PANEL,
        "Cards, one per pipeline stage, whose seconds are predicted for the drawing of likeness against time.",
        "--on",
        metavar="NxCARD",
        default=True,
    ),
]
Link = Annotated[str | None, options.option(_PANEL, "Their link, such as pcie4. [dim]Default: the usual.[/]", "--link")]
Device = Annotated[str | None, options.option("Model and devices", "cpu or cuda. [dim]Default: a GPU if any.[/]")]


def quality(
    model: options.ModelArgument = None,
    prompts: Prompts = None,
    patches: Patches = "2,4,8",
    warmup: Warmups = "1",
    forecast: Forecasts = "off,on",
    distrifusion: Ranks = None,
    batch: Batch = 1,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    height: options.Height = None,
    width: options.Width = None,
    seed: options.Seed = 0,
    scheduler: options.Scheduler = None,
    dtype: options.Dtype = None,
    device: Device = None,
    on: On = "8xl40",
    link: Link = None,
    out: Out = None,
    force: options.Force = False,
    _debug: options.Debug = False,
) -> None:
    """Compare pictures painted in patches with one device's: decibels, structure, features, and a page to look at."""
    from patchpipe.cli.quality.front import Cards, drawing
    from patchpipe.cli.quality.measure import measure, settings
    from patchpipe.engine import Engine
    from patchpipe.engine.choosing import devices_for

    ranks = [] if distrifusion is None else _counts("--distrifusion", distrifusion, 2)
    wanted = settings(_counts("--patches", patches, 1), _warmups(warmup), _switches(forecast), ranks)
    for beside in (setting for setting in wanted if setting.distrifusion):
        devices_for(beside.config, device, None)  # so that too few are told before anything is painted
    if batch < 1:
        raise ValueError(f"--batch {batch} must be 1 or more")
    asked, cards = _read_prompts(prompts), Cards.read(on, link)
    target = (out or (DEFAULT_OUT if force else free_name(DEFAULT_OUT))).expanduser()
    if target.suffix != ".html":
        raise ValueError(f"--output {target} must end in .html: the figures go beside it as .json")
    figures = target.with_suffix(".json")
    for path in (target, figures):
        check_new(path, force)
    other: dict[str, Any] = {} if scheduler is None else {"scheduler": scheduler}
    console, (pipe, source) = Console(highlight=False), _load(model, dtype, device, other)
    call = call_defaults(source.path)
    strength = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    given = {"num_inference_steps": steps, strength: guidance, "height": height, "width": width}
    call |= {name: value for name, value in given.items() if value is not None}
    workload = _workload(model, call, height, width, steps, guidance)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("painting", total=len(asked) * (1 + len(wanted)))

        def tell(text: str, pictures: int) -> None:
            progress.update(task, advance=pictures, description=text[:60])

        def crew(setting: Setting) -> AbstractContextManager[Engine]:
            return Engine(source.path, setting.config, device, pipe.dtype, **other)

        plain, found = measure(pipe, asked, call, wanted, seed, tell, crew, batch)
    against_time = ""
    if workload is not None:
        for one in found:
            one.seconds = cards.seconds(workload, one.setting)
        against_time = drawing(found, cards.seconds(workload, None), cards.name)
    _show(console, found)
    console.print(f"predicted on {cards.name}" if workload else "no seconds: the planner knows no clips", style="dim")
    name = str(model or "the bundled model")
    about = f"{len(asked)} prompt{'' if len(asked) == 1 else 's'}, {_told(call)}, {type(pipe.scheduler).__name__}."
    from patchpipe.cli.quality.page import page

    write_text(page(name, about, asked, plain, found, against_time), target)
    told = {"model": name, "prompts": asked, "seed": seed, "call": call, "scheduler": scheduler}
    told["found"] = [one.as_dict() for one in found]
    write_text(json.dumps(told, indent=1, default=str) + "\n", figures)
    console.print(f"[green]→[/] {target}\n[green]→[/] {figures}", soft_wrap=True)


def _load(
    model: str | None, dtype: str | None, device: str | None, options: dict[str, Any]
) -> tuple[Any, PipelineFolder]:
    """The pipeline, plain, and where it lies."""
    from patchpipe.distributed.joining import device_for
    from patchpipe.loading.choice import load_chosen
    from patchpipe.loading.dtypes import as_torch, default_dtype
    from patchpipe.loading.folder import PipelineFolder

    source, _ = PipelineFolder.locate(model or MODEL_DIR)
    source.plan()
    place = device_for(device)
    told = as_torch(dtype or default_dtype(source.path, None, [place.type]) or "float32")
    pipe = load_chosen(source.pipeline_class, str(source.path), {"dtype": told, **options}).to(place)
    pipe.set_progress_bar_config(disable=True)
    return pipe, source


def _workload(
    model: str | None, call: dict[str, Any], height: int | None, width: int | None, steps: int | None, guidance: Any
) -> Workload | None:
    """The request, as the planner knows it; ``None`` where it knows none such."""
    from patchpipe.planner.work.named import Asked, workload_for

    strength = guidance if guidance is not None else call.get("true_cfg_scale", call.get("guidance_scale"))
    guided = None if strength is None else strength > 1
    steps = steps or call.get("num_inference_steps")
    try:
        return workload_for(model or MODEL_DIR, Asked(height=height, width=width, steps=steps, guidance=guided))
    except UnsupportedModel:
        return None


def _counts(option: str, text: str, least: int) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise ValueError(f"{option} {text} must be whole numbers of {least} or more, such as {least},{least + 1}")
    return found


def _warmups(text: str) -> list[WarmupKind]:
    found = [options.read_warmup(part) for part in text.split(",")]
    if "all" in found:
        raise ValueError(f'--warmup {text}: "all" is one device\'s picture, with which the others are compared')
    return found


def _switches(text: str) -> list[bool]:
    parts = text.split(",")
    if any(part not in SWITCH for part in parts):
        raise ValueError(f"--forecast {text} must be on, off or on,off")
    return [SWITCH[part] for part in parts]


def _read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return list(PROMPTS)
    if not path.is_file():
        raise FileNotFoundError(f"--prompts {path}: there is no such file")
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"--prompts {path} has no line with a prompt")
    return found


def _told(call: dict[str, Any]) -> str:
    names = {"num_inference_steps": "steps", "true_cfg_scale": "guidance", "guidance_scale": "guidance"}
    return ", ".join(f"{names.get(name, name)} {value}" for name, value in call.items() if value not in ("", None))


def _show(console: Console, found: list[Any]) -> None:
    from patchpipe.cli.quality.measure import HEADER, MEASURES

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in HEADER:
        table.add_column(name, justify="right", no_wrap=True)
    best = max(found, key=lambda one: one.mean)
    for one in found:
        table.add_row(*one.cells, style="bold green" if one is best else "")
    console.print(table)
    console.print(MEASURES, style="dim")
