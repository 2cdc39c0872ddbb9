"""A request's steps, seen at its scheduler, and steps that are not done again because they were done elsewhere.

Every pipeline of diffusers ends a step by calling its scheduler's ``step``. The scheduler of a request is its own copy.
So the step is noticed in a subclass that this copy is made an instance of.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from patchpipe.schedule.steps.saved import Saved, placed, put_back


class Steps:
    """The steps of one request.

    Args:
        saved: What it is to go on from; ``None`` begins anew.
        device: Where this rank computes.

    Attributes:
        done: Steps that are over.
        between: Whether a step has ended since the transformer was last called.
        latest: What the last step gave; may be lazy.
        scheduler: The request's own.
        texts: What its ``encode_prompt`` gave, call by call.
    """

    def __init__(self, saved: Saved | None, device: torch.device) -> None:
        self.saved, self.done, self.between = saved, 0, False
        self._device = device
        self.latest: Tensor | None = None
        self.scheduler: Any = None
        self.texts: list[Any] = []
        self.several = False  # whether a turn of the loop has had more than one
        self.generators: list[torch.Generator] = []

    @property
    def answering(self) -> bool:
        """Whether the steps are still those that were done elsewhere."""
        return self.saved is not None and self.done < self.saved.step

    def called(self) -> None:
        """The transformer is called: what follows belongs to the next step."""
        self.between = False

    def follow(self, scheduler: Any) -> None:
        """Notices the steps of a scheduler, which belongs to this request alone."""
        kind, steps = type(scheduler), self
        signature = inspect.signature(kind.step)

        @wraps(kind.step)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self is not steps.scheduler:  # a copy the pipeline made
                return kind.step(self, *args, **kwargs)
            if steps.answering:
                given = signature.bind(self, *args, **kwargs).arguments
                return steps._answer(given["sample"])
            result = kind.step(self, *args, **kwargs)
            steps._over(result[0] if isinstance(result, tuple) else result.prev_sample)
            return result

        self.scheduler = scheduler
        scheduler.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})

    def encode(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """A pipeline's ``encode_prompt`` whose results are kept, or are those that were."""

        @wraps(encode)
        def kept(*args: Any, **kwargs: Any) -> Any:
            if self.saved is not None and len(self.texts) < len(self.saved.texts):
                text = placed(self.saved.texts[len(self.texts)], self._device)
            else:
                text = encode(*args, **kwargs)
            self.texts.append(text)
            return text

        return kept

    def _over(self, made: Tensor) -> None:
        self.several = self.several or self.between
        self.latest, self.between = made, True
        self.done += 1

    def _answer(self, sample: Tensor) -> Any:
        """A step that was done elsewhere: the last one of them gives what was saved."""
        assert self.saved is not None
        if self.done + 1 == self.saved.step:
            put_back(self.saved, self.scheduler, self.generators, self._device)
            sample = self.saved.latent.to(sample.device)
        self._over(sample)
        return _Answer((sample,))


class _Answer(tuple[Tensor]):
    """What a scheduler's step gives, in either of the ways that pipelines read it."""

    @property
    def prev_sample(self) -> Tensor:
        """The latent after the step."""
        return self[0]
