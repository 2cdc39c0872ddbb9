"""A worker at work: loads its part of the pipeline and answers what the parent asks."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.engine.loras import change_loras
from patchpipe.engine.messages import (
    Call,
    CallTogether,
    Channel,
    Close,
    Done,
    Failed,
    LoadLora,
    OpenStream,
    Previewed,
    RankInfo,
    Ready,
    Start,
    Step,
    UnloadLora,
    Warned,
)
from patchpipe.engine.worker.bar import StepBar
from patchpipe.engine.worker.inbox import Inbox
from patchpipe.engine.worker.oom import out_of_memory
from patchpipe.errors import CANCELLED, Cancelled

_START = 0
_MODEL_NAMES = ("transformer", "unet", "prior")
_TOLD_LOGGERS = ("diffusers", "patchpipe")
_CONSEQUENCES = (
    "connection closed by peer",
    "connection reset",
    "connection refused",
    "broken pipe",
    "socket closed",
    "remote process exited",
    "recvvalue failed",
    "timed out waiting",
    "failed to recv",
)


class Server:
    """Answers the parent's messages with one pipeline.

    Args:
        channel: The way to the parent.
        start: What to load, and where.
    """

    def __init__(self, channel: Channel, start: Start) -> None:
        self._channel = channel
        self._start = start
        self._group: Any = None
        self._pipe: Any = None
        self._request = _START
        self._cancelled = _START  # the last request that was
        self._inbox = Inbox(channel, self._cancel)

    def load(self) -> None:
        """Joins the group, loads this rank's part, and says so; a failure is told and ends the process."""
        try:
            self._pipe = self._load_pipeline()
            ready = self._ready()
        except Exception as error:
            self._channel.send(self._failed(_START, error, clean=False))
            leave(1)
        self._channel.send(ready)

    def serve(self) -> None:
        """Runs requests until told to close."""
        self._inbox.start()
        while True:
            message = self._inbox.next()
            if isinstance(message, Close):
                break
            self._request = message.request
            self._channel.send(self._answer(message))
        if self._group is not None:
            self._group.close()

    def _cancel(self, request: int) -> None:
        """Ends a request, if it is the one under way."""
        self._cancelled = request
        if request == self._request and self._start.config is not None:
            with contextlib.suppress(RuntimeError):  # where the ranks cannot hear each other, it ends anyway
                self._stop()

    def _stop(self) -> None:
        """Has the ranks agree where the request under way ends."""
        self._attachment.cancel()

    def _answer(self, call: Call | CallTogether | LoadLora | UnloadLora | OpenStream) -> Done | Failed:
        began = time.monotonic()
        try:
            if isinstance(call, CallTogether):
                output, stats = self._run_together(call, began), [dict(one.as_dict()) for one in self._attachment.stats]
                return Done(call.request, output, stats, time.monotonic() - began)
            if isinstance(call, OpenStream):
                self._stream(call)
                return Done(call.request, None, None, time.monotonic() - began)
            if isinstance(call, (LoadLora, UnloadLora)):
                change_loras(self._pipe, call)
                return Done(call.request, None, None, time.monotonic() - began)
            output = self._run(call, began)
            return Done(call.request, output, self._stats(), time.monotonic() - began)
        except Exception as error:
            return self._failed(call.request, error, clean=self._usable)

    def _run(self, call: Call, began: float) -> Any:
        import torch

        from patchpipe.engine.requests import decode, portable

        self._pipe.progress_bar = self._bar(call.request, began)
        torch.manual_seed(call.seed)
        arguments = decode(call.arguments)
        with self._warnings(call.request), self._traced(call.trace), self._previewed(call, arguments):
            return portable(self._pipe(**arguments))

    def _previewed(self, call: Call, arguments: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        from patchpipe.engine.requests import portable
        from patchpipe.pipeline.preview import Preview, Previews

        if call.preview is None:
            return contextlib.nullcontext()

        def show(preview: Preview) -> None:
            self._channel.send(Previewed(call.request, preview.step, portable(preview.images)))

        if self._start.config is not None:
            return self._attachment.preview(call.preview, show=show)
        return Previews(call.preview, show).of(self._pipe, type(self._pipe).__call__, arguments)

    def _run_together(self, asked: CallTogether, began: float) -> list[Any]:
        from patchpipe.engine.requests import decode, portable

        calls, seeds = [decode(call.arguments) for call in asked.calls], [call.seed for call in asked.calls]
        bars = [self._bar(asked.request, began, number) for number in range(len(calls))]
        with self._warnings(asked.request), self._traced(asked.trace):
            return [portable(output) for output in self._attachment.together(calls, seeds=seeds, bars=bars)]

    def _stream(self, call: OpenStream) -> None:
        """Serves requests that come and go."""
        from patchpipe.pipeline.streams.serving import serve

        with self._warnings(call.request):
            serve(self._pipe, self._visitors(call.request, self._group, self._attachment.config.timeout))

    def _visitors(self, request: int, group: Any, timeout: float) -> Any:
        """The calls of a stream."""
        from patchpipe.engine.worker.streaming import Visitors

        def bar(call: int, began: float, over: int) -> Callable[..., StepBar]:
            return self._bar(request, began, call, over)

        def failed(error: Exception) -> Failed:
            return self._failed(request, error, clean=True)

        told = {"output": group.output, "bar": bar, "failed": failed}
        return Visitors(request, self._channel, self._inbox.letters, timeout, **told)

    def _bar(self, request: int, began: float, call: int = 0, over: int = 0) -> Callable[..., StepBar]:
        """What stands in for the progress bar of one call, of which some steps may be over."""

        def bar(iterable: Any = None, total: int | None = None) -> StepBar:
            return StepBar(tell, began, iterable, total)

        def tell(step: int, total: int | None, seconds: float) -> None:
            if step <= over:
                return
            self._channel.send(Step(request, step, total, seconds, call))
            if self._cancelled == request:
                if self._start.config is None:
                    raise Cancelled(CANCELLED)
                self._stop()  # should it have been asked for before the request had begun

        return bar

    def _traced(self, trace: str | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if trace is None else self._attachment.tracing(trace)

    @property
    def _attachment(self) -> Any:
        return self._pipe.patchpipe

    @contextlib.contextmanager
    def _warnings(self, request: int) -> Iterator[None]:
        """Tells the parent what is warned of in the block."""
        handler = _WarningTeller(self._channel, request)
        loggers = [logging.getLogger(name) for name in _TOLD_LOGGERS]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)

    def _load_pipeline(self) -> Any:
        import torch

        from patchpipe.loading.dtypes import as_torch

        start = self._start
        torch.set_num_threads(start.threads)
        dtype = None if start.dtype is None else as_torch(start.dtype)
        device = torch.device(start.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if start.config is None:
            return self._load_plain(device, dtype)
        return self._load_parallel(device, dtype)

    def _load_plain(self, device: Any, dtype: Any) -> Any:
        import diffusers

        from patchpipe.loading.choice import load_chosen, named

        options, kind, _ = named(self._start.load_options)
        if dtype is not None:
            options["dtype"] = dtype
        if self._start.variant is not None:
            options["variant"] = self._start.variant
        return load_chosen(kind or diffusers.DiffusionPipeline, os.fsdecode(self._start.path), options).to(device)

    def _load_parallel(self, device: Any, dtype: Any) -> Any:
        from torch.distributed import TCPStore

        from patchpipe.distributed.joining import join
        from patchpipe.pipeline.pretrained import from_pretrained

        start = self._start
        assert start.config is not None
        assert start.store_port is not None
        config = ParallelConfig(**start.config)
        store = TCPStore("127.0.0.1", start.store_port, None, False)
        place = (0, 1) if start.lanes else (start.rank, start.world_size)
        self._group = join(config, rank=place[0], world_size=place[1], store=store, device=device)
        options = {"dtype": dtype, "device": device, "variant": start.variant, "group": self._group}
        return from_pretrained(os.fsdecode(start.path), config, **options, **start.load_options)

    def _ready(self) -> Ready:
        call = inspect.signature(type(self._pipe).__call__).parameters
        names = [name for name, one in call.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        open_ended = any(one.kind is one.VAR_KEYWORD for one in call.values())
        arguments = tuple(name for name in names if name != "self")
        defaults = {name: one.default for name, one in call.items() if isinstance(one.default, (int, float, str))}
        return Ready(_START, self._info(), arguments, open_ended, defaults)

    def _info(self) -> RankInfo:
        import torch

        from patchpipe.loading.quantised import stored_bytes

        model = next((m for m in (getattr(self._pipe, n, None) for n in _MODEL_NAMES) if m is not None), None)
        held = _parameters(model)
        modules = [m for m in self._pipe.components.values() if isinstance(m, torch.nn.Module)]
        return RankInfo(
            rank=self._start.rank,
            pid=os.getpid(),
            device=self._start.device,
            dtype=str(held[0].dtype).removeprefix("torch.") if held else "unknown",
            threads=torch.get_num_threads(),
            pipeline_class=type(self._pipe).__name__,
            transformer_class=type(model).__name__,
            parameters=sum(p.numel() for p in held),
            bytes=sum(stored_bytes(one) for module in modules for one in _parameters(module)),
        )

    def _last(self) -> Any:
        return getattr(getattr(self._pipe, "patchpipe", None), "last", None)

    def _stats(self) -> dict[str, Any]:
        last, offload = self._last(), getattr(getattr(self._pipe, "patchpipe", None), "offload", None)
        told = {} if offload is None else {"offload": offload.as_dict()}
        return {} if last is None else {**last.as_dict(), **told}

    @property
    def _usable(self) -> bool:
        """Whether this worker can serve another request: the ranks have ended the last one at the same point."""
        return self._start.config is None or not self._group.closed

    def _failed(self, request: int, error: Exception, clean: bool) -> Failed:
        advice = out_of_memory(error, self._start.rank, self._start.device)
        secondary = _is_consequence(error)
        return Failed(
            request=request,
            class_name=type(error).__name__ if advice is None else "OutOfMemory",
            message=str(error) if advice is None else advice,
            traceback="".join(traceback.format_exception(error)),
            clean=clean,
            secondary=secondary,
        )


class _WarningTeller(logging.Handler):
    def __init__(self, channel: Channel, request: int) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel
        self._request = request

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Warned(self._request, record.getMessage()))


def _is_consequence(error: Exception) -> bool:
    from patchpipe.errors import RankFailed, RankLost

    text = str(error).lower()
    return isinstance(error, (RankFailed, RankLost)) or any(phrase in text for phrase in _CONSEQUENCES)


def _parameters(module: Any) -> list[Any]:
    return [] if module is None else [p for p in module.parameters() if p.device.type != "meta"]


def leave(code: int) -> None:
    """Exits without the slow and, in a broken group, endless clean-up of a Python with torch in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
