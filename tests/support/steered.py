"""A service on engines that only pretend to paint, in this process: for what the service decides and does about it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from patchpipe.engine import Elastic, Progress
from patchpipe.errors import Cancelled, PatchpipeError, RankLost
from patchpipe.serve.service import Service
from patchpipe.serve.settings import Settings
from patchpipe.serve.work.model import Facts, Model
from patchpipe.serve.work.tickets import Ended, Event, Painted, Ticket, Work

STEP = 0.004  # seconds
ARGUMENTS = frozenset({"prompt", "height", "width", "num_inference_steps", "guidance_scale", "num_frames"})


class Pretended:
    """A ticket of an engine that pretends: a thread that takes steps, with what ``engine.Ticket`` can do."""

    def __init__(self, engine: Engine, number: int, arguments: dict[str, Any], told: dict[str, Any]) -> None:
        self.engine, self.number, self.arguments, self.told = engine, number, arguments, told
        self.ranks = told["ranks"] or engine.all
        self.state, self.step = "waiting", getattr(told["checkpoint"], "step", 0)
        self.wish: str | None = None
        self.waking: list[str | None] = []  # why it is held no more; a pause that follows is for the next step
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self.paint, daemon=True).start()

    def paint(self) -> None:
        steps = self.arguments.get("num_inference_steps", 4)
        try:
            self.become("running")
            if self.arguments["prompt"] == "wrong":
                raise ValueError("wrong")
            while self.step < steps:
                if self.arguments["prompt"] == "deadly" and self.step == 2:
                    self.engine.die("it was killed")
                time.sleep(STEP)
                if self.error is not None:
                    raise self.error
                self.step += 1
                self.told["on_progress"](Progress(self.step, steps, 0.0, self.number))
                if self.step < steps and self.obey() == "cancel":
                    raise Cancelled("cancelled")
            self.become("done")
        except KeyboardInterrupt:
            self.become("saved")
        except BaseException as error:
            self.error = error
            self.become("cancelled" if isinstance(error, Cancelled) else "failed")

    def obey(self) -> str | None:
        with self.changed:
            wish, self.wish = self.wish, None
            if wish == "pause":
                self.waking = []
                self.become("paused")
                self.changed.wait_for(lambda: self.waking or self.error is not None)
                if self.error is not None:
                    raise self.error
                wish = self.waking[0]
                if wish is None:
                    self.become("running")
        if wish == "save":
            if not self.engine.carries:
                self.become("running")
                self.problem = ValueError("cannot be carried")
                return None
            raise KeyboardInterrupt
        return wish

    def become(self, state: str) -> None:
        if self.state in ("failed", "cancelled", "done", "saved"):
            return
        with self.changed:
            before, self.state = self.state, state
            self.changed.notify_all()
        self.engine.note(self)
        self.engine.floor.note(self)
        if before != state:
            self.told["on_state"](self)

    def ask(self, wish: str | None) -> None:
        with self.changed:
            if self.state != "paused" or self.waking:
                self.wish = wish
            elif wish != "pause":
                self.waking = [wish]
            self.changed.notify_all()

    def pause(self) -> None:
        self.ask("pause")

    def resume(self) -> None:
        self.ask(None)

    def cancel(self) -> None:
        self.ask("cancel")

    problem: BaseException | None = None

    def checkpoint(self, timeout: float) -> Any:
        self.problem = None
        self.ask("save")
        over = ("failed", "cancelled", "done", "saved")
        with self.changed:
            assert self.changed.wait_for(lambda: self.problem is not None or self.state in over, 20)
        if self.problem is not None:
            raise self.problem
        if self.state != "saved":
            raise PatchpipeError("it is over")
        return SimpleNamespace(step=self.step)

    def result(self, timeout: float | None = None) -> Any:
        if self.state == "done":
            picture = Image.new("RGB", (16, 16))
            return SimpleNamespace(images=[[picture] * 5 if "num_frames" in self.arguments else picture])
        raise self.error or PatchpipeError(self.state)


class Floor:
    """The devices under several engines; notes what never may be: requests of two engines that run on one."""

    def __init__(self) -> None:
        self.running: set[Pretended] = set()
        self.crowds: list[str] = []
        self.lock = threading.Lock()

    def note(self, ticket: Pretended) -> None:
        with self.lock:
            self.running.discard(ticket)
            if ticket.state != "running":
                return
            for other in self.running:
                if other.engine is not ticket.engine and set(other.ranks) & set(ticket.ranks):
                    self.crowds.append(f"{ticket.arguments['prompt']} joins {other.arguments['prompt']}")
            self.running.add(ticket)


class Engine:
    """Has the ranks of an elastic engine, or all as one; notes what never may be: two groups on one rank."""

    def __init__(self, ranks: int, carries: bool = True, elastic: bool = True, floor: Floor | None = None) -> None:
        self.floor = floor or Floor()
        self.elastic = Elastic(ranks) if elastic else None
        self.all, self.carries = tuple(range(ranks)), carries
        self.closed, self.loras, self.numbers = False, {}, itertools.count(1)
        self.open: dict[int, Pretended] = {}
        self.clashes: list[str] = []
        self.ran: list[tuple[str, tuple[int, ...]]] = []
        self.lock = threading.RLock()

    @property
    def alive(self) -> bool:
        return not self.closed

    def submit(self, *, seed: int, checkpoint: Any, on_progress: Any, on_state: Any, ranks: Any, **asked: Any) -> Any:
        if self.closed:
            raise PatchpipeError("the engine is closed")
        told = {"checkpoint": checkpoint, "on_progress": on_progress, "on_state": on_state, "ranks": ranks}
        with self.lock:
            ticket = Pretended(self, next(self.numbers), {**asked, "seed": seed}, told)
            self.open[ticket.number] = ticket
            self.ran.append((asked["prompt"], ticket.ranks))
        return ticket

    def note(self, ticket: Pretended) -> None:
        with self.lock:
            if ticket.state not in ("running", "paused", "waiting"):
                self.open.pop(ticket.number, None)
            for one, two in itertools.combinations(self.open.values(), 2):
                if one.ranks != two.ranks and set(one.ranks) & set(two.ranks):
                    self.clashes.append(f"{one.arguments['prompt']} {one.ranks}, {two.arguments['prompt']} {two.ranks}")

    def die(self, why: str) -> None:
        self.closed = True
        for ticket in list(self.open.values()):
            with ticket.changed:
                ticket.error = RankLost(why)
                ticket.changed.notify_all()

    def close(self) -> None:
        self.die("the engine was closed")


class Heard:
    """What the clients were told."""

    def __init__(self) -> None:
        self.ends: dict[str, Painted | Ended] = {}
        self.order: list[str] = []
        self.twice: list[str] = []

    def listen(self, name: str) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, (Painted, Ended)):
                self.twice += [name] if name in self.ends else []
                self.ends[name] = event
                self.order.append(name)

        return hear


@contextmanager
def service(
    folder: Path, engines: dict[str, Callable[[], Engine]], policy: Any = None, spans: Any = None, **settings: Any
) -> Iterator[Service]:
    made: list[Service] = []
    models = [_model(name, start, lambda: made[0].model_changed()) for name, start in engines.items()]
    made.append(Service(Settings(folder=folder, **settings), models, policy, spans=spans))
    try:
        yield made[0]
    finally:
        made[0].close()


def _model(name: str, start: Callable[[], Engine], changed: Callable[[], None]) -> Model:
    model = Model(name, "nowhere", start, changed)  # type: ignore[arg-type]
    engine = model._engine = start()  # type: ignore[assignment]
    clips = name.startswith("clip")
    model.facts = Facts(
        arguments=ARGUMENTS, defaults={}, advised={}, clips=clips, pipeline="Pretended", layout="",
        devices=("cpu",) * len(engine.all), together=True, carried=engine.carries, elastic=engine.elastic,
    )  # fmt: skip
    model.cause = None
    return model


def ask(running: Service, heard: Heard, name: str, *, model: str = "pictures", steps: int = 5, **fields: Any) -> Ticket:
    clip = model.startswith("clip")
    sizes = {"width": 64, "height": 64, "num_inference_steps": steps, **({"num_frames": 9} if clip else {})}
    work = Work(
        **{
            "id": name, "model": model, "kind": "clip" if clip else "picture",
            "arguments": {"prompt": name.split("-")[0], **sizes}, "seeds": (1,), "steps": steps, **fields,
        }
    )  # fmt: skip
    return running.submit(work, heard.listen(name))


def until(true: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
    return found


def states(running: Service) -> dict[str, str]:
    return {one.ticket.work.id: one.state for one in running.conductor.snapshot()}


def names(wanted: Sequence[Any]) -> list[str]:
    return [one.ticket.work.id for one in wanted]
