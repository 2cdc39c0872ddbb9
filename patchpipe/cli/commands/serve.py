"""``patchpipe serve``: models of this machine behind OpenAI's API."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from patchpipe.cli import options
from patchpipe.serve.fleet.needs import Wanted
from patchpipe.serve.models import Loading, Named, ServedLayout, read_models
from patchpipe.serve.settings import Limits, Settings, read_keys

if TYPE_CHECKING:
    from patchpipe.serve.service import Service
    from patchpipe.serve.spans import Spans

EPILOG = """
[bold]Examples[/]

  The bundled model, and the page at http://127.0.0.1:8000:

  [green]patchpipe serve[/]

  Two models under names of their own:

  [green]patchpipe serve[/] flux=./FLUX.1-dev wan=./Wan2.1-T2V-1.3B --dtype bf16

  For others, with a key:

  [green]PATCHPIPE_API_KEY=$(openssl rand -hex 24) patchpipe serve[/] ./FLUX.1-dev --host 0.0.0.0

  On all nodes of a Ray cluster, two GPUs a replica:

  [green]patchpipe serve[/] ./FLUX.1-dev --ray auto --replica-devices 2

  A picture:

  [green]curl -s localhost:8000/v1/images/generations -H 'content-type: application/json' \
-d '{"prompt": "red heart, flat style"}' | python3 -c 'import base64, json, sys; \
open("heart.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))'[/]
"""
KEY_VARIABLE = "PATCHPIPE_API_KEY"
_NEEDS = ("fastapi", "uvicorn", "multipart", "sqlalchemy", "prometheus_client", "av")
_SERVICE, _SCHEDULING, _FLEET, _LIMITS = "Service", "Devices and scheduling", "Several nodes", "Limits"

Models = Annotated[
    list[str] | None,
    typer.Argument(
        help="Folder or hub id, with a name before it if you like. [dim]Default: the bundled model.[/]",
        metavar="[NAME=]MODEL…",
        show_default=False,
    ),
]
Host = Annotated[
    str, options.option(_SERVICE, "Address to listen on; others than this machine's need a key.", default=True)
]
Port = Annotated[int, options.option(_SERVICE, "Port; 0 takes a free one.", default=True)]
KeyFile = Annotated[
    Path | None,
    options.option(_SERVICE, f"File of API keys, one a line. [dim]Or ${KEY_VARIABLE}.[/]", metavar="FILE"),
]
Origins = Annotated[
    list[str] | None,
    options.option(_SERVICE, "Pages that may call it from browsers; may be repeated.", "--cors-origin", metavar="URL"),
]
Folder = Annotated[Path, options.option(_SERVICE, "Where clips and the queue are kept.", metavar="DIR", default=True)]
DatabaseUrl = Annotated[
    str | None,
    options.option(
        _SERVICE, "Database of the queue, as SQLAlchemy takes it. [dim]Default: SQLite in --folder.[/]", metavar="URL"
    ),
]
KeepHours = Annotated[float, options.option(_SERVICE, "Hours a finished clip is kept; 0 for ever.", default=True)]
LoraFolder = Annotated[
    Path | None, options.option(_SERVICE, ".safetensors files that requests may name.", metavar="DIR")
]
Edits = Annotated[
    bool, options.option(_SERVICE, "Also load an image-to-image pipeline, for /v1/images/edits.", "--edits")
]
Layout = Annotated[
    ServedLayout,
    options.option(
        _SCHEDULING,
        "[bold]auto[/]: the planner's; [bold]exact[/]: only methods that paint as one device; [bold]plain[/]: plain "
        "diffusers; [bold]elastic[/]: the whole model on every device, each request on as many as it needs.",
        default=True,
    ),
]
PolicyName = Annotated[
    str,
    options.option(_SCHEDULING, "Who is next: fcfs, sjf, srtf, edf, genserve or balanced.", "--policy", default=True),
]
DeadlineScale = Annotated[
    float,
    options.option(
        _SCHEDULING,
        "Deadline of a request that names none, as a multiple of its seconds alone on the idle machine.",
        default=True,
    ),
]
Admit = Annotated[bool, options.option(_SCHEDULING, "Refuse at once a request that would be late.", "--admission")]
InFlight = Annotated[int, options.option(_SCHEDULING, "Most pictures painted together.", default=True)]
RayAddress = Annotated[
    str | None,
    options.option(
        _FLEET, "[bold]auto[/] or HOST:PORT: have a Ray cluster paint, on all its nodes.", metavar="ADDRESS"
    ),
]
Replicas = Annotated[
    int | None,
    options.option(_FLEET, "Groups of devices. [dim]Default: as many as there is room for.[/]"),
]
ReplicaDevices = Annotated[int, options.option(_FLEET, "Devices of each, on one node.", default=True)]
DrainSeconds = Annotated[
    float, options.option(_SERVICE, "On SIGTERM: seconds that running pictures get to finish.", default=True)
]
DrainDelay = Annotated[
    float, options.option(_SERVICE, "On SIGTERM: seconds in which requests are still accepted.", default=True)
]
Otlp = Annotated[
    str | None,
    options.option(_SERVICE, "OpenTelemetry collector that gets a span of every request, over HTTP.", metavar="URL"),
]
LogFormat = Annotated[Literal["text", "json"], options.option(_SERVICE, "How the log is written.", default=True)]
MaxPixels = Annotated[int, options.option(_LIMITS, "Pixels of a picture, or of a frame.", default=True)]
MaxFrames = Annotated[int, options.option(_LIMITS, "Frames of a clip.", default=True)]
MaxSteps = Annotated[int, options.option(_LIMITS, "Denoising steps.", default=True)]
MaxPrompt = Annotated[int, options.option(_LIMITS, "Characters of a prompt.", default=True)]
MaxPictures = Annotated[int, options.option(_LIMITS, "Pictures of a request.", default=True)]
MaxBody = Annotated[int, options.option(_LIMITS, "Bytes of a request.", default=True)]
MaxWaiting = Annotated[int, options.option(_LIMITS, "Waiting requests; further ones get status 429.", default=True)]


def serve(
    models: Models = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key_file: KeyFile = None,
    cors_origin: Origins = None,
    edits: Edits = False,
    lora_folder: LoraFolder = None,
    in_flight: InFlight = 1,
    folder: Folder = Path("patchpipe-serve"),
    database: DatabaseUrl = None,
    keep_hours: KeepHours = 24.0,
    drain_seconds: DrainSeconds = 60.0,
    drain_delay: DrainDelay = 0.0,
    log_format: LogFormat = "text",
    otlp: Otlp = None,
    layout: Layout = "auto",
    policy: PolicyName = "balanced",
    deadline_scale: DeadlineScale = 3.0,
    admission: Admit = False,
    devices: options.Devices = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    ray: RayAddress = None,
    replicas: Replicas = None,
    replica_devices: ReplicaDevices = 1,
    max_pixels: MaxPixels = Limits.pixels,
    max_frames: MaxFrames = Limits.frames,
    max_steps: MaxSteps = Limits.steps,
    max_prompt: MaxPrompt = Limits.prompt,
    max_pictures: MaxPictures = Limits.pictures,
    max_body: MaxBody = Limits.body,
    max_waiting: MaxWaiting = Limits.waiting,
    _debug: options.Debug = False,
) -> None:
    """Serve models, of this machine or of several: OpenAI's API, and a page to play with."""
    given = locals()
    settings = _settings(given)
    loading = Loading(layout, options.read_devices(devices), dtype, threads, in_flight)
    named = read_models(models or ())
    _check_installed(loras=lora_folder is not None)
    _run(settings, loading, named, edits, log_format, _wanted(ray, replicas, replica_devices))


