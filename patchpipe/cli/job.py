"""Runs what ``patchpipe generate`` was asked for."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchpipe.cli import clips, pictures
from patchpipe.cli.compare import compare
from patchpipe.cli.loras import Lora, load_loras
from patchpipe.cli.pairs import Comparison
from patchpipe.cli.pictures import Tile
from patchpipe.cli.view import View, likeness
from patchpipe.clips import suffix_for_clips
from patchpipe.config import PLAIN, AutoLayout, ParallelConfig
from patchpipe.demo import call_defaults
from patchpipe.files import check_new, free_name, numbered, write_text
from patchpipe.layout.combinations import check_together
from patchpipe.tracing.timeline import check_target

if TYPE_CHECKING:
    from PIL import Image

    from patchpipe.engine import Engine, Preview, Result

DEFAULT_OUT = Path("out.png")
TOGETHER_METHODS = ("pipefusion", "cfg")  # whose products are tested with requests in flight together


@dataclass(frozen=True)
class Job:
    """Everything asked for on the command line, checked and read."""

    prompts: tuple[str, ...]
    images: int
    in_flight: int
    seed: int
    arguments: dict[str, Any]
    model: str
    config: ParallelConfig | AutoLayout | None
    devices: str | list[str] | None
    dtype: str | None
    threads: int | None
    variant: str | None
    revision: str | None
    loras: tuple[Lora, ...]
    choice: dict[str, Any]  # of a pipeline class and a scheduler
    out: Path | None
    force: bool
    sheet: bool
    compare: bool
    rounds: int
    report: Path | None
    trace: Path | None
    preview: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("images", "rounds", "in_flight"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more")
        if self.in_flight > 1:
            self._check_in_flight()
        if self.preview is not None:
            self._check_preview()
        if self.data > 1 and self.compare:
            raise ValueError("--compare paints picture by picture, --data several at once: leave one of them out")
        if self.trace is not None and self.compare:
            raise ValueError("--compare measures, and --trace would slow one side down: leave one of them out")
        if self.config is None and (self.compare or self.trace is not None or self.in_flight > 1):
            raise ValueError("--layout plain is diffusers alone: leave out --compare, --trace and --in-flight")
        pictures_asked = len(self.prompts) * self.images
        if self.data > pictures_asked:
            raise ValueError(
                f"--data {self.data} splits the pictures of a request, but {pictures_asked} would be painted: "
                f"give more prompts, or --images {self.data}"
            )

    @property
    def data(self) -> int:
        """Parts into which the pictures of a request are split."""
        return self.config.data if isinstance(self.config, ParallelConfig) else 1

    def _check_preview(self) -> None:
        if self.preview is not None and self.preview < 1:
            raise ValueError(f"--preview {self.preview} must be a number of steps, 1 or more")
        if self.compare or self.in_flight > 1 or self.data > 1:
            raise ValueError("--preview follows one picture: leave out --compare, --in-flight and --data")

    def _check_in_flight(self) -> None:
        if self.compare:
            raise ValueError("--compare paints picture by picture, --in-flight several at once: leave one of them out")
        if self.data > 1:
            raise ValueError("--data paints all pictures in one request: leave out --in-flight, or --data")
        if isinstance(self.config, ParallelConfig):
            check_together(self.config.methods, self.config.compile)

    def traces(self) -> list[Path | None]:
        """Where the timeline of every request, or of every set of requests in flight, goes."""
        count = 1 if self.data > 1 else -(-len(self.prompts) * self.images // self.in_flight)
        return [None] * count if self.trace is None else list(numbered(self.trace, count))

    def files(self) -> list[Path]:
        """Where the pictures go."""
        assert self.out is not None
        several = 1 if self.sheet or self.compare else len(self.prompts) * self.images
        return numbered(self.out, several)

    def requests(self) -> Iterator[tuple[str, int]]:
        """Prompt and seed of every picture, in order."""
        for prompt in self.prompts:
            for number in range(self.images):
                yield prompt, self.seed + number


@dataclass(frozen=True)
class Painted:
    """One picture, or the frames of one clip, and how it came about."""

    prompt: str
    seed: int
    frames: list[Image.Image]
    result: Result


def call_arguments(
    model: str,
    *,
    height: int | None,
    width: int | None,
    frames: int | None = None,
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The pipeline's arguments: those the model's ``call.json`` advises, then the options, then ``--set``."""
    advised = call_defaults(model)
    strength = "true_cfg_scale" if "true_cfg_scale" in advised else "guidance_scale"
    given = {
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        strength: guidance,
        "negative_prompt": negative,
    }
    return {**advised, **{name: value for name, value in given.items() if value is not None}, **settings}


