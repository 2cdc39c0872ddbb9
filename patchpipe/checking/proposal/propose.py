"""A plan for a class that has none, from what one run of a tiny copy shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.checking.loop import Sample
from patchpipe.checking.proposal.axes import latent_of
from patchpipe.checking.proposal.listing import Found, Segments, block_list, streams_of
from patchpipe.checking.proposal.trace import Run, changed_rows, outer_lists, perturbed, runs_of, with_latent
from patchpipe.models.latent import IMAGE, REFERENCE, Raster
from patchpipe.models.plan import ModelPlan

ONLY_SPEED = (
    "embed, tail, per_call, per_request: modules without the usual names that need not run for every patch. "
    "Left out; only speed depends on it"
)


class CannotPropose(ValueError):
    """What a run shows does not fit the vocabulary of plans."""


@dataclass(frozen=True)
class Proposal:
    """A plan, and what it could not tell.

    Attributes:
        plan: The plan.
        unknown: What a person must look at, a sentence each.
    """

    plan: ModelPlan
    unknown: tuple[str, ...]


@dataclass
class _Seen:
    """What is known so far."""

    model: nn.Module
    sample: Sample
    raster: Raster
    unknown: list[str] = field(default_factory=list)


def propose(model: nn.Module, sample: Sample) -> Proposal:
    """A plan from one traced run of a tiny copy, and a few more in which one input has other numbers.

    Args:
        model: The tiny copy, plain.
        sample: What it is called with.

    Raises:
        CannotPropose: Its latent is laid out in no way a plan can say, or it has no block lists that see the latent.
    """
    unknown: list[str] = []
    latent = latent_of(model, sample, unknown)
    given = sample.inputs(0, sample.latents[0]) | {sample.latent: sample.latents[0]}
    raster = latent.rows(model, sample.latents[0].shape, given)
    seen = _Seen(model, sample, raster, unknown)
    try:
        lists = _lists(seen)
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:  # a block that cannot be run by itself
        raise CannotPropose(
            f"{type(model).__name__} runs in a way that cannot be followed ({type(error).__name__}: {error}): write "
            f"its plan by docs/adding-a-model.md"
        ) from error
    inputs = list(sample.calls[0].inputs)
    time, text = sample.time or "timestep", _text(sample, inputs)
    plan = ModelPlan(
        model=type(model).__name__,
        grid=latent,
        blocks=tuple(found.listing for found in lists),
        inputs=tuple(name for name in inputs if name not in (time, text)),
        **_batches(sample, inputs),
        time=time,
        text=text,
        guidance="batch" if sample.halves or len(sample.calls) == 1 else "calls",
    )
    for found in lists:
        unknown += found.unknown
    if not sample.guided:
        unknown.append("guidance: only one branch was seen; 'batch' where a pipeline guides by one call, else 'calls'")
    unknown += [ONLY_SPEED, "pipelines, refused_settings, tensor: what is tested, and how Linears split over ranks"]
    return Proposal(plan, tuple(dict.fromkeys(unknown)))


def _lists(seen: _Seen) -> list[Found]:
    """The lists whose blocks are given what comes of the latent, in running order."""
    model, sample = seen.model, seen.sample
    inputs = sample.inputs(0, sample.latents[0])
    runs = runs_of(model, inputs)
    by_list: dict[str, list[Run]] = {}
    for run in runs:
        by_list.setdefault(run.path, []).append(run)
    lists = outer_lists(model)
    whole = {
        path: some for path, some in by_list.items() if [run.index for run in some] == list(range(len(lists[path])))
    }
    streams = {path: streams_of(some) for path, some in whole.items()}
    streams = {path: names for path, names in streams.items() if names}
    moved = runs_of(model, with_latent(sample, perturbed), streams)
    still = runs_of(model, inputs, streams)
    found = []
    for path in streams:
        pair = [next(run for run in some if run.path == path) for some in (still, moved)]
        segments = _segments(seen, pair, streams[path])
        if segments is None:
            continue
        at = whole[path]
        found.append(block_list(model, path, at, streams[path], segments, seen.raster))
    if not found:
        raise CannotPropose(
            f"{type(model).__name__} has no list of blocks that run one after the other on what comes of its latent: "
            f"no plan can describe it"
        )
    return found


def _segments(seen: _Seen, pair: Sequence[Run], streams: Sequence[str]) -> Segments | None:
    """Whose rows each stream has, as it enters a list; ``None`` where none comes of the latent."""
    still, moved = pair
    picture = seen.raster.total
    held: dict[str, tuple[tuple[str, ...], int]] = {}
    sizes: dict[str, int] = {IMAGE: picture}
    if seen.raster.joined:
        sizes[REFERENCE] = seen.raster.joined
    for name in streams:
        one, other = still.arguments.get(name), moved.arguments.get(name)
        if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.ndim < 3 or one.shape != other.shape:
            continue
        dim = 0 if one.shape[0] >= picture > one.shape[1] else 1
        order = _order(changed_rows(one, other, dim), sizes)
        held[name] = order, dim
    if not any(IMAGE in order for order, _ in held.values()):
        return None
    return Segments(held, sizes)


def _order(changed: Tensor, sizes: dict[str, int]) -> tuple[str, ...]:
    """The segments of a stream, from which of its rows come of the latent."""
    pictures = tuple(name for name in (IMAGE, REFERENCE) if name in sizes)
    total = sum(sizes[name] for name in pictures)
    places = changed.nonzero().flatten()
    if not len(places):
        sizes.setdefault("text", len(changed))
        return ("text",)
    first, count = int(places[0]), int(places[-1]) - int(places[0]) + 1
    rest = len(changed) - count
    if count != total:
        return pictures if count == len(changed) else (*pictures, "unknown")
    before, after = first, rest - first
    order: tuple[str, ...] = pictures
    if before:
        sizes.setdefault("text", before)
        order = ("text", *order)
    if after:
        name = "after" if before else "text"
        sizes.setdefault(name, after)
        order = (*order, name)
    return order


def _batches(sample: Sample, inputs: Sequence[str]) -> dict[str, Any]:
    """Inputs without a batch dim, and those where it is not the first."""
    batch, given = sample.latents[0].shape[0], sample.calls[0].inputs
    unbatched, dims = [], {}
    for name in inputs:
        value = given[name]
        if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[0] != batch):
            unbatched.append(name)
        elif type(value) in (list, tuple) and len(value) != batch:
            if all(isinstance(each, Tensor) and each.ndim > 1 and each.shape[0] == batch for each in value):
                dims[name] = 1
            else:
                unbatched.append(name)
    return {"unbatched_inputs": tuple(unbatched), "batch_dims": dims}


def _text(sample: Sample, inputs: Sequence[str]) -> str:
    """The input that tells prompts apart."""
    if "encoder_hidden_states" in inputs or not inputs:
        return "encoder_hidden_states"
    if len(sample.calls) == 2:
        one, other = (call.inputs for call in sample.calls)
        for name in inputs:
            if _differ(one[name], other.get(name)):
                return name
    wide = [name for name in inputs if isinstance(sample.calls[0].inputs[name], Tensor)]
    wide.sort(key=lambda name: -sample.calls[0].inputs[name].ndim)
    return next((name for name in wide if name != sample.time), inputs[0])


def _differ(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape != other.shape or not torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(map(_differ, one, other))
    return False