def _settings(given: dict[str, Any]) -> Settings:
    lora_folder = given["lora_folder"]
    if lora_folder is not None and not lora_folder.is_dir():
        raise FileNotFoundError(f"--lora-folder {lora_folder}: there is no such folder")
    limits = Limits(**{name.removeprefix("max_"): value for name, value in given.items() if name.startswith("max_")})
    same = (
        "host",
        "port",
        "folder",
        "database",
        "keep_hours",
        "otlp",
        "lora_folder",
        "in_flight",
        "policy",
        "deadline_scale",
        "admission",
    )
    return Settings(
        api_keys=read_keys(given["api_key_file"], os.environ.get(KEY_VARIABLE)),
        origins=tuple(given["cors_origin"] or ()),
        drain_seconds=given["drain_seconds"],
        drain_delay=given["drain_delay"],
        limits=limits,
        **{name: given[name] for name in same},
    )


def _check_installed(loras: bool) -> None:
    needed = (*_NEEDS, "peft") if loras else _NEEDS
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the service needs {', '.join(missing)}: pip install 'patchpipe[serve,lora]'")


def _wanted(ray: str | None, replicas: int | None, replica_devices: int) -> Wanted | None:
    if ray is None:
        if replicas is not None or replica_devices != 1:
            raise ValueError("--replicas and --replica-devices need a Ray cluster: add --ray auto")
        return None
    from patchpipe.serve.fleet.cluster import check_installed

    check_installed()
    return Wanted(ray, replicas, replica_devices)


