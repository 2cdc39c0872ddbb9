"""Approximate pictures while a request runs, made beside it: the pipe does not wait for them.

When the transformer has taken a step's latent in, the first stage holds all of it: nothing need be waited for. That
latent and the one before point to the picture the model is heading for. A thread of the output rank then runs the
pipeline's own code once more, on a copy whose transformer does nothing and whose scheduler answers with that latent:
what is left of the pipeline is its way from latent to picture.
"""

from __future__ import annotations

import copy
import inspect
import io
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.agreement import attempt
from patchpipe.lazy.latent import PatchTensor
from patchpipe.lockstep.board import Board
from patchpipe.models import transformers_of
from patchpipe.pipeline.callbacks import NAMES

logger = logging.getLogger("patchpipe")


@dataclass(frozen=True)
class Preview:
    """What a picture looks like on the way.

    Attributes:
        step: Steps that are over.
        images: The pictures, as the pipeline's output has them.
    """

    step: int
    images: Any


Show = Callable[[Preview], None]


class Previews:
    """Makes previews of the requests of one pipeline.

    Args:
        every: Steps between previews.
        show: Called with each on the output rank, in a thread of its own.
        first: Whether this rank sees the latent.
        output: Whether this rank decodes it.

    Raises:
        ValueError: ``every`` is no number of steps.
    """

    def __init__(self, every: int, show: Show, *, first: bool = True, output: bool = True) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r} must be a number of steps, 1 or more")
        self._every, self._show, self._first, self._output = every, show, first, output
        self._board: Board | None = None
        self._due: tuple[int, Tensor, Tensor, int | None] | None = None  # what the next step finds computed
        self._steps = 0
        self._texts: list[Any] = []
        self._jobs: queue.Queue[tuple[int, Tensor | None] | None] = queue.Queue()
        self._painter: threading.Thread | None = None
        self._closing = threading.Event()

    @contextmanager
    def of(
        self, pipe: Any, run: Callable[..., Any], arguments: Mapping[str, Any], board: Board | None = None
    ) -> Iterator[None]:
        """Makes previews of one request in the block.

        Args:
            pipe: The pipeline.
            run: Its ``__call__``, not bound.
            arguments: What it is called with, by name.
            board: Where ranks write to each other, if there are several.
        """
        self._board, self._due, self._steps, self._texts = board, None, 0, []
        scheduler = pipe.scheduler
        undo = [_replace(scheduler, "step", self._step(scheduler, scheduler.step))]
        if hasattr(pipe, "encode_prompt"):
            undo.append(_replace(pipe, "encode_prompt", self._encode(pipe.encode_prompt)))
        if self._output:
            given = (pipe, run, arguments, torch.get_num_threads())
            self._painter = threading.Thread(target=self._paint_all, args=given, name="previews", daemon=True)
            self._painter.start()
        try:
            yield
        except BaseException:
            self._closing.set()  # what was to be shown is not waited for
            raise
        finally:
            for put_back in undo:
                put_back()
            self.finish()
            self._closing.clear()

    def finish(self) -> None:
        """Waits until no preview is being made; from here on none of this request will be."""
        painter, self._painter = self._painter, None
        if painter is not None:
            self._jobs.put(None)
            painter.join()
            self._jobs = queue.Queue()
        self._due = None

    # -- beside the request ----------------------------------------------------------------------

    def _encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            text = encode(*args, **kwargs)
            self._texts.append(text)
            return text

        return noted

    def _step(self, scheduler: Any, step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            self._take_due(scheduler)
            result = step(model_output, timestep, sample, *args, **kwargs)
            self._steps += 1
            if self._steps % self._every == 0:
                made = result[0] if isinstance(result, tuple) else result.prev_sample
                self._due = (self._steps, sample, made, getattr(scheduler, "step_index", None))
            return result

        return noted

    def _take_due(self, scheduler: Any) -> None:
        """Now the transformer has taken in what was due, so that all of it is there."""
        if self._due is None or not (self._first or self._output):
            return
        (step, before, after, index), self._due = self._due, None
        clean: Tensor | None = None
        if self._first:
            with torch.no_grad():
                clean = heading(scheduler, index, _whole(before), _whole(after)).detach()
            if not self._output:
                assert self._board is not None
                buffer = io.BytesIO()
                torch.save(clean.cpu(), buffer)
                self._board.hand_over(f"preview {step}", buffer.getvalue())
        if self._output and self._jobs.qsize() < 2:  # else the pictures come slower than they are asked for
            self._jobs.put((step, clean))

    # -- the output rank's thread ----------------------------------------------------------------

    def _paint_all(self, pipe: Any, run: Callable[..., Any], arguments: Mapping[str, Any], threads: int) -> None:
        torch.set_num_threads(threads)  # a new thread would take all cores
        while (job := self._jobs.get()) is not None:
            step, clean = job
            if self._closing.is_set():
                continue
            _, problem = attempt(partial(self._paint, pipe, run, arguments, step, clean))
            if problem is not None and not self._closing.is_set():
                logger.warning("no preview of step %d: %s: %s", step, type(problem).__name__, problem)

    def _paint(
        self, pipe: Any, run: Callable[..., Any], arguments: Mapping[str, Any], step: int, clean: Tensor | None
    ) -> None:
        if clean is None:
            assert self._board is not None
            data = self._board.taken_over(f"preview {step}", self._closing)
            clean = torch.load(io.BytesIO(data), weights_only=True)
        with _beside(pipe._execution_device, clean):
            output = run(_still(pipe, clean, list(self._texts)), **_quiet(run, arguments))
        images = output[0] if isinstance(output, tuple) else next(iter(output.values()))
        self._show(Preview(step, images))


@contextmanager
def _beside(device: torch.device, clean: Tensor) -> Iterator[None]:
    """On a GPU, work in the block has a stream of its own, which begins when the latent is there."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        if clean.is_cuda:
            clean.record_stream(stream)
        yield
        stream.synchronize()


def heading(scheduler: Any, index: int | None, before: Tensor, after: Tensor) -> Tensor:
    """The latent that two successive ones point to: what is left when the noise they share is taken out.

    Exact where the model's prediction stays what it is, for a solver of first order; near enough to look at for others.

    Args:
        scheduler: That made the step.
        index: Which step comes next, where the scheduler tells.
        before: The latent before the step.
        after: The same after it.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if index is None or not isinstance(sigmas, Tensor) or not 0 < index < len(sigmas):
        return after
    (signal, noise), (next_signal, next_noise) = (_strengths(scheduler, sigmas[at]) for at in (index - 1, index))
    scale = signal * next_noise - next_signal * noise
    if abs(scale) < 1e-6:
        return after
    return ((before.float() * next_noise - after.float() * noise) / scale).to(after.dtype)


def _strengths(scheduler: Any, sigma: Tensor) -> tuple[float, float]:
    """How much of the picture and of the noise is in a latent."""
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        signal, noise = scheduler._sigma_to_alpha_sigma_t(sigma)
        return float(signal), float(noise)
    if hasattr(scheduler, "alphas_cumprod"):
        return 1.0, float(sigma)
    return 1.0 - float(sigma), float(sigma)  # flow matching


def _whole(latent: Tensor) -> Tensor:
    """A latent whose patches have all been computed; nothing is waited for."""
    if not isinstance(latent, PatchTensor) or latent.materialised:
        return latent.materialise("preview") if isinstance(latent, PatchTensor) else latent
    return torch.cat([latent.patch(index) for index in range(len(latent.bounds) - 1)], latent.cut_dim)


# ------------------------------------------------------------------------ the pipeline without its work


class _Stand:
    """Stands in for a part of the pipeline: its attributes, other methods."""

    def __init__(self, part: Any, **methods: Any) -> None:
        self.__dict__.update(methods, _part=part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_part"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["run"](*args, **kwargs)


def _still(pipe: Any, clean: Tensor, texts: list[Any]) -> Any:
    """A copy of the pipeline whose loop ends with a given latent."""
    copied = copy.copy(pipe)
    own = vars(copied)
    device = pipe._execution_device
    clean = clean.to(device)
    encoded = iter(texts)
    own["encode_prompt"] = lambda *args, **kwargs: next(encoded)
    own["progress_bar"] = _NoBar
    nothing = {"run": _no_work, "cache_context": lambda *_: nullcontext(), "_reset_stateful_cache": lambda *_: None}
    for name, part in transformers_of(pipe).items():
        own[name] = _Stand(part, **nothing)
    vae, kind = pipe.vae, type(pipe.vae)
    whole = {name: getattr(kind, name).__get__(vae) for name in ("decode", "encode") if hasattr(kind, name)}
    own["vae"] = _Stand(vae, **whole)  # not the ones that all ranks run together
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    answer = type("Answer", (tuple,), {"prev_sample": clean})((clean,))
    scheduler.step = lambda *args, **kwargs: answer
    own["scheduler"] = scheduler
    return copied


def _no_work(*args: Any, **kwargs: Any) -> Any:
    latent = kwargs.get("hidden_states", args[0] if args else None)
    return type("Prediction", (tuple,), {"sample": latent})((latent,))


class _NoBar:
    """A progress bar that shows nothing."""

    def __init__(self, iterable: Iterable[Any] = (), total: int | None = None) -> None:
        self._iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def update(self, *_: Any) -> None:
        """Nothing to show."""

    set_postfix = set_description = close = update


def _quiet(run: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments without what others hear or draw from."""
    quiet = {name: value for name, value in arguments.items() if name not in NAMES}
    if "generator" in inspect.signature(run).parameters:
        quiet["generator"] = torch.Generator().manual_seed(0)
    return quiet


def _replace(owner: Any, name: str, value: Any) -> Callable[[], None]:
    had, previous = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, value)
    return lambda: object.__setattr__(owner, name, previous) if had else object.__delattr__(owner, name)
