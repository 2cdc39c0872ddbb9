"""The options that commands share, and how their text is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from patchpipe.config import ALL_STEPS, PLAIN, STREAMED, WATCHED, AutoLayout, ParallelConfig, WarmupKind
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.layout.text import WAYS, WAYS_TOLD
from patchpipe.layout.text import TextRank as TextPlace

_LAYOUT, _DETAIL, _MODEL = "Layout", "Layout, in detail", "Model and devices"
_PICTURE, _OUTPUT = "Picture", "Output"

_OWN_OPTIONS = {
    "prompt": "the prompt is the command's argument",
    "generator": "use --seed",
    "seed": "use --seed",
    "num_images_per_prompt": "use --images",
}

Backend = Literal["auto", "nccl", "gloo"]


def _option(panel: str, help: str, *names: str, **kwargs: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=kwargs.pop("default", False), **kwargs)


def _degree(help: str, *names: str) -> Any:
    return _option(_LAYOUT, help, *names, metavar="N", default=True)


option = _option  # for commands with options of their own

Layout = Annotated[
    Literal["auto", "exact", "plain"],
    _option(
        _LAYOUT,
        "If no other layout option is given: auto takes the fastest layout for the devices there are; exact takes the "
        "fastest that gives the picture of one device; plain runs plain diffusers.",
        "--layout",
        metavar="HOW",
        default=True,
    ),
]
Pipefusion = Annotated[int, _degree("Pipeline stages N, one device each.", "--pipefusion", "-N")]
Cfg = Annotated[int, _degree("2 runs the two guidance branches side by side.")]
IdleBranch = Annotated[
    bool,
    _option(_DETAIL, "With --cfg 2: also take unguided requests; half of the ranks then wait.", "--idle-branch"),
]
Data = Annotated[int, _degree("Parts the pictures of a request are split into.")]
Ulysses = Annotated[int, _degree("Ranks that share a stage by tokens and heads.")]
UlyssesInner = Annotated[
    int,
    _option(
        _DETAIL,
        "How many of --ulysses' ranks share fast links, if others are slow. [dim]Default: all links are alike.[/]",
        "--ulysses-inner",
        metavar="N",
    ),
]
ValuesFirst = Annotated[
    bool, _option(_DETAIL, "With --ulysses: send values while queries and keys are computed.", "--values-first")
]
ChangedTokens = Annotated[
    float | None,
    _option(
        _DETAIL,
        "With --ulysses: the share of tokens to exchange, those that have changed most. "
        "[dim]Default: all, and the picture of one device.[/]",
        "--changed-tokens",
        metavar="SHARE",
    ),
]
Compress = Annotated[
    Literal["int8"] | None,
    _option(
        _DETAIL,
        "Send changes since the last step in eight bits: with --pipefusion or --distrifusion. [dim]Default: no.[/]",
        "--compress",
        metavar="int8",
    ),
]
Ring = Annotated[int, _degree("Ranks that share a stage by tokens, keys and values in a ring.")]
Tensor = Annotated[int, _degree("Ranks that share a stage by slices of its matrices.")]
Distrifusion = Annotated[int, _degree("Ranks with the whole model and a part of the picture each, instead of stages.")]
ParallelVae = Annotated[bool, _option(_LAYOUT, "Decode the picture in strips, one per rank.", "--parallel-vae")]
Compile = Annotated[bool, _option(_LAYOUT, "Compile the blocks; the first picture takes longer.", "--compile")]
Patches = Annotated[
    int | None, _option(_LAYOUT, "Patches M the picture is cut into. [dim]Default: the fastest.[/]", metavar="M")
]
SplitBatch = Annotated[
    bool | None,
    _option(
        _DETAIL,
        "Send a batch (such as both guidance branches) in two halves. [dim]Default: if it evens out the stages.[/]",
        "--split-batch/--no-split-batch",
    ),
]
ShareBlocks = Annotated[
    bool | None,
    _option(
        _DETAIL,
        "Let two stages take turns with the block between them. [dim]Default: if it evens out the stages.[/]",
        "--share-blocks/--no-share-blocks",
    ),
]
Forecast = Annotated[
    bool | None,
    _option(
        _DETAIL,
        "Correct stale keys and values by their last change, for a closer picture. [dim]Default: yes.[/]",
        "--forecast/--no-forecast",
    ),
]
Offload = Annotated[
    str | None,
    _option(
        _LAYOUT,
        "Keep weights of the blocks off the device until they are needed: auto, or GiB they may take on the device, or "
        "resident=0.4,depth=8,gate=on,tier=disk. [dim]Default: all weights stay on the device.[/]",
        metavar="auto|GIB|…",
    ),
]
Warmup = Annotated[
    str | None,
    _option(
        _LAYOUT,
        'Synchronous steps before patches stream; "all" for a bit-exact run, "streamed" to stream the first step three '
        'times so that no stage waits, "auto" '
        "to go by the forecast's error. [dim]Default: 1; 2 with guidance and a forecast.[/]",
        metavar="W|all|streamed|auto",
    ),
]
PatchRows = Annotated[str | None, _option(_DETAIL, "Token rows of each patch, for uneven cuts.", metavar="1,2,…")]
TextPatches = Annotated[
    int | None,
    _option(
        _DETAIL,
        "Over how many of the first patches the text is spread. [dim]Default: one, more where the text is long.[/]",
    ),
]
StageBlocks = Annotated[
    str | None,
    _option(
        _DETAIL,
        "Blocks of each stage; 3.5 runs the fourth block for half of the patches. [dim]Default: balanced by cost.[/]",
        metavar="1,2,…",
    ),
]
OutputRank = Annotated[int, _option(_DETAIL, "Rank with the VAE, which gets the pictures.", default=True)]
TextRank = Annotated[
    str | None,
    _option(
        _DETAIL,
        'Rank with the text encoders; "spread" for one each, "layers" for their layers on all, "host" to keep them in '
        'host memory, "disk" to read layer by layer. [dim]Default: the last.[/]',
    ),
]
BackendChoice = Annotated[Backend, _option(_DETAIL, "How ranks talk; with gloo they can share a GPU.", default=True)]
Timeout = Annotated[float, _option(_DETAIL, "Most seconds that a wait for another rank may last.", default=True)]

ModelOption = Annotated[
    str | None,
    _option(_MODEL, "Folder or hub id. [dim]Default: the bundled model.[/]", "--model", metavar="DIR|ID"),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Folder or hub id. [dim]Default: the bundled model.[/]", show_default=False),
]
PipelineClass = Annotated[
    str | None,
    _option(_MODEL, "Another pipeline class of diffusers for the same weights.", "--pipeline", metavar="CLASS"),
]
Task = Annotated[
    str | None, _option(_MODEL, "text-to-image, image-to-image or inpainting: diffusers' class for it.", metavar="TASK")
]
Devices = Annotated[
    str | None,
    _option(_MODEL, "One for all ranks or one each: cpu, cuda:0,cuda:1. [dim]Default: GPUs if any.[/]"),
]
Dtype = Annotated[
    str | None, _option(_MODEL, "bf16, fp16 or fp32. [dim]Default: the checkpoint's own; on a CPU, fp32.[/]")
]
Threads = Annotated[
    int | None, _option(_MODEL, "CPU threads of each rank. [dim]Default: an even share of the cores.[/]")
]
Variant = Annotated[str | None, _option(_MODEL, "The checkpoint's variant, such as fp16.")]
Revision = Annotated[str | None, _option(_MODEL, "Branch, tag or commit of a hub id. [dim]Default: main.[/]")]

Height = Annotated[int | None, _option(_PICTURE, "Height in pixels.")]
Width = Annotated[int | None, _option(_PICTURE, "Width in pixels.")]
Steps = Annotated[int | None, _option(_PICTURE, "Denoising steps.")]
ClipFrames = Annotated[int | None, _option(_PICTURE, "Frames of a clip, for a model that makes clips.", "--frames")]
Fps = Annotated[
    float | None, _option(_PICTURE, "Frames a second at which a clip plays. [dim]Default: the model's.[/]", "--fps")
]
Seed = Annotated[int, _option(_PICTURE, "Seed of the first picture; the next one has the next number.", default=True)]
Guidance = Annotated[
    float | None,
    _option(_PICTURE, "Guidance strength (true_cfg_scale where the pipeline or the model's call.json has it so)."),
]
Negative = Annotated[str | None, _option(_PICTURE, "What the picture should not show.")]
Loras = Annotated[
    list[str] | None,
    _option(
        _PICTURE, "LoRA file, folder or hub id, with its strength; may be repeated.", "--lora", metavar="PATH[:SCALE]"
    ),
]
Settings = Annotated[
    list[str] | None,
    _option(_PICTURE, "Any other argument of the pipeline; the value is read as JSON.", "--set", metavar="KEY=VALUE"),
]
Picture = Annotated[
    Path | None,
    _option(_PICTURE, "Picture to start from; implies --task image-to-image.", "--image", metavar="FILE"),
]
Mask = Annotated[
    Path | None,
    _option(_PICTURE, "Mask: white where --image shall change; implies --task inpainting.", "--mask", metavar="FILE"),
]
Strength = Annotated[
    float | None, _option(_PICTURE, "How much --image changes, 0 to 1. [dim]Default: the pipeline's.[/]")
]
Scheduler = Annotated[
    str | None,
    _option(_PICTURE, "Another scheduler: euler, heun, unipc … (settings: dpm++:solver_order=3).", metavar="NAME"),
]
InFlight = Annotated[
    int,
    _option(
        _PICTURE,
        "Pictures painted at once: stages that are idle for one work for another. Same pictures, more memory.",
        default=True,
    ),
]
Images = Annotated[int, _option(_PICTURE, "Pictures for each prompt.", "-n", "--images", default=True)]

Out = Annotated[
    Path | None,
    _option(
        _OUTPUT,
        "Picture or clip to write; several are numbered. [dim]Default: out.png or out.mp4, or the next free number.[/]",
        "-o",
        "--output",
        metavar="FILE",
    ),
]
Force = Annotated[bool, _option(_OUTPUT, "Overwrite files that are already there.", "-f", "--force")]
Sheet = Annotated[bool, _option(_OUTPUT, "Write several pictures as one sheet.", "--sheet")]
Compare = Annotated[bool, _option(_OUTPUT, "Also paint on one device with plain diffusers, side by side.", "--compare")]
Rounds = Annotated[int, _option(_OUTPUT, "Timed runs of each side under --compare.", default=True)]
JsonFile = Annotated[Path | None, _option(_OUTPUT, "Write a report of the run.", "--json", metavar="FILE")]
Trace = Annotated[
    Path | None,
    _option(_OUTPUT, "Write a timeline of the run, for `patchpipe trace` and Perfetto.", metavar="FILE"),
]
PreviewSteps = Annotated[
    int | None,
    _option(_OUTPUT, "Every so many steps, write a preview of the picture to FILE.preview.png.", "--preview"),
]
Debug = Annotated[bool, _option(_OUTPUT, "Show the traceback of an error.", "--debug")]


def read_warmup(text: str) -> WarmupKind:
    """Reads a number of steps, ``all``, ``streamed`` or ``auto``.

    Raises:
        ValueError: It is none of these.
    """
    told = 'a whole number of 0 or more, "all", "streamed" or "auto"'
    return _word_or_number("--warmup", text, (ALL_STEPS, STREAMED, WATCHED), told)


def read_text_rank(text: str | None) -> TextPlace:
    """Reads a rank, or one of the ways to place encoders.

    Raises:
        ValueError: It is neither.
    """
    return None if text is None else _word_or_number("--text-rank", text, WAYS, f"a rank, or {WAYS_TOLD}")


def _word_or_number(option: str, text: str, words: tuple[Any, ...], told: str) -> Any:
    """One of the words, or a whole number."""
    if (word := text.strip().lower()) in words:
        return word
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{option} {text} must be {told}") from None


def read_numbers(name: str, text: str | None, *, fractions: bool = False) -> tuple[float, ...] | None:
    """Reads ``1,2,3``, or with fractions ``1.5,2.5``.

    Raises:
        ValueError: A part of it is not a number.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) if fractions and "." in part else int(part) for part in text.split(","))
    except ValueError:
        kind = "numbers" if fractions else "whole numbers"
        raise ValueError(f"{name} {text} must be {kind} with commas between them: 1,2,2") from None


