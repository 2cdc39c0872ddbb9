"""A denoising loop around a transformer alone, with inputs that were made or recorded: the pipeline of a check."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor, nn

RATE, GUIDANCE = 0.3, 2.0  # how far a step goes; the strength of guidance


@dataclass(frozen=True)
class Call:
    """One call of a step.

    Attributes:
        name: What the pipeline calls its branch of guidance.
        inputs: All inputs but the latent, by name.
    """

    name: str
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """The calls of one step, as a pipeline makes them.

    Attributes:
        latent: The input that is the latent.
        time: The input that is the noise level.
        calls: One for each branch of guidance that is a call of its own.
        latents: What the latent was, with a tensor for each call.
        listed: Whether the model takes a list of latents.
        halves: Whether one call has both branches of guidance, each a half of the batch.
    """

    latent: str
    time: str | None
    calls: tuple[Call, ...]
    latents: tuple[Tensor, ...]
    listed: bool = False
    halves: bool = False

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.halves or len(self.calls) == 2

    def inputs(self, call: int, latent: Tensor, later: float = 1.0) -> dict[str, Any]:
        """The inputs of a call.

        Args:
            call: Its number.
            latent: The latent.
            later: What the noise level is multiplied with.
        """
        found = dict(self.calls[call].inputs)
        if self.time is not None:
            found[self.time] = (found[self.time] * later).to(found[self.time].dtype)
        found[self.latent] = list(latent.unbind()) if self.listed else latent
        return found


def in_halves(
    sample: Sample,
    unbatched: Callable[[str, Any], bool] = lambda *_: False,
    dims: Mapping[str, int] | None = None,
) -> Sample:
    """The same with both branches of guidance in one call, each a half of the batch.

    Args:
        sample: With a call for each.
        unbatched: Whether an input, by name and value, has no batch dim.
        dims: The batch dim of inputs where it is not the first; the items of a list count as a dim.
    """
    first, second = (call.inputs for call in sample.calls)
    known = dims or {}
    both = {
        name: value if unbatched(name, value) else _both(value, second[name], known.get(name, 0))
        for name, value in first.items()
    }
    return replace(sample, calls=(Call("", both),), latents=(torch.cat(sample.latents),), halves=True)


def _both(one: Any, other: Any, dim: int) -> Any:
    if isinstance(one, Tensor):
        return torch.cat([one, other], dim)
    if isinstance(one, dict):
        return {key: _both(value, other[key], dim) for key, value in one.items()}
    if type(one) in (list, tuple):
        return type(one)(_both(*each, dim - 1) for each in zip(one, other, strict=True)) if dim else one + other
    return one


class Loop(DiffusionPipeline):
    """Calls a transformer step by step and moves the latent by what it predicts.

    Args:
        transformer: The transformer.

    Attributes:
        sample: What it is called with.
    """

    sample: Sample

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)

    @classmethod
    def of(cls, transformer: nn.Module, sample: Sample) -> Loop:
        """A loop of a transformer that is called so."""
        loop = cls(transformer)
        loop.sample = sample
        return loop

    @torch.no_grad()
    def __call__(self, steps: int = 4, still: bool = False) -> ImagePipelineOutput:
        """Runs the loop.

        Args:
            steps: Its steps.
            still: Whether latent and time stay as they are, so that every step computes the same.

        Returns:
            The latents, as ``images``; if still, what the last step predicted.
        """
        sample = self.sample
        latents, predicted = list(sample.latents), list(sample.latents)
        for step in range(steps):
            later = 1.0 if still else 1 - 0.1 * step
            for at, call in enumerate(sample.calls):
                with self._branch(call.name):
                    result = self.transformer(**sample.inputs(at, latents[at], later), return_dict=False)[0]
                predicted[at] = torch.stack(list(result)) if sample.listed else result
            # A second call on the very same tensor would be taken for another branch of guidance.
            latents = [latent.clone() for latent in latents] if still else self._moved(latents, predicted)
        return ImagePipelineOutput(images=torch.stack(predicted if still else latents))

    def _branch(self, name: str) -> Any:
        return self.transformer.cache_context(name) if hasattr(self.transformer, "cache_context") else nullcontext()

    def _moved(self, latents: Sequence[Tensor], predicted: Sequence[Tensor]) -> list[Tensor]:
        """As pipelines do: both branches come to one prediction, and see one latent."""
        if self.sample.halves:
            both = predicted[0].chunk(2)
            guided = both[0] + GUIDANCE * (both[1] - both[0])
            return [moved(latents[0], torch.cat([guided, guided]))]
        guided = predicted[0] if len(predicted) == 1 else predicted[1] + GUIDANCE * (predicted[0] - predicted[1])
        return [moved(latent, guided) for latent in latents]


def moved(latent: Tensor, predicted: Tensor) -> Tensor:
    """A latent after a step. Channels that are not predicted stay, and what is predicted beside them is dropped.

    Raises:
        ValueError: Latent and prediction differ in more than one dim.
    """
    differ = [dim for dim in range(latent.ndim) if latent.shape[dim] != predicted.shape[dim]]
    if not differ:
        return latent + RATE * predicted
    if len(differ) > 1:
        raise ValueError(f"the model predicts {tuple(predicted.shape)} of a latent of {tuple(latent.shape)}")
    [dim] = differ
    count = latent.shape[dim]
    if predicted.shape[dim] > count:
        return latent + RATE * predicted.narrow(dim, 0, count)
    known = predicted.shape[dim]
    return torch.cat([moved(latent.narrow(dim, 0, known), predicted), latent.narrow(dim, known, count - known)], dim)


class _Enough(Exception):
    """The calls of the first step are known."""


def record(pipe: Any, call: Callable[[], Any]) -> Sample:
    """What a pipeline calls its transformer with in its first step.

    Args:
        pipe: The pipeline.
        call: Calls it.

    Raises:
        ValueError: It never called its transformer.
    """
    seen: list[tuple[str, dict[str, Any]]] = []
    with _recording(pipe.transformer, seen), suppress(_Enough):
        call()
    if not seen:
        raise ValueError(f"{type(pipe).__name__} never called its transformer")
    return _sample(pipe.transformer, seen)


@contextmanager
def _recording(model: Any, seen: list[tuple[str, dict[str, Any]]]) -> Iterator[None]:
    forward, names = (
        model.forward,
        [name for name in inspect.signature(type(model).forward).parameters if name != "self"],
    )
    context, time, branch = getattr(model, "cache_context", None), [None], [""]

    def recorded(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        now = next((given[name] for name in TIMES if given.get(name) is not None), None)
        if seen and (now is None or not torch.equal(now.flatten()[:1], time[0])):
            raise _Enough
        time[0] = None if now is None else now.flatten()[:1].clone()
        seen.append((branch[0] or f"branch {len(seen)}", {name: copied(value) for name, value in given.items()}))
        return forward(*args, **kwargs)

    @contextmanager
    def named(name: str) -> Iterator[None]:
        branch[0] = name
        with context(name):  # type: ignore[misc]
            yield
        branch[0] = ""

    model.forward = recorded
    if context is not None:
        model.cache_context = named
    try:
        yield
    finally:
        for name in ("forward", "cache_context"):
            vars(model).pop(name, None)


TIMES = ("timestep", "timesteps", "t")


def copied(value: Any) -> Any:
    """The same, with tensors of its own."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def _sample(model: nn.Module, seen: Sequence[tuple[str, dict[str, Any]]]) -> Sample:
    latent = next(name for name in inspect.signature(type(model).forward).parameters if name != "self")
    time = next((name for name in TIMES if isinstance(seen[0][1].get(name), Tensor)), None)
    listed = isinstance(seen[0][1][latent], list)
    latents = [torch.stack(given[latent]) if listed else given[latent] for _, given in seen]
    calls = tuple(
        Call(
            name,
            {key: value for key, value in given.items() if key not in (latent, "return_dict") and value is not None},
        )
        for name, given in seen
    )
    first = latents[0]
    twice = len(first) % 2 == 0 and torch.equal(first[: len(first) // 2], first[len(first) // 2 :])
    return Sample(latent, time, calls, tuple(latents), listed=listed, halves=len(calls) == 1 and twice)
