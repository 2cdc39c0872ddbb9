"""``patchpipe plan``: which layout of so many devices is best for a model, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.figures import count, size
from patchpipe.cli.options import option
from patchpipe.demo import MODEL_DIR
from patchpipe.files import check_new, write_text

if TYPE_CHECKING:
    from patchpipe.planner import Prediction, Workload
    from patchpipe.planner.search import Choice
    from patchpipe.planner.work.quality import Quality

EPILOG = """
[bold]Examples[/]

  Known cards and links; well-known models need no download:

  [green]patchpipe plan[/] --model flux.1-dev --devices 8 --device l40 --link pcie4 --height 2048 --width 2048

  This machine, measured first; a model of your own:

  [green]patchpipe profile[/] -o mine.json

  [green]patchpipe plan[/] --model ./sd3-medium --devices 2 --profile mine.json

  Only methods whose picture is that of one device, on 16 GB of each card:

  [green]patchpipe plan[/] --model sd3.5-large --devices 4 --device rtx4090 --link pcie4 --exact --memory 16

  This machine as it is, and the cards on your desk:

  [green]patchpipe plan[/]

  [green]patchpipe plan[/] --model flux.1-dev --device 4090

  A model larger than the card: which weights come from the host, and how long it takes:

  [green]patchpipe plan[/] --model flux.1-dev --devices 1 --device 4090

  Only layouts whose pictures are close enough to one device's, as measured with your model:

  [green]patchpipe quality[/] ./FLUX.1-dev --dtype bf16 --patches 4,8,16 --warmup 1,2,streamed -o flux.html

  [green]patchpipe plan[/] --model ./FLUX.1-dev --devices 8 --device l40 --quality flux.json --min-psnr 40

  More accurate, with the measured seconds of one device:

  [green]patchpipe plan[/] --model flux.1-dev --devices 4 --device l40 --link pcie4 --single 18.4
