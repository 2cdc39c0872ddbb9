"""Serves a stream of calls of one pipeline, on one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from patchpipe.distributed.agreement import attempt
from patchpipe.loading.choice import check_served, original_class
from patchpipe.lockstep.inputs import NOT_GIVEN, describe_call
from patchpipe.pipeline.requests import Requests
from patchpipe.schedule.steps.entries import Entry, Told
from patchpipe.schedule.steps.following import Steps
from patchpipe.schedule.steps.orders import Order
from patchpipe.schedule.steps.saved import Saved

CARRIED = (  # pipelines of which a test carries a request from one layout to another
    "CogView4Pipeline",
    "Flux2KleinPipeline",
    "FluxPipeline",
    "LTXPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "StableDiffusion3Pipeline",
    "WanImageToVideoPipeline",
    "WanPipeline",
    "ZImagePipeline",
)


@dataclass(frozen=True)
class Asked:
    """A call that is to join, the same on all ranks.

    Attributes:
        arguments: The pipeline's, by name.
        seed: Of the default generators.
        bar: What stands in for the pipeline's progress bar; ``None`` shows one.
        saved: What it goes on from, if it has begun before.
    """

    arguments: Mapping[str, Any]
    seed: int
    bar: Callable[..., Any] | None = None
    saved: Saved | None = None


class Calls(Protocol):
    """Where calls come from; see ``schedule.steps.entries.Source``."""

    def orders(self, seconds: float) -> list[Order]:
        """The next orders, on rank 0."""
        raise NotImplementedError

    def call(self, number: int) -> Asked:
        """A call that is to join."""
        raise NotImplementedError

    def tell(self, told: Told) -> None:
        """Hears what has become of a call."""
        raise NotImplementedError


class Served:
    """Turns calls of a pipeline into requests of a stream.

    Args:
        pipe: The pipeline.
        calls: Where they come from.
        requests: Runs them.
        copied: Makes the copy of the pipeline that one of them runs on.
    """

    def __init__(
        self, pipe: Any, calls: Calls, requests: Requests, copied: Callable[[int, Callable[..., Any] | None], Any]
    ) -> None:
        self._calls, self._requests, self._copied = calls, requests, copied
        self._kind = original_class(pipe)
        self._run = partial(self._kind.__call__, pipe)  # type: ignore[operator]
        self._scheduler = type(pipe.scheduler).__name__
        self.orders, self.tell = calls.orders, calls.tell

    def entry(self, number: int) -> Entry:
        """A call as a request."""
        asked = self._calls.call(number)
        about, problem = attempt(lambda: describe_call(self._run, (), asked.arguments))

        def paint(steps: Steps) -> Any:
            if problem is not None:
                raise problem
            if asked.saved is not None:
                self._check(asked.saved, about or {})
            pipe = self._copied(number, asked.bar)
            steps.follow(pipe.scheduler)
            if hasattr(pipe, "encode_prompt"):
                vars(pipe)["encode_prompt"] = steps.encode(pipe.encode_prompt)
            return self._requests.paint(pipe, self._kind.__call__, asked.arguments)  # type: ignore[operator]

        given = asked.arguments.get("generator")
        generators = [given] if isinstance(given, torch.Generator) else list(given or [])
        name = self._kind.__name__
        return Entry(paint, about or {}, name, partial(check_carried, name), asked.seed, generators, asked.saved)

    def _check(self, saved: Saved, about: Mapping[str, tuple[str, str]]) -> None:
        """Refuses a state that belongs to another call.

        Raises:
            ValueError: It does.
        """
        for what, theirs, ours in (
            ("pipeline", saved.pipeline, self._kind.__name__),
            ("scheduler", saved.scheduler, self._scheduler),
        ):
            if theirs != ours:
                raise ValueError(f"the checkpoint is of a request of the {what} {theirs}, but this one is {ours}")
        for name in sorted({*saved.call, *about}):
            then, now = saved.call.get(name, NOT_GIVEN), about.get(name, NOT_GIVEN)
            if tuple(then) != tuple(now):
                values = f"is {then[0]}, not {now[0]}" if then[0] != now[0] else "has other values"
                raise ValueError(f"the checkpoint is of another call: its {name} {values}")


def check_carried(pipeline: str) -> None:
    """Refuses to carry requests of a pipeline with which nothing tests it.

    Raises:
        ValueError: It is none of those.
    """
    if pipeline not in CARRIED:
        raise ValueError(
            f"moving requests of {pipeline} to other ranks is not tested and so refused: resume them where they were "
            f"paused. Tested are {', '.join(CARRIED)}"
        )


def serve(pipe: Any, calls: Calls) -> None:
    """Serves calls of a parallel pipeline until told to end; every rank calls it alike.

    Args:
        pipe: The pipeline.
        calls: Where they come from.

    Raises:
        ValueError: The layout is not tested with requests in flight together.
        Cancelled: All of them were cancelled.
        PatchpipeError: A rank failed.
    """
    check_served(pipe)
    attachment = pipe.patchpipe
    requests: Requests = attachment.requests
    requests.stream(pipe, Served(pipe, calls, requests, attachment.copied))
