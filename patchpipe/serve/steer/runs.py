"""Has engines do what was decided: begins, holds, saves and ends one part, and tells what became of it.

Nothing here waits for an engine in the caller's thread: each model has a ``Hand``, a thread that calls its engine, so
that one that hangs holds up no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

from patchpipe.errors import Cancelled, PatchpipeError
from patchpipe.serve.steer.parts import Part
from patchpipe.serve.work.model import Model
from patchpipe.serve.work.tickets import Partial

if TYPE_CHECKING:
    from patchpipe.engine import Checkpoint, Engine, Preview, Progress
    from patchpipe.engine import Ticket as Handle

SAVE_SECONDS = 600.0  # to the end of the step under way, at the longest
What = Literal["going", "stepped", "paused", "saved", "not saved", "done", "failed"]


@dataclass(frozen=True)
class News:
    """What became of a part.

    Attributes:
        part: The part.
        run: In which run of it; news of an earlier one is old.
        what: What happened.
        when: The time.
        step: Steps over, of ``stepped``.
        total: Steps in all, where known.
        output: The picture or the frames, of ``done``.
        error: Of ``failed`` and ``not saved``.
        kept: Its state, of ``saved``.
    """

    part: Part
    run: Run
    what: What
    when: float
    step: int = 0
    total: int | None = None
    output: Any = None
    error: BaseException | None = None
    kept: Checkpoint | None = None


Post = Callable[[News], None]


class Hand:
    """The thread that calls one model's engine.

    Args:
        model: The model.
        loras: Where LoRAs are, by name.

    Attributes:
        model: The model.
        loras: Those that the engine painted with last.
    """

    def __init__(self, model: Model, loras: Path | None) -> None:
        self.model, self._folder = model, loras
        self.loras: tuple[tuple[str, float], ...] = ()
        self._calls = ThreadPoolExecutor(1, f"engine of {model.name}")

    def do(self, call: Callable[[], object]) -> None:
        """Calls it in turn; what it raises is lost, so it must tell itself."""
        self._calls.submit(call)

    def close(self) -> None:
        """Ends the thread, without waiting."""
        self._calls.shutdown(wait=False, cancel_futures=True)

    def change_loras(self, engine: Engine, wanted: tuple[tuple[str, float], ...]) -> None:
        """Has the engine paint with these LoRAs and no others."""
        loaded = engine.loras
        self.loras = tuple(sorted(loaded.items()))
        for name, scale in loaded.items():
            if (name, scale) not in wanted:
                engine.unload_lora(name)
        for name, scale in wanted:
            if (name, scale) not in loaded.items():
                assert self._folder is not None
                engine.load_lora(self._folder / f"{name}.safetensors", name=name, scale=scale)
        self.loras = wanted


class Run:
    """One run of a part as a ticket of its engine.

    Args:
        part: The part.
        hand: Who calls the engine.
        post: Takes news, from any thread.

    Attributes:
        part: The part.
        carried: Whether it goes on from what was kept.
        engine: The engine, once it is asked.
        taken: Whether the engine has taken it.
    """

    def __init__(self, part: Part, hand: Hand, post: Post) -> None:
        self.part, self._hand, self._post = part, hand, post
        self.carried = part.kept is not None
        self.engine: Engine | None = None
        self.taken = False
        self._handle: Handle | None = None
        self._ended = False  # its last news is told

    def start(self) -> None:
        """Begins it, or goes on from what was kept."""
        self._hand.do(self._start)

    def pause(self) -> None:
        """Holds it when the step under way is over."""
        self._ask(lambda handle: handle.pause())

    def resume(self) -> None:
        """Lets it go on, or takes a pause back."""
        self._ask(lambda handle: handle.resume())

    def cancel(self) -> None:
        """Ends it when the step under way is over."""
        self._ask(lambda handle: handle.cancel())

    def save(self) -> None:
        """Ends it when the step under way is over, and keeps its state."""
        self._ask(lambda handle: threading.Thread(target=self._save, args=(handle,), daemon=True).start())

    def tell(self, what: What, **more: Any) -> None:
        """Tells news of it."""
        self._post(News(self.part, self, what, monotonic(), **more))

    def end(self, what: What, **more: Any) -> None:
        """Tells its last news."""
        if not self._ended:
            self._ended = True
            self.tell(what, **more)

    # -- in the hand's thread ----------------------------------------------------------------------

    def _ask(self, call: Callable[[Handle], None]) -> None:
        def ask() -> None:
            if self._handle is None or self._ended:
                return
            try:
                call(self._handle)
            except (PatchpipeError, OSError) as error:  # the workers take no messages
                self.end("failed", error=error)

        self._hand.do(ask)

    def _start(self) -> None:
        part, work = self.part, self.part.ticket.work
        try:
            engine = self.engine = self._hand.model.engine
            self._hand.change_loras(engine, work.loras)
            ranks = part.devices if engine.elastic is not None else None
            told: dict[str, Any] = {"on_progress": self._stepped, "on_state": self._became, "ranks": ranks}
            self._handle = engine.submit(seed=part.seed, checkpoint=part.kept, **told, **work.arguments)
            self.taken = True
        except BaseException as error:
            self.end("failed", error=error)

    def _save(self, handle: Handle) -> None:
        try:
            kept = handle.checkpoint(SAVE_SECONDS)
        except ValueError as error:  # it cannot be carried, and goes on
            self.tell("not saved", error=error)
        except TimeoutError as error:
            handle.cancel()
            self.end("failed", error=error)
        except PatchpipeError:
            return  # it was over before, and has told so
        else:
            self.end("saved", kept=kept)

    # -- in the engine's threads -------------------------------------------------------------------

    def _stepped(self, progress: Progress) -> None:
        self.tell("stepped", step=progress.step, total=progress.total)

    def _became(self, handle: Handle) -> None:
        state = handle.state
        if state == "running":
            self.tell("going")
        elif state == "paused":
            self.tell("paused")
        elif state == "done":
            self.end("done", output=one_output(handle.result(0).images))
        elif state in ("failed", "cancelled"):
            self.end("failed", error=_error_of(handle))


class WholeRun(Run):
    """One run of a part that has its engine to itself to the end: for pictures on the way, or under plain diffusers."""

    def __init__(self, part: Part, hand: Hand, post: Post) -> None:
        super().__init__(part, hand, post)
        self._cancelled = threading.Event()
        self._painting = threading.Lock()
        self._now = False

    def start(self) -> None:
        """See ``Run``."""
        threading.Thread(target=self._paint, name=f"paint {self.part.id}", daemon=True).start()

    def pause(self) -> None:
        """It goes on to its end."""

    def resume(self) -> None:
        """It does."""

    def save(self) -> None:
        """It cannot be saved."""
        self.tell("not saved", error=ValueError("it runs to its end"))

    def cancel(self) -> None:
        """See ``Run``."""
        self._cancelled.set()
        with self._painting:  # the engine must not have gone on to another request
            if self._now and self.engine is not None:
                self._hand.do(self.engine.cancel)

    def _paint(self) -> None:
        part, work = self.part, self.part.ticket.work
        try:
            engine = self.engine = self._hand.model.engine
            self._hand.change_loras(engine, work.loras)
            with self._painting:
                self._now = self.taken = True
            self.tell("going")
            told = {"on_progress": self._followed, **self._previews()}
            result = engine.generate(seed=part.seed, **told, **work.arguments)
        except BaseException as error:
            self._over()
            self.end("failed", error=error)
        else:
            self._over()
            self.end("done", output=one_output(result.images))

    def _over(self) -> None:
        with self._painting:
            self._now = False

    def _followed(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise Cancelled("nobody wants it any more")
        self._stepped(progress)

    def _previews(self) -> dict[str, Any]:
        """What to ask the engine for pictures on the way with: evenly spread, without the last one."""
        ticket = self.part.ticket
        wanted, steps = ticket.work.previews, self.part.total
        if not wanted or self.part.number:
            return {}
        shown: list[int] = []

        def show(preview: Preview) -> None:
            if len(shown) < wanted and preview.step < steps:
                ticket.tell(Partial(len(shown), one_output(preview.images)))
                shown.append(preview.step)

        return {"on_preview": show, "preview_every": max(1, steps // (wanted + 1))}


def one_output(images: Any) -> Any:
    """The only picture or clip of a pipeline's output."""
    return images[0] if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) > 3 else images


def _error_of(handle: Handle) -> BaseException:
    try:
        handle.result(0)
    except BaseException as error:
        return error
    return PatchpipeError(f"the request is {handle.state}")