def read_devices(text: str | None) -> str | list[str] | None:
    """Reads one device name or several with commas between them."""
    if text is None or "," not in text:
        return text
    return [part.strip() for part in text.split(",")]


def read_settings(texts: list[str] | None) -> dict[str, Any]:
    """Reads ``key=value`` pairs; a value that is not JSON is text.

    Raises:
        ValueError: A pair has no ``=``.
    """
    settings: dict[str, Any] = {}
    for text in texts or ():
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier():
            raise ValueError(f"--set {text} must look like key=value")
        if key in _OWN_OPTIONS:
            raise ValueError(f"--set {text}: {_OWN_OPTIONS[key]}")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def read_layout(context: typer.Context, given: dict[str, Any], auto: AutoLayout) -> ParallelConfig | AutoLayout | None:
    """The layout that a command's options describe or, where they describe none, leave to be chosen.

    Args:
        context: The command's, which tells what was given.
        given: The command's arguments by name.
        auto: What is known of the pictures.

    Returns:
        ``None`` for plain diffusers.

    Raises:
        ValueError: They contradict each other, or describe no layout.
    """
    own = {field.name for field in dataclasses.fields(AutoLayout)}
    fields = [field.name for field in dataclasses.fields(ParallelConfig)]
    named = [name for name in fields if _was_given(context, name)]
    asked = [name for name in named if name not in own]
    wish = given["layout"]
    if asked:
        if _was_given(context, "layout"):
            raise ValueError(f"--layout {wish} chooses by itself: leave it out, or --{asked[0].replace('_', '-')}")
        return read_config(given)
    if wish == PLAIN:
        if named:
            raise ValueError(f"--layout plain is diffusers alone: leave it out, or --{named[0]}")
        return None
    warmup = None if given["warmup"] is None else read_warmup(given["warmup"])
    rest = {name: given[name] for name in ("compile", "backend", "timeout")}
    return dataclasses.replace(auto, exact=wish == "exact", warmup=warmup, **rest)


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def read_config(given: dict[str, Any]) -> ParallelConfig:
    """The layout that a command's options describe.

    Args:
        given: The command's arguments by name; those that are no field of the layout are passed over.

    Raises:
        ValueError: They do not describe one.
    """
    names = {field.name for field in dataclasses.fields(ParallelConfig)}
    fields = {name: value for name, value in given.items() if name in names}
    readers: dict[str, Callable[[str], Any]] = {
        "warmup": lambda text: None if text is None else read_warmup(text),
        "text_rank": read_text_rank,
        "patch_rows": lambda text: read_numbers("--patch-rows", text),
        "stage_blocks": lambda text: read_numbers("--stage-blocks", text, fractions=True),
        "offload": lambda text: None if text is None else OffloadConfig.read(text),
    }
    return ParallelConfig(
        **{name: readers[name](value) if name in readers else value for name, value in fields.items()}
    )
