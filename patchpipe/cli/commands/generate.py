"""``patchpipe generate``: prompts in, pictures out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from patchpipe.cli import clips, options
from patchpipe.cli.inputs import check_there, implied_task, picture_arguments, read_choice
from patchpipe.cli.job import Job, auto_layout, call_arguments, run
from patchpipe.cli.loras import read_loras
from patchpipe.demo import MODEL_DIR, call_defaults

EPILOG = """
[bold]Examples[/]

  A picture by the bundled model, with the fastest layout for this machine:

  [green]patchpipe generate[/] "red heart, flat style"

  The same in two pipeline stages, to a file of its own:

  [green]patchpipe generate[/] "red heart, flat style" --pipefusion 2 -o heart.png

  Eight processes: two guidance branches, two stages, two ranks to a stage:

  [green]patchpipe generate[/] "red heart, flat style" --cfg 2 --pipefusion 2 --ulysses 2

  Several prompts on one sheet, next to what one device paints:

  [green]patchpipe generate[/] "red apple, 3d style" "owl, flat style" --pipefusion 2 --compare -o sheet.png

  Bit-equal to one device, and both processes busy: two pictures at once:

  [green]patchpipe generate[/] "red apple, 3d style" "owl, flat style" --pipefusion 2 --warmup all --in-flight 2

  A model of your own, four GPUs, bf16:

  [green]patchpipe generate[/] "a fox in the snow" --model ./flux-dev --pipefusion 4 --dtype bf16 --steps 28 \
--height 1024 --width 1024

  A model larger than a card: each holds 10 GiB of the blocks' weights, the rest is copied in while blocks compute:

  [green]patchpipe generate[/] "a fox in the snow" --model ./flux2-dev --pipefusion 2 --offload 10 --dtype bf16

  Change a picture, or only the part where a mask is white:

  [green]patchpipe generate[/] "a fox in the snow" --model ./flux-dev --image photo.jpg --strength 0.7 --mask mask.png

  A clip of 81 frames on four GPUs, cut by frames:

  [green]patchpipe generate[/] "waves at dusk" --model ./wan-14b --pipefusion 4 --frames 81 -o waves.mp4

  Any other argument of the pipeline:

  [green]patchpipe generate[/] "an owl" --set max_sequence_length=32 --set output_type=pil
"""
CALL = ("height", "width", "frames", "steps", "guidance", "negative")
AS_GIVEN = (
    *("images", "in_flight", "seed", "dtype", "threads", "variant", "revision", "out", "force", "sheet", "compare"),
    *("rounds", "trace", "preview", "fps"),
)
Prompts = Annotated[
    list[str], typer.Argument(help="What to paint; several prompts give several pictures.", metavar="PROMPT…")
]


def generate(
    context: typer.Context,
    prompts: Prompts,
    out: options.Out = None,
    force: options.Force = False,
    sheet: options.Sheet = False,
    compare: options.Compare = False,
    rounds: options.Rounds = 1,
    json_file: options.JsonFile = None,
    trace: options.Trace = None,
    preview: options.PreviewSteps = None,
    images: options.Images = 1,
    in_flight: options.InFlight = 1,
    seed: options.Seed = 0,
    height: options.Height = None,
    width: options.Width = None,
    frames: options.ClipFrames = None,
    fps: options.Fps = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    negative: options.Negative = None,
    loras: options.Loras = None,
    image: options.Picture = None,
    mask: options.Mask = None,
    strength: options.Strength = None,
    scheduler: options.Scheduler = None,
    settings: options.Settings = None,
    model: options.ModelOption = None,
    devices: options.Devices = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    variant: options.Variant = None,
    revision: options.Revision = None,
    pipeline: options.PipelineClass = None,
    task: options.Task = None,
    layout: options.Layout = "auto",
    pipefusion: options.Pipefusion = 1,
    cfg: options.Cfg = 1,
    idle_branch: options.IdleBranch = False,
    data: options.Data = 1,
    ulysses: options.Ulysses = 1,
    ulysses_inner: options.UlyssesInner = 1,
    values_first: options.ValuesFirst = False,
    changed_tokens: options.ChangedTokens = None,
    compress: options.Compress = None,
    ring: options.Ring = 1,
    tensor: options.Tensor = 1,
    distrifusion: options.Distrifusion = 1,
    parallel_vae: options.ParallelVae = False,
    compile: options.Compile = False,
    patches: options.Patches = None,
    split_batch: options.SplitBatch = None,
    share_blocks: options.ShareBlocks = None,
    forecast: options.Forecast = None,
    offload: options.Offload = None,
    warmup: options.Warmup = None,
    patch_rows: options.PatchRows = None,
    text_patches: options.TextPatches = None,
    stage_blocks: options.StageBlocks = None,
    output_rank: options.OutputRank = 0,
    text_rank: options.TextRank = None,
    backend: options.BackendChoice = "auto",
    timeout: options.Timeout = 300.0,
    debug: options.Debug = False,
) -> None:
    """Paint pictures, or make clips, from prompts on one or several devices."""
    run(_job(context, locals()))


def _job(context: typer.Context, given: dict[str, Any]) -> Job:
    """What the options ask for, read and checked, in the order in which a user is told what is wrong."""
    source, chosen = given["model"] or str(MODEL_DIR), options.read_settings(given["settings"])
    arguments = call_arguments(source, settings=chosen, **{name: given[name] for name in CALL})
    image, mask, pipeline = given["image"], given["mask"], given["pipeline"]
    asked = {"height": given["height"], "width": given["width"]} | chosen
    check_there(image, mask)  # before the libraries are loaded, which what follows needs
    advised = {**(clips.USUAL_SIZE if clips.known_to_make(source) else {}), **call_defaults(source)}
    arguments |= picture_arguments(image, mask, given["strength"], asked, advised)
    wanted = auto_layout(
        arguments,
        len(given["prompts"]) * given["images"],
        together=given["in_flight"],
        traced=given["trace"] is not None,
        alone=given["compare"],
    )
    return Job(
        prompts=tuple(given["prompts"]),
        arguments=arguments,
        model=source,
        config=options.read_layout(context, given, wanted),
        devices=options.read_devices(given["devices"]),
        loras=read_loras(given["loras"]),
        choice=read_choice(pipeline, _task(given, source), given["scheduler"]),
        report=given["json_file"],
        **{name: given[name] for name in AS_GIVEN},
    )


def _task(given: dict[str, Any], source: str) -> str | None:
    """Pictures to start from imply one, but of models for clips, whose pipeline takes them or does not."""
    if clips.known_to_make(source):
        return given["task"]
    return implied_task(given["image"], given["mask"], given["pipeline"], given["task"])