def _run(
    settings: Settings,
    loading: Loading,
    named: tuple[Named, ...],
    edits: bool,
    log_format: Literal["text", "json"],
    wanted: Wanted | None,
) -> None:
    """Loads and serves; heavy libraries come only now."""
    from patchpipe.engine.processes import warm
    from patchpipe.serve import logs
    from patchpipe.serve.clips.jobs import own
    from patchpipe.serve.start import listen, run

    console = Console(highlight=False)
    logs.set_up(log_format)
    logging.getLogger("patchpipe.engine").setLevel(logging.WARNING)
    # an engine that died is up again at once
    engines = warm() if wanted is None else nullcontext()
    with listen(settings) as listener, own(settings.folder), engines:
        with console.status("loading …") as status:
            service = (
                _on_this_machine(settings, loading, named, edits, lambda name: status.update(f"loading {name} …"))
                if wanted is None
                else _on_a_fleet(settings, loading, named, edits, wanted)
            )
        for model in service.models.values():
            layout = f"{model.facts.pipeline} · {model.facts.layout} · {', '.join(model.facts.devices)}"
            console.print(f"[bold]{escape(model.name)}[/]  [dim]{escape(layout)}[/]", soft_wrap=True)
        run(service, listener, lambda address: console.print(f"listening on [bold]{address}[/]"))


def _on_this_machine(
    settings: Settings, loading: Loading, named: tuple[Named, ...], edits: bool, told: Callable[[str], None]
) -> Service:
    from patchpipe.serve.models import start_models
    from patchpipe.serve.service import Service

    made: list[Service] = []

    def changed() -> None:
        for service in made:
            service.model_changed()

    models = start_models(named, loading, edits=edits, on_change=changed, told=told)
    try:
        made.append(Service(settings, models, spans=_spans(settings)))
        made[0].start()
    except BaseException:
        for model in models:
            model.close()
        raise
    return made[0]


def _spans(settings: Settings) -> Spans | None:
    from patchpipe.serve.spans import spans_to

    return None if settings.otlp is None else spans_to(settings.otlp)


def _on_a_fleet(settings: Settings, loading: Loading, named: tuple[Named, ...], edits: bool, wanted: Wanted) -> Service:
    from patchpipe.serve.fleet.cluster import Cluster
    from patchpipe.serve.fleet.fleet import Fleet
    from patchpipe.serve.fleet.words import Spec, theirs
    from patchpipe.serve.service import Service
    from patchpipe.version import __version__

    spec = Spec(__version__, named, loading, edits, theirs(settings))
    fleet = Fleet(wanted, spec, settings, Cluster(wanted.address))
    try:
        fleet.open()
        service = Service(settings, fleet=fleet, spans=_spans(settings))
        fleet.on_change = service.model_changed
        service.start()
    except BaseException:
        fleet.close()
        raise
    return service
