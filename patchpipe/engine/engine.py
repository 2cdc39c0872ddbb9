"""The parent's side: owns the workers, sends requests, hands back pictures."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.engine import requests
from patchpipe.engine.choosing import devices_for, read_wanted, settle
from patchpipe.engine.crew import Crew, listen, serve_store
from patchpipe.engine.devices import threads_per_rank
from patchpipe.engine.loras import describe_lora, loras_without
from patchpipe.engine.messages import CallTogether, RankInfo, UnloadLora
from patchpipe.engine.requests import NUMBERED_LATER, Seed
from patchpipe.engine.results import OnPreview, OnProgress, Result, check_every, result_of
from patchpipe.engine.tickets.checkpoint import Checkpoint
from patchpipe.engine.tickets.desks import Desks
from patchpipe.engine.tickets.elastic import Elastic
from patchpipe.engine.tickets.ticket import Asked, Ticket
from patchpipe.errors import PatchpipeError
from patchpipe.layout.combinations import check_together
from patchpipe.loading.choice import check_choice, choose_for_engine
from patchpipe.loading.dtypes import default_dtype, one_dtype
from patchpipe.loading.options import HUB, for_workers, read_options
from patchpipe.loading.precheck import check_folder
from patchpipe.loading.source import fetch, resolve_source
from patchpipe.parallel.refusals import check_calls

if TYPE_CHECKING:
    import torch


class Engine:
    """A diffusers pipeline spread over worker processes of this machine.

    The workers start at once and live until ``close``, the end of the ``with`` block, or the end of this process.

    Example::

        with patchpipe.Engine(path, patchpipe.ParallelConfig(pipefusion=2)) as engine:
            images = engine(prompt="a red heart, flat style", seed=0)

    Args:
        path: A local folder in diffusers' format, or a hub id.
        config: The layout; ``None`` takes the planner's for the devices there are, an ``AutoLayout`` says more of what
            is wanted of it, an ``Elastic`` gives each request as many ranks as it asks for, ``"plain"`` runs diffusers
            as it is in one worker.
        devices: One device name for all ranks or one for each. ``None`` prefers CUDA devices.
        dtype: ``"bf16"``, ``"fp16"``, ``"fp32"`` or a ``torch.dtype``, or one for each component by name as in
            diffusers; ``torch_dtype`` is the same. ``None`` takes the checkpoint's own, where a rank computes on a CPU
            float32 in place of half precision.
        variant: The checkpoint's variant, such as ``"fp16"``.
        threads: CPU threads of each rank; ``None`` shares the cores evenly.
        start_timeout: Seconds the workers may take to load the model.
        port: The local port the ranks meet at; ``None`` takes a free one.
        **load_options: Further arguments of diffusers' ``from_pretrained``: ``revision``, ``cache_dir``, ``token`` and
            the others of the hub, ``quantization_config``, or components such as ``scheduler``, which may be a name
            such as ``"heun"``. ``pipeline`` takes another pipeline class of diffusers for the same weights, ``task``
            the one its AutoPipeline knows for ``"image-to-image"``, ``"inpainting"`` or ``"text-to-image"``.

    Raises:
        ValueError: An argument is wrong, or the model does not fit the layout.
        TypeError: There is no such argument.
        FileNotFoundError: There is no such model.
        PatchpipeError: A worker could not start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ParallelConfig | AutoLayout | Elastic | Literal["plain"] | None = None,
        devices: str | Sequence[str] | None = None,
        dtype: torch.dtype | str | Mapping[str, Any] | None = None,
        variant: str | None = None,
        threads: int | None = None,
        start_timeout: float = 600.0,
        port: int | None = None,
        **load_options: Any,
    ) -> None:
        if sys.platform == "win32":
            raise PatchpipeError("the engine needs Linux or macOS; on Windows use torchrun")
        began = time.monotonic()
        elastic = self.elastic = config if isinstance(config, Elastic) else None
        wanted = read_wanted(config.widest if isinstance(config, Elastic) else config)
        kind = one_dtype(dtype, load_options.pop("torch_dtype", None))
        source = resolve_source(path, **{name: value for name, value in load_options.items() if name in HUB})
        self.path = source.path
        given, kind_of_pipeline = choose_for_engine(load_options, source.index)
        options = for_workers(read_options(given, source.index, kind_of_pipeline, parallel=wanted is not None))
        devices_of_all = devices_for(wanted, devices, threads)
        folder = fetch(source, variant, {**options.hub, **options.files, **options.load})
        chosen = check_choice(kind_of_pipeline, options.load, source.index, folder)
        if isinstance(wanted, ParallelConfig):
            check_folder(folder, wanted, options.load)
        kind = kind or default_dtype(folder, variant, devices_of_all)
        self._lock = threading.Lock()
        self._loras: dict[str, float] = {}  # strengths of what is loaded
        listener = None if wanted is None else listen(port)
        self._crew = Crew(devices_of_all, threads_per_rank(threads, len(devices_of_all)), offline=source.offline)
        try:
            self.config, self.layout_reason = settle(wanted, self._crew, folder, kind, options.load, start_timeout)
            layout = self.config or ParallelConfig()
            self._crew.take(layout, threads_per_rank(threads, layout.world_size))
            self._crew.store = None if listener is None else serve_store(listener)
            load, lanes = {**options.for_pipeline, **chosen}, elastic.layouts if elastic else ()
            held = elastic.of(1) if elastic else self.config
            ready = self._crew.start(folder, held, kind, variant, load, start_timeout, lanes)
        except BaseException:
            self._crew.abandon()
            raise
        self.ranks: tuple[RankInfo, ...] = tuple(message.info for message in ready)
        self._desks = Desks(self._crew, self._lock, elastic)
        self._ready = ready[(self.config or ParallelConfig()).output_rank]
        self.start_seconds = time.monotonic() - began

    def __call__(
        self,
        *args: Any,
        seed: Seed = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 5,
        trace: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the pipeline and returns its pictures; see ``generate``."""
        told: dict[str, Any] = {"on_progress": on_progress, "on_preview": on_preview, "preview_every": preview_every}
        return self.generate(*args, seed=seed, **told, trace=trace, **kwargs).images

    def generate(
        self,
        *args: Any,
        seed: Seed = None,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
        preview_every: int = 5,
        trace: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Result:
        """Runs the pipeline once.

        Args:
            *args: The pipeline's first arguments by position, usually the prompt.
            seed: Seed of the noise, one for all pictures or one for each. ``None`` takes a fresh one.
            on_progress: Called after each step. If it raises, the request is cancelled.
            on_preview: Called with approximate pictures on the way, which the request does not wait for; likewise.
            preview_every: Steps between them.
            trace: File (``NAME.json``) for the timeline of the request, which ``patchpipe trace`` draws.
            **kwargs: The pipeline's arguments by name.

        Raises:
            ValueError: The request is wrong; the engine stays usable.
            TypeError: The pipeline takes no such argument; the engine stays usable.
            Cancelled: ``cancel`` was called; the engine stays usable.
            RankFailed: A worker failed; the engine is closed unless all ranks could end the request (see ``closed``).
            RankLost: A worker died or fell silent; the engine is closed.
        """
        if self.elastic is not None and on_preview is None and trace is None:
            return self.submit(*args, seed=seed, on_progress=on_progress, **kwargs).result()
        with self._free():
            self._check_open()
            place = requests.trace_place(trace, plain=self.config is None)
            call, used = requests.asked(self._ready, requests.named(self._ready, args, kwargs), seed, place)
            if on_preview is not None:
                call = replace(call, preview=check_every(preview_every))
            began = time.monotonic()
            done = self._crew.run(call, on_progress, on_preview)
            seconds = time.monotonic() - began
        return result_of(done.output, seconds, done.stats, used)

    def together(
        self,
        calls: Sequence[Mapping[str, Any]],
        *,
        on_progress: OnProgress | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> list[Any]:
        """Runs several calls in flight together and returns the pictures of each; see ``generate_together``."""
        return [one.images for one in self.generate_together(calls, on_progress=on_progress, trace=trace)]

    def generate_together(
        self,
        calls: Sequence[Mapping[str, Any]],
        *,
        on_progress: OnProgress | None = None,
        trace: str | os.PathLike[str] | None = None,
    ) -> list[Result]:
        """Runs the pipeline several times at once: what one call leaves idle of the stages works for another.

        Every call gives what it gives alone. Keys and values are in memory once for each.

        Args:
            calls: The arguments of each call by name, ``seed`` among them if it is to have one.
            on_progress: Called after each step of each call; ``Progress.call`` tells which.
            trace: File (``NAME.json``) for the timeline of all of them.

        Returns:
            What each call came to, in order. ``seconds`` is the time all of them took.

        Raises:
            ValueError: A call is wrong, and nothing is painted; the engine stays usable.
            TypeError: The pipeline takes no such argument; the engine stays usable.
            Cancelled: ``cancel`` was called; the engine stays usable.
            RankFailed: A worker failed; the engine is closed unless all ranks could end the request (see ``closed``).
            RankLost: A worker died or fell silent; the engine is closed.
        """
        with self._free():
            self._check_open()
            self._check_together()
            place = requests.trace_place(trace, plain=self.config is None)
            check_calls(calls)
            own = [{name: value for name, value in call.items() if name != "seed"} for call in calls]
            asked = [
                requests.asked(self._ready, arguments, call.get("seed"))
                for arguments, call in zip(own, calls, strict=True)
            ]
            began = time.monotonic()
            done = self._crew.run(CallTogether(NUMBERED_LATER, tuple(call for call, _ in asked), place), on_progress)
            seconds = time.monotonic() - began
        made = zip(done.output, done.stats, asked, strict=True)
        return [result_of(output, seconds, stats, used) for output, stats, (_, used) in made]

    def submit(
        self,
        *args: Any,
        seed: Seed = None,
        on_progress: OnProgress | None = None,
        on_state: Callable[[Ticket], None] | None = None,
        checkpoint: Checkpoint | None = None,
        ranks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Ticket:
        """Takes in a request that runs beside others, joins them at a step, and can be paused; returns at once.

        Requests in flight share the stages as in ``together``. A call of ``generate`` waits until all of them are over.

        Args:
            *args: The pipeline's first arguments by position.
            seed: As for ``generate``.
            on_progress: Called after each step, from another thread; ``Progress.call`` is the ticket's number. If it
                raises, the request is cancelled, and ``Ticket.result`` raises that.
            on_state: Called with the ticket when its state changes; likewise.
            checkpoint: What it goes on from; the arguments are then those it began with, ``seed`` among them.
            ranks: Those that serve it, of an ``Elastic`` engine; ``None`` takes all.
            **kwargs: The pipeline's arguments by name.

        Raises:
            ValueError: An argument's value is wrong, or the layout is not tested with requests in flight together.
            TypeError: The pipeline takes no such argument.
        """
        self._check_open()
        self._check_together()
        named = requests.named(self._ready, args, kwargs)
        call, used = requests.asked(self._ready, named, seed)
        state = None if checkpoint is None else checkpoint.data
        return self._desks.submit(Asked({**named, "seed": used}, call, used, state, on_progress, on_state), ranks)

    def cancel(self) -> bool:
        """Ends the request under way, from another thread; the call that waits for it raises ``Cancelled``.

        All ranks stop at the next call of the transformer, and the engine serves the next request. Of requests in
        flight together all are cancelled; those that wait for their turn are not. Ctrl-C, and an ``on_progress`` that
        raises, do the same.

        Returns:
            Whether there was a request. One whose last step is over gives its picture all the same.
        """
        return self._desks.cancel()

    def load_lora(
        self,
        path: str | os.PathLike[str],
        weight_name: str | None = None,
        name: str | None = None,
        scale: float = 1.0,
    ) -> str:
        """Loads a LoRA beside those that are loaded; requests from here on are painted with it.

        A rank keeps the part that belongs to its own blocks. Needs the package ``peft``.

        Args:
            path: A ``.safetensors`` file, a folder with one, or a hub id.
            weight_name: The file's name, where a folder or the hub has several.
            name: What to call it; ``None`` takes the file's name.
            scale: Its strength; 1 is the one it was trained with.

        Returns:
            Its name.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The pipeline takes no LoRA, this one matches none of its layers, or the name is taken; the
                engine stays usable.
        """
        with self._free():
            self._check_open()
            message = describe_lora(path, weight_name, name, scale, self._loras)
            self._crew.run(message, None)
            self._loras = dict(message.strengths)
        return message.name

    def unload_lora(self, name: str | None = None) -> None:
        """Unloads one LoRA, or all of them.

        Args:
            name: As ``load_lora`` returned it; ``None`` for all.

        Raises:
            ValueError: There is none of that name.
        """
        with self._free():
            self._check_open()
            left = loras_without(self._loras, name)
            if self._loras:
                self._crew.run(UnloadLora(NUMBERED_LATER, name, left), None)
            self._loras = left

    @property
    def loras(self) -> dict[str, float]:
        """The strength of each LoRA that is loaded, by name."""
        return dict(self._loras)

    def _check_together(self) -> None:
        if self.config is None:
            raise ValueError("plain diffusers runs one request at a time: give the engine config=ParallelConfig()")
        check_together(self.config.methods, self.config.compile)

    def _free(self) -> threading.Lock:
        """The engine for one call, which waits for others; not for requests that are paused."""
        self._desks.check_free()
        return self._lock

    def _check_open(self) -> None:
        if self.closed:
            raise PatchpipeError("the engine is closed: make a new one")

    @property
    def closed(self) -> bool:
        """Whether the workers are gone."""
        return self._crew.closed

    @property
    def alive(self) -> bool:
        """Whether all workers run."""
        return self._crew.alive

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of each rank."""
        return self._crew.devices

    @property
    def threads(self) -> int:
        """CPU threads of each rank."""
        return self._crew.threads

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments the pipeline's call takes."""
        return self._ready.arguments

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What those of them that are numbers or text are by default."""
        return self._ready.defaults

    def describe(self) -> str:
        """A few lines for people: the model, the layout, and what each rank holds."""
        first = self.ranks[0]
        layout = "plain diffusers, one device" if self.config is None else self.config.describe()
        model = f"{first.pipeline_class} ({first.transformer_class}, {first.dtype}) from {self.path}"
        return "\n".join([model, layout, *(rank.describe() for rank in self.ranks)])

    def close(self) -> None:
        """Ends the workers; safe to call again."""
        self._desks.close()
        self._crew.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self._crew.abandon()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.devices)} workers on {', '.join(self.devices)}"
        return f"Engine({self.path!r}, {state})"
