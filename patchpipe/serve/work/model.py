"""A model that the service has: its engine, what it takes, and how it gets up again when a worker dies."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any

from patchpipe.demo import call_defaults
from patchpipe.serve.refusals import Refusal

if TYPE_CHECKING:
    from patchpipe.config import ParallelConfig
    from patchpipe.engine import Elastic, Engine

logger = logging.getLogger("patchpipe.serve")

PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # seconds before each try to start again; the last one for ever


@dataclass(frozen=True)
class Facts:
    """What a model takes and gives, read from its engine once.

    Attributes:
        arguments: Names of its pipeline's arguments.
        defaults: The pipeline's own, less those that the model's folder advises.
        advised: Arguments that the model's folder advises.
        clips: Whether it makes clips.
        pipeline: Its pipeline class.
        layout: Its layout in words.
        devices: The device of each rank.
        together: Whether several requests can be painted together, and be held and go on.
        carried: Whether requests of its pipeline can go on elsewhere.
        elastic: Its layout where each request has as many ranks as it is given.
        config: Its layout; ``None`` is plain diffusers.
    """

    arguments: frozenset[str]
    defaults: Mapping[str, Any]
    advised: Mapping[str, Any]
    clips: bool
    pipeline: str
    layout: str
    devices: tuple[str, ...]
    together: bool
    carried: bool = False
    elastic: Elastic | None = None
    config: ParallelConfig | None = None

    def usual(self, name: str) -> Any:
        """What an argument is where nobody names it."""
        return self.advised.get(name, self.defaults.get(name))


class Model:
    """One served model.

    Args:
        name: What clients call it.
        source: Its folder or hub id.
        start: Starts its engine.
        on_change: Called when it can paint again, or has failed to start.
        for_edits: It only paints from pictures.

    Attributes:
        public: What clients call it.
        name: What the service calls it.
        source: Its folder or hub id.
        for_edits: Whether it only paints from pictures.
        facts: What it takes and gives.
        restarts: How often its engine was started again.
        cause: Why it cannot paint; ``None`` where it can.
        down: Whether it could not be started again at the last try.
    """

    def __init__(
        self,
        name: str,
        source: str,
        start: Callable[[], Engine],
        on_change: Callable[[], None],
        *,
        for_edits: bool = False,
    ) -> None:
        self.public, self.source, self.for_edits = name, source, for_edits
        self.name = f"{name} (edits)" if for_edits else name
        self._start, self._changed = start, on_change
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._reviving = False
        self.facts: Facts
        self.restarts = 0
        self.cause: str | None = "it is starting"
        self.down = False  # it could not be started again

    def start(self) -> None:
        """Starts its engine.

        Raises:
            Exception: It could not; see ``Engine``.
        """
        self._engine = self._start()
        self.facts = read_facts(self._engine, self.source)
        self.cause = None

    @property
    def engine(self) -> Engine:
        """Its engine.

        Raises:
            Refusal: It has none now.
        """
        if self._engine is None or self.cause is not None:
            raise Refusal(503, f"{self.name} cannot paint now: {self.cause}", code="model_down", retry_after=10)
        return self._engine

    @property
    def usable(self) -> bool:
        """Whether it can paint now."""
        return self.cause is None

    def check(self) -> None:
        """Gets it up again if a worker has died while nothing was asked of it."""
        engine = self._engine
        if self.usable and engine is not None and not engine.alive:
            self.revive("a worker process died")

    def lost(self, engine: Engine, cause: str) -> None:
        """Gets it up again whose engine has ended; does nothing where it has another one by now."""
        if engine is self._engine:
            self.revive(cause)

    def revive(self, cause: str) -> None:
        """Starts its engine again, in a thread of its own; does nothing where that is under way."""
        with self._lock:
            if self._reviving or self._closing.is_set():
                return
            self._reviving, self.cause = True, f"it is starting again, since {cause}"
        logger.error("model restarting", extra={"fields": {"model": self.name, "cause": cause}})
        threading.Thread(target=self._revive, name=f"revive {self.name}", daemon=True).start()

    def close(self) -> None:
        """Ends its engine."""
        self._closing.set()
        with self._lock:
            engine, self._engine, self.cause = self._engine, None, "the service is shutting down"
        if engine is not None:
            engine.close()

    def _revive(self) -> None:
        if self._engine is not None:
            self._engine.close()
        for tried in range(10**9):
            if self._closing.wait(PAUSES[min(tried, len(PAUSES) - 1)]):
                return
            began = monotonic()
            try:
                engine = self._start()
            except Exception as error:
                self.cause, self.down = f"it could not start again: {type(error).__name__}: {error}", True
                logger.exception("model did not start", extra={"fields": {"model": self.name}})
                self._changed()
                continue
            self._take(engine)
            logger.info("model ready", extra={"fields": {"model": self.name, "seconds": monotonic() - began}})
            self._changed()
            return

    def _take(self, engine: Engine) -> None:
        with self._lock:
            if self._closing.is_set():
                engine.close()
                return
            self._engine, self.cause = engine, None
            self.restarts += 1
            self.down = self._reviving = False


def read_facts(engine: Engine, source: str) -> Facts:
    """What a model takes and gives."""
    from patchpipe.layout.combinations import check_together
    from patchpipe.models import PLANS
    from patchpipe.pipeline.streams.serving import CARRIED

    kind = engine.ranks[0].transformer_class
    together = engine.config is not None
    if engine.config is not None:
        try:
            check_together(engine.config.methods, engine.config.compile)
        except ValueError:
            together = False
    return Facts(
        arguments=frozenset(engine.arguments),
        defaults=dict(engine.defaults),
        advised=call_defaults(source),
        clips=any(plan.model == kind and plan.makes_clips for plan in PLANS),
        pipeline=engine.ranks[0].pipeline_class,
        layout=_layout(engine),
        devices=engine.devices,
        together=together,
        carried=engine.ranks[0].pipeline_class in CARRIED,
        elastic=engine.elastic,
        config=engine.config,
    )


def _layout(engine: Engine) -> str:
    if engine.elastic is not None:
        return f"elastic, each request on 1 to {engine.elastic.ranks}"
    return "plain diffusers, one device" if engine.config is None else engine.config.describe()