def auto_layout(arguments: dict[str, Any], pictures: int, *, together: int, traced: bool, alone: bool) -> AutoLayout:
    """What is known of the pictures where a layout is to be chosen.

    Args:
        arguments: The pipeline's.
        pictures: Pictures that are wanted.
        together: Pictures in flight together.
        traced: Whether timelines are wanted.
        alone: Whether every picture is to be painted by itself.
    """
    methods = TOGETHER_METHODS if together > 1 else None
    plain = together == 1 and not traced and not alone
    request = {name: value for name, value in arguments.items() if isinstance(value, (int, float, str))}
    return AutoLayout(
        request=request, pictures=max(1, pictures), batched=plain and pictures > 1, plain=plain, methods=methods
    )


def with_strength(arguments: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """The arguments with ``--guidance`` under the name that the pipeline looks at; what is set by name wins."""
    from patchpipe.engine.requests import guidance_name

    name, rest = guidance_name(engine.arguments, engine.defaults), dict(arguments)
    return {name: rest.pop("guidance_scale"), **rest} if "guidance_scale" in rest else rest


def check_negative(arguments: dict[str, Any], engine: Engine) -> None:
    """Refuses a negative prompt that the pipeline would not look at.

    Raises:
        ValueError: Its guidance is off.
    """
    if not arguments.get("negative_prompt"):
        return
    calls = "true_cfg_scale" in engine.arguments
    strength = "true_cfg_scale" if calls else "guidance_scale"
    value = arguments.get(strength, engine.defaults.get(strength))
    if isinstance(value, (int, float)) and value <= 1:
        remedy = "--set true_cfg_scale=4" if calls else "--guidance 5"
        raise ValueError(
            f"--negative would have no effect: {engine.ranks[0].pipeline_class} uses it only with {strength} above 1, "
            f"but {strength} is {value:g}: add {remedy} (takes twice as long), or leave --negative out"
        )


def run(job: Job) -> None:
    """Paints, writes and tells."""
    began, asked = time.monotonic(), job
    job = _check_targets(asked, clips.known_to_make(job.model))
    view = View(quiet_stdout=job.report == Path("-"))
    with view.warnings(), _start(job, view) as engine:
        if clips.makes(engine):
            job = _check_targets(asked, True)
        job = dataclasses.replace(job, config=engine.config, arguments=with_strength(job.arguments, engine))
        check_negative(job.arguments, engine)
        view.header(engine, job.model)
        if job.compare:
            with _start_plain(job, engine, view) as plain:
                comparison = compare(engine, plain, list(job.requests()), job.arguments, job.rounds, view)
            files = [_write_comparison(job, comparison)]
            view.comparison(comparison)
            requests = comparison.as_list()
        else:
            painted = _paint_all(engine, view, job)
            files = _write(job, engine, painted) + [file for file in job.traces() if file is not None]
            requests = [_describe(one) for one in painted]
        view.written(files, time.monotonic() - began)
        _report(job, engine, files, requests)


def _check_targets(job: Job, makes_clips: bool) -> Job:
    """The job with files that can be written and that overwrite none, unless that was asked for."""
    named = job.out or (DEFAULT_OUT.with_suffix(suffix_for_clips()) if makes_clips else DEFAULT_OUT)
    for_pictures = {"compare": job.compare, "sheet": job.sheet, "preview": job.preview is not None}
    found = clips.check_target(named, job.fps, **for_pictures) if makes_clips else pictures.check_target(named)
    free = job.out is None and not job.force
    job = dataclasses.replace(job, out=found)
    if free:
        job = dataclasses.replace(job, out=free_name(found, len(job.files())))
    if job.trace is not None:
        job = dataclasses.replace(job, trace=check_target(job.trace))
    reports = [] if job.report in (None, Path("-")) else [job.report]
    for file in (*job.files(), *job.traces(), *reports):
        if file is not None:
            check_new(file, job.force)
    return job


def _start(job: Job, view: View) -> Engine:
    from patchpipe.engine import Engine

    if isinstance(job.config, AutoLayout):
        text = "choosing a layout and loading the model"
    else:
        count = 1 if job.config is None else job.config.world_size
        text = f"loading the model in {count} process{'es' if count > 1 else ''}"
    config = PLAIN if job.config is None else job.config
    with view.waiting(text):
        given = (config, job.devices, job.dtype, job.variant, job.threads)
        engine = Engine(job.model, *given, revision=job.revision, **job.choice)
        load_loras(engine, job.loras)
        return engine


def _start_plain(job: Job, engine: Engine, view: View) -> Engine:
    from patchpipe.engine import Engine

    with view.waiting("starting plain diffusers on one device"):
        given = (PLAIN, engine.devices[0], job.dtype, job.variant, engine.threads)
        plain = Engine(job.model, *given, revision=job.revision, **job.choice)
        load_loras(plain, job.loras)
        return plain


def _paint_all(engine: Engine, view: View, job: Job) -> list[Painted]:
    asked = list(job.requests())
    if job.in_flight > 1:
        sets = [asked[at : at + job.in_flight] for at in range(0, len(asked), job.in_flight)]
        placed = zip(sets, job.traces(), strict=True)
        return [painted for one, trace in placed for painted in _paint_together(engine, view, job, one, trace)]
    if job.data == 1:
        places = zip(asked, job.traces(), strict=True)
        return [_paint(engine, view, job, prompt, seed, trace) for (prompt, seed), trace in places]
    prompts, seeds = [prompt for prompt, _ in asked], [seed for _, seed in asked]
    arguments = dict(job.arguments)
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(asked)
    with view.painting(f"{len(asked)} pictures") as on_progress:
        result = engine.generate(prompt=prompts, seed=seeds, on_progress=on_progress, trace=job.trace, **arguments)
    found = clips.frames_of(engine, result)
    view.painted(f"{len(asked)} pictures", job.seed, result)
    return [Painted(prompt, seed, frames, result) for (prompt, seed), frames in zip(asked, found, strict=True)]


def _paint(engine: Engine, view: View, job: Job, prompt: str, seed: int, trace: Path | None) -> Painted:
    with view.painting(prompt) as on_progress, _previewed(job) as previews:
        told = {"on_progress": on_progress, **previews}
        result = engine.generate(prompt=prompt, seed=seed, **told, trace=trace, **job.arguments)
    frames = clips.frames_of(engine, result)[0]
    view.painted(prompt, seed, result)
    return Painted(prompt, seed, frames, result)


@contextmanager
def _previewed(job: Job) -> Iterator[dict[str, Any]]:
    """What to ask an engine for previews with; they are on disk until the picture is done."""
    if job.preview is None:
        yield {}
        return
    assert job.out is not None
    named = job.out.with_suffix(".preview.png")
    file = named if job.force else free_name(named, 1)

    def write(preview: Preview) -> None:
        pictures.write_picture(pictures.as_pictures(preview.images, "the pipeline")[0], file)

    try:
        yield {"on_preview": write, "preview_every": job.preview}
    finally:
        file.unlink(missing_ok=True)


def _paint_together(
    engine: Engine, view: View, job: Job, asked: list[tuple[str, int]], trace: Path | None
) -> list[Painted]:
    calls = [{**job.arguments, "prompt": prompt, "seed": seed} for prompt, seed in asked]
    with view.painting_together([prompt for prompt, _ in asked]) as on_progress:
        results = engine.generate_together(calls, on_progress=on_progress, trace=trace)
    painted = []
    for (prompt, seed), result in zip(asked, results, strict=True):
        view.painted(prompt, seed, result)
        painted.append(Painted(prompt, seed, clips.frames_of(engine, result)[0], result))
    view.together(len(asked), results[0].seconds)
    return painted


def _write(job: Job, engine: Engine, painted: list[Painted]) -> list[Path]:
    files = job.files()
    if job.sheet:
        tiles = [Tile(one.frames, [""], one.prompt) for one in painted]
        pictures.write_picture(pictures.sheet(tiles), files[0])
        return files
    for file, one in zip(files, painted, strict=True):
        if clips.makes(engine):
            clips.write(one.frames, file, clips.speed(engine, job.fps, job.arguments))
        else:
            pictures.write_picture(one.frames[0], file)
    return files


def _write_comparison(job: Job, comparison: Comparison) -> Path:
    many = f"{comparison.devices} device{'s' if comparison.devices > 1 else ''}"
    labels = ("1 device", many if comparison.devices > 1 else "patchpipe")
    tiles = [Tile([pair.one, pair.many], labels, f"{pair.prompt} ({likeness(pair.psnr)})") for pair in comparison.pairs]
    [file] = job.files()
    pictures.write_picture(pictures.sheet(tiles), file)
    return file


def _describe(painted: Painted) -> dict[str, Any]:
    result = painted.result
    return {
        "prompt": painted.prompt,
        "seed": painted.seed,
        "seconds": result.seconds,
        "stats": dict(result.stats),
    }


def _report(job: Job, engine: Engine, files: list[Path], requests: list[dict[str, Any]]) -> None:
    if job.report is None:
        return
    report = {
        "model": job.model,
        "config": None if engine.config is None else engine.config.as_dict(),
        "layout_reason": engine.layout_reason,
        "arguments": job.arguments,
        "loras": engine.loras,
        "in_flight": job.in_flight,
        "ranks": [dataclasses.asdict(rank) for rank in engine.ranks],
        "start_seconds": engine.start_seconds,
        "files": [str(file) for file in files],
        "requests": requests,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    text = json.dumps(report, indent=2, default=_as_text) + "\n"
    if job.report == Path("-"):
        print(text, end="")
    else:
        write_text(text, job.report)


def _as_text(value: Any) -> str:
    size = getattr(value, "size", None)
    return f"picture of {size[0]} × {size[1]}" if isinstance(size, tuple) else str(value)
