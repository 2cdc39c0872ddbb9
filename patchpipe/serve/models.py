"""The models that an operator names, and the engines that paint with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from patchpipe.config import PLAIN, AutoLayout
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.errors import UnsupportedModel
from patchpipe.serve.work.model import Model

if TYPE_CHECKING:
    from patchpipe.engine import Elastic, Engine

ServedLayout = Literal["auto", "exact", "plain", "elastic"]
EDIT_TASK = "image-to-image"
TOGETHER_METHODS = ("pipefusion", "cfg")  # whose products are tested with requests in flight together
_NAME = re.compile(r"[\w./:-]{1,128}")


@dataclass(frozen=True)
class Named:
    """A model that an operator named.

    Attributes:
        name: What clients call it.
        source: Its folder or hub id.
    """

    name: str
    source: str


@dataclass(frozen=True)
class Loading:
    """How models are loaded.

    Attributes:
        layout: ``auto``, ``exact`` or ``plain``, as for ``patchpipe generate``; ``elastic`` has the whole model on
            every device, and gives each request as many of them as it needs.
        devices: One device for all ranks, or one for each; ``None`` takes all there are.
        dtype: Of the weights; ``None`` takes the checkpoint's own.
        threads: CPU threads of each rank; ``None`` shares the cores.
        in_flight: Pictures painted together at most.
    """

    layout: ServedLayout = "auto"
    devices: str | list[str] | None = None
    dtype: str | None = None
    threads: int | None = None
    in_flight: int = 1

    def __post_init__(self) -> None:
        if self.layout == "plain" and self.in_flight > 1:
            raise ValueError("--layout plain is diffusers alone, one picture at a time: leave out --in-flight")

    def start(self, source: str, task: str | None = None) -> Engine:
        """Starts an engine.

        Raises:
            Exception: It could not start; see ``Engine``.
        """
        from patchpipe.engine import Engine

        options: dict[str, Any] = {} if task is None else {"task": task}
        start = partial(Engine, source, devices=self.devices, dtype=self.dtype, threads=self.threads, **options)
        if self.layout in ("plain", "elastic"):
            return start(config=PLAIN if self.layout == "plain" else self._elastic())
        try:
            return start(config=self._auto(source, plain=False))
        except UnsupportedModel:  # diffusers alone can run it; its requests cannot be held
            if self.in_flight > 1:
                raise
            return start(config=self._auto(source, plain=True))

    def _elastic(self) -> Elastic:
        from patchpipe.engine import Elastic
        from patchpipe.engine.choosing import devices_for

        count = len(devices_for(AutoLayout(), self.devices, self.threads))
        if count < 2:
            raise ValueError(
                "--layout elastic shares devices out, and there is one: leave it out, or name more devices"
            )
        return Elastic(1 << (count.bit_length() - 1))

    def _auto(self, source: str, plain: bool) -> AutoLayout:
        request = {name: value for name, value in call_defaults(source).items() if isinstance(value, (int, float, str))}
        methods = TOGETHER_METHODS if self.in_flight > 1 else None
        return AutoLayout(request=request, exact=self.layout == "exact", plain=plain, methods=methods)


def read_models(texts: Sequence[str]) -> tuple[Named, ...]:
    """The models of a command line: ``PATH``, ``ID`` or ``NAME=PATH``; none is the bundled model.

    Raises:
        ValueError: A name is none, or given twice.
    """
    found = tuple(_read(text) for text in texts) or (Named("demo", str(MODEL_DIR)),)
    names = [one.name for one in found]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a model: use letters, digits and . _ - : /")
        if names.count(name) > 1:
            raise ValueError(f"two models are called {name!r}: name them, as in first={found[0].source}")
    return found


def start_models(
    named: Sequence[Named], loading: Loading, *, edits: bool, on_change: Callable[[], None], told: Callable[[str], None]
) -> list[Model]:
    """Starts the models, one after the other.

    Args:
        named: The models.
        loading: How.
        edits: Also load what paints from pictures, where a model's own pipeline does not.
        on_change: Told when one of them has got up again.
        told: Told which one is being started.

    Raises:
        Exception: One could not start; those that were are closed.
    """
    started: list[Model] = []
    try:
        for one in named:
            told(one.name)
            started.append(_start(one, loading, None, on_change))
            facts = started[-1].facts
            if edits and not facts.clips and "image" not in facts.arguments:
                told(f"{one.name} for edits")
                started.append(_start(one, loading, EDIT_TASK, on_change))
    except BaseException:
        for model in started:
            model.close()
        raise
    return started


def _start(one: Named, loading: Loading, task: str | None, on_change: Callable[[], None]) -> Model:
    start = partial(loading.start, one.source, task)
    model = Model(one.name, one.source, start, on_change, for_edits=task is not None)
    model.start()
    return model


def _read(text: str) -> Named:
    name, equals, source = text.partition("=")
    if equals and not Path(text).exists():
        return Named(name, source)
    folder = Path(text).expanduser()
    if not folder.is_dir():
        return Named(text, text)
    is_demo = folder.resolve() == MODEL_DIR
    return Named("demo" if is_demo else re.sub(r"[^\w.-]+", "-", folder.resolve().name), text)
