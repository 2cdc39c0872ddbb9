"""The life of one replica, in a thread: room on a node, loading, news; from the start again when it is lost."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from patchpipe.serve.fleet.cluster import Cluster, Lost, Process, Room
from patchpipe.serve.fleet.needs import Need, Wanted
from patchpipe.serve.fleet.words import Begun, Health, Spec, Told
from patchpipe.serve.work.tickets import Painted

logger = logging.getLogger("patchpipe.serve")

POLL, BREATH = 0.5, 0.02  # seconds a replica may have nothing to say, and between two questions
FETCH_SECONDS = 300.0  # for the pictures of one request
PAUSES = (0.0, 1.0, 2.0, 5.0, 15.0, 60.0)  # before each try in a row; the last one for ever
State = Literal["waiting for room", "loading", "up", "over"]


class Listening(Protocol):
    """Who is told what becomes of replicas."""

    def is_up(self, slot: Slot, begun: Begun) -> None:
        """It can paint."""

    def has_told(self, slot: Slot, told: Told) -> None:
        """It has news."""

    def has_painted(self, slot: Slot, key: str, painted: Painted) -> None:
        """A request's pictures are here."""

    def is_lost(self, slot: Slot, cause: str) -> None:
        """It is gone, with all that it had."""

    def has_failed(self, slot: Slot, error: BaseException) -> None:
        """It could not start."""


@dataclass(frozen=True)
class Life:
    """What all replicas have in common.

    Attributes:
        cluster: Where they live.
        wanted: What the operator asked for.
        need: What each takes.
        spec: What each is to be.
        fetching: Threads that fetch pictures.
    """

    cluster: Cluster
    wanted: Wanted
    need: Need
    spec: Spec
    fetching: ThreadPoolExecutor = field(repr=False)


class Slot:
    """A place for one replica, which is started again whenever it is lost.

    Args:
        number: Its number.
        life: What all have in common.
        listener: Told what becomes of it.

    Attributes:
        number: Its number.
        state: How far it is.
        node: Where it is, or was last.
        pid: Its process there.
        cause: Why it is not up.
        lost: How often it was.
        healths: How each of its models is.
    """

    def __init__(self, number: int, life: Life, listener: Listening) -> None:
        self.number, self._life, self._listener = number, life, listener
        self.state: State = "waiting for room"
        self.node, self.pid = "", 0
        self.cause: str | None = "it is starting"
        self.lost = 0
        self.healths: dict[str, Health] = {}
        self._process: Process | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"replica {number}", daemon=True)

    @property
    def name(self) -> str:
        """What people call it."""
        return f"replica {self.number}" + (f" on {self.node}" if self.node else "")

    def start(self) -> None:
        """Begins its life."""
        self._thread.start()

    def tell(self, what: str, *given: Any) -> None:
        """Tells the replica something; what is told to one that is gone is lost with it."""
        process = self._process
        if process is not None:
            process.tell(what, *given)

    def ask(self, what: str, *given: Any, seconds: float) -> Any:
        """Asks it something.

        Raises:
            Lost: It is gone, or took longer.
        """
        process = self._process
        if process is None:
            raise Lost(f"{self.name} is not there")
        return process.ask(what, *given, seconds=seconds)

    def close(self) -> None:
        """Ends it; returns at once."""
        self._closing.set()

    def join(self, seconds: float) -> None:
        """Waits for its end."""
        if self._thread.is_alive():
            self._thread.join(seconds)

    # -- its thread --------------------------------------------------------------------------------

    def _live(self) -> None:
        tries = 0
        while not self._closing.wait(PAUSES[min(tries, len(PAUSES) - 1)]):
            tries += 1
            self.state = "waiting for room"
            try:
                room = self._life.cluster.ask_room(self._life.need)
                try:
                    if self._wait_for(room):
                        self._begin(room)
                        tries = 0
                        self._follow()
                finally:
                    self._leave(room)
            except Exception as error:
                self._ended(error)
        self.state = "over"

    def _wait_for(self, room: Room) -> bool:
        if not room.wait(1.0):
            self.cause = f"it waits for {self._life.need} on one node" + ("" if not self.lost else f"; {self.cause}")
        while not room.wait(1.0):
            if self._closing.is_set():
                return False
        return not self._closing.is_set()

    def _begin(self, room: Room) -> None:
        self.node, self.state, self.cause = room.node, "loading", "it loads its models"
        self._process = process = room.enter(self._life.spec)
        begun: Begun = process.ask("start", seconds=self._life.wanted.start_timeout)
        self.pid, self.healths = begun.pid, {name: Health(None, 0) for name in begun.models}
        self.state, self.cause = "up", None
        logger.info("replica up", extra={"fields": {"replica": self.number, "node": self.node, "pid": self.pid}})
        self._listener.is_up(self, begun)

    def _follow(self) -> None:
        assert self._process is not None
        while not self._closing.wait(BREATH):
            told: Told = self._process.ask("poll", POLL, seconds=self._life.wanted.silence)
            self.healths = dict(told.healths)
            self._listener.has_told(self, told)
            for key, event in told.events:
                if isinstance(event, Painted):
                    self._life.fetching.submit(self._fetch, self._process, key, event)

    def _fetch(self, process: Process, key: str, painted: Painted) -> None:
        try:
            outputs = process.ask("fetch", key, seconds=FETCH_SECONDS)
        except Exception as error:  # the replica is lost, or is to be: whatever it had is painted anew
            logger.warning("pictures were lost", extra={"fields": {"replica": self.number, "cause": str(error)}})
            with suppress(Exception):
                process.kill()
            return
        self._listener.has_painted(self, key, Painted(outputs, painted.seconds))

    def _leave(self, room: Room) -> None:
        process, self._process = self._process, None
        if process is not None and self._closing.is_set():
            with suppress(Exception):
                process.ask("close", seconds=self._life.wanted.silence)
        for end in (room.give_back, *([process.kill] if process is not None else [])):
            with suppress(Exception):
                end()

    def _ended(self, error: BaseException) -> None:
        """It is gone, or could not start; nobody cares where the service ends."""
        if self._closing.is_set():
            return
        was, self.state = self.state, "waiting for room"
        self.cause = f"{self.name} was lost: {error}" if was == "up" else f"{type(error).__name__}: {error}"
        fields = {"replica": self.number, "node": self.node, "cause": str(error)}
        if was == "up":
            self.lost += 1
            logger.error("replica lost", extra={"fields": fields})
            self._listener.is_lost(self, self.cause)
        else:
            logger.error("replica did not start", extra={"fields": fields}, exc_info=error)
            self._listener.has_failed(self, error)