"""
_MACHINE, _WISHES = "Machine", "What to plan for"


Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Known name, folder or hub id. [dim]Default: the bundled model.[/]", metavar="NAME|DIR|ID"
    ),
]
Count = Annotated[
    int | None,
    option(_MACHINE, "Devices. [dim]Default: this machine's; 2 of a named --device.[/]", "--devices"),
]
Card = Annotated[
    str | None,
    option(_MACHINE, "Kind of device, such as 4090 or h100. [dim]Default: this machine's.[/]", "--device"),
]
LinkName = Annotated[
    str | None,
    option(_MACHINE, "Link between devices, such as pcie4, nvlink3 or 25gbe. [dim]Default: the usual.[/]", "--link"),
]
ProfileFile = Annotated[
    Path | None,
    option(_MACHINE, "File of `patchpipe profile`, instead of --device and --link.", "--profile", metavar="FILE"),
]
Memory = Annotated[float | None, option(_MACHINE, "GiB a device may hold. [dim]Default: all it has.[/]", "--memory")]
Single = Annotated[
    float | None,
    option(_MACHINE, "Measured seconds of one device; calibrates the compute rate.", "--single"),
]
Exact = Annotated[bool, option(_WISHES, "Only methods that give the picture of one device.", "--exact")]
Fresh = Annotated[
    float, option(_WISHES, "Smallest share of fresh keys that the chosen layout may have.", "--fresh", default=True)
]
QualityFile = Annotated[
    Path | None,
    option(
        _WISHES,
        "The .json of `patchpipe quality`: its warm-ups and forecasts are tried, and its decibels count instead of "
        "--fresh.",
        "--quality",
        metavar="FILE",
    ),
]
Least = Annotated[
    float, option(_WISHES, "With --quality: least mean decibels of a layout that may win.", "--min-psnr", default=True)
]
Guided = Annotated[
    bool | None,
    option(_WISHES, "Two guidance branches or one. [dim]Default: as the model is used.[/]", "--guidance/--no-guidance"),
]
Compile = Annotated[bool, option(_WISHES, "Plan with compiled blocks, which have fewer kernels to start.", "--compile")]
Offloaded = Annotated[
    bool,
    option(
        _WISHES,
        "If a layout does not fit, let weights be copied from the host in chunks.",
        "--offload/--no-offload",
        default=True,
    ),
]
TextTokens = Annotated[int | None, option(_WISHES, "Tokens of the prompt. [dim]Default: as the model pads them.[/]")]
Frames = Annotated[int | None, option(_WISHES, "Frames, for a video model.")]
PlanDtype = Annotated[
    str | None, option(_WISHES, "bf16, fp16 or fp32. [dim]Default: bf16, or as the profile was measured.[/]", "--dtype")
]
Top = Annotated[int, option(_WISHES, "Layouts to show.", "--top", default=True)]
Report = Annotated[
    Path | None, typer.Option("--json", help="Write all layouts; - for standard output.", metavar="FILE")
]


def plan(
    model: Model = None,
    revision: options.Revision = None,
    devices: Count = None,
    device: Card = None,
    link: LinkName = None,
    profile: ProfileFile = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    images: options.Images = 1,
    guidance: Guided = None,
    text_tokens: TextTokens = None,
    frames: Frames = None,
    dtype: PlanDtype = None,
    warmup: options.Warmup = None,
    exact: Exact = False,
    compile: Compile = False,
    offload: Offloaded = True,
    fresh: Fresh = 0.5,
    quality: QualityFile = None,
    min_psnr: Least = 40.0,
    memory: Memory = None,
    single: Single = None,
    top: Top = 10,
    json_file: Report = None,
    force: options.Force = False,
    _debug: options.Debug = False,
) -> None:
    """Rank the layouts of a model on so many devices by predicted seconds, and tell how to run the best."""
    if top < 1:
        raise ValueError(f"--top {top} must be 1 or more")
    if json_file is not None and json_file != Path("-"):
        check_new(json_file, force)
    from patchpipe.planner import report, search  # heavy, and not needed for --help
    from patchpipe.planner.machine.named import machine_and_count
    from patchpipe.planner.predict import calibrated
    from patchpipe.planner.work import named as workloads
    from patchpipe.planner.work.quality import Quality

    measured = None if quality is None else Quality.read(quality, min_psnr)
    machine, ranks = machine_and_count(device, link, profile, devices)
    asked = workloads.Asked(
        height=height, width=width, steps=steps, guidance=guidance, pictures=images, text_tokens=text_tokens,
        frames=frames, dtype=dtype or machine.dtype,
    )  # fmt: skip
    workload = workloads.workload_for(model or MODEL_DIR, asked, revision)
    if single is not None:
        machine = calibrated(workload, machine, single)
    wishes = search.Wishes(
        exact=exact,
        fresh=fresh,
        memory=None if memory is None else int(memory * 2**30),
        warmup=None if warmup is None else options.read_warmup(warmup),
        compile=compile,
        offload=offload,
        quality=measured,
    )
    choice = search.search(workload, ranks, machine, wishes)
    layout = None if choice.single_is_best else choice.best.config
    runs = report.command(workload, layout, guidance, asked.dtype) if workload.runnable else None
    text = json.dumps(report.as_dict(choice, runs), indent=1) + "\n"
    if json_file == Path("-"):
        print(text, end="")
        return
    _show(choice, fresh, top, runs)
    if json_file is not None:
        write_text(text, json_file)
        Console(highlight=False).print(f"[green]→[/] {escape(str(json_file))}", soft_wrap=True)


def _show(choice: Choice, fresh: float, top: int, runs: str | None) -> None:
    from patchpipe.planner.report import reasons

    console = Console(highlight=False)
    console.print(_header(choice))
    console.print(_layouts(choice, top))
    console.print("[bold]Why[/]")
    for line in reasons(choice, fresh):
        console.print(f"  {escape(line)}")
    console.print()
    if runs is None:
        name = choice.workload.transformer
        console.print(
            f"[yellow]note:[/] {name} has no plan yet: these figures tell what it would take, and cannot be run"
        )
    else:
        console.print("[bold]Run it[/]")
        console.print(f"  {escape(runs)}", soft_wrap=True)


def _header(choice: Choice) -> Table:
    from patchpipe.planner import report

    workload, machine = choice.workload, choice.profile
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row(
        "model", f"[bold]{escape(report.model_name(workload.model))}[/] · {count(workload.parameters)} parameters"
    )
    table.add_row("request", _request(workload))
    table.add_row("machine", f"{machine.device.name} · {machine.link.name} · {size(machine.device.memory)} each")
    fits = "" if choice.single.bytes <= machine.device.memory else ", more than it has"
    table.add_row("one device", f"{choice.single.seconds:.2f} s and {size(choice.single.bytes)}{fits}")
    return table


def _request(workload: Workload) -> str:
    parts = [f"{workload.image:,} image and {workload.text:,} text tokens", f"{workload.steps} steps"]
    parts.append("two guidance branches" if workload.branches == 2 else "one branch")
    if workload.pictures > 1:
        parts.append(f"{workload.pictures} pictures")
    return " · ".join([*parts, f"{2 * workload.multiply_adds / 1e12:.3g} TFLOP a step"])


def _layouts(choice: Choice, top: int) -> Table:
    shown = min(top, len(choice.ranked))
    title = f"Layouts, {shown} of {len(choice.ranked)} that fit; without text encoding and VAE"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("layout", overflow="fold")
    decibels = () if choice.quality is None else ("dB",)
    for name in ("seconds", "speed-up", "GiB", "MB a step", "busy", "fresh keys", *decibels):
        table.add_column(name, justify="right", no_wrap=True)
    if choice.single_is_best:
        table.add_row(*_cells(choice, choice.single), style="bold green")
    for index, one in enumerate(choice.ranked[:top]):
        best = index == 0 and not choice.single_is_best
        table.add_row(*_cells(choice, one), style="bold green" if best else "")
    return table


def _cells(choice: Choice, one: Prediction) -> tuple[str, ...]:
    from patchpipe.planner.report import layout_name, megabytes

    return (
        layout_name(one),
        f"{one.seconds:.2f}",
        f"{choice.speed_up(one):.2f}×",
        f"{one.bytes / 2**30:.1f}",
        megabytes(one),
        f"{one.busy:.0%}",
        "all" if one.exact else f"{one.fresh:.0%}",
        *(() if choice.quality is None else (_decibels(choice.quality, one),)),
    )


def _decibels(quality: Quality, one: Prediction) -> str:
    found = quality.of(one.config, one.patches)
    return "identical" if one.exact else "?" if found is None else f"{found:.1f}"
