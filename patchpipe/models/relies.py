"""Compares what a plan relies on with the class that is there: diffusers may have changed it.

A plan names inputs, block lists, arguments of blocks and attention layers. A name that is gone would mostly fail late.
An attention layer that no plan knows would not fail at all: its patches would see no other rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.blocks import BlockList, part_of
from patchpipe.models.plan import ModelPlan

TESTED = ("0.42.0", "0.42.1")  # of diffusers: the oldest and the newest


def check_relied_on(plan: ModelPlan, model: nn.Module) -> None:
    """Refuses a model that is not what its plan describes.

    Raises:
        UnsupportedModel: Something is gone, or has come that mixes rows; says what.
    """
    changes = list(dict.fromkeys(_changes(plan, model)))
    if not changes:
        return
    import diffusers

    oldest, newest = TESTED
    more = f"; and {len(changes) - 3} more" if len(changes) > 3 else ""
    raise UnsupportedModel(
        f"{type(model).__name__} of diffusers {diffusers.__version__} is not as the plan of {plan.model} has it: "
        f"{'; '.join(changes[:3])}{more}. Plans are tested with diffusers {oldest} to {newest}: install one of these, "
        f"or a newer patchpipe"
    )


def _changes(plan: ModelPlan, model: nn.Module) -> Iterator[str]:
    inputs = (plan.latent, plan.time, plan.text, *plan.inputs, *plan.residuals, *plan.apart_by, *plan.leaving_out)
    for name in _lacking(type(model), inputs):
        yield f"its forward takes no {name}"
    for path in (plan.embed, plan.tail, *plan.shared_parts, *plan.between):
        if path and part_of(model, path.removesuffix(".*")) is None:
            yield f"it has no module {path}"
    for listing in plan.blocks:
        blocks = part_of(model, listing.path)
        if not isinstance(blocks, nn.ModuleList):
            yield f"it has no list of blocks {listing.path}"
            continue
        for block in blocks:
            yield from _changes_of_block(listing, block)


def _changes_of_block(listing: BlockList, block: nn.Module) -> Iterator[str]:
    kind, mask = type(block).__name__, () if listing.mask is None else (listing.mask,)
    mask = (*mask, listing.cache.partition(".")[0])
    told = (*listing.rows, *mask, *listing.row_counts, *listing.links, *listing.passes, *listing.counts)
    for name in _lacking(type(block), told):
        yield f"its {kind} takes no {name}"
    named = (*listing.attention, *listing.sums)
    if not any(part_of(block, path) for path in named):
        yield f"its {kind} has no layer {' or '.join(named)}"
    for path, layer in block.named_modules():
        within = any(path == one or path.startswith(f"{one}.") for one in named)
        if path and not within and (hasattr(layer, "to_q") or "Attention" in type(layer).__name__):
            yield f"its {kind} has an attention layer {path}"


def _lacking(kind: Any, names: Iterable[str]) -> list[str]:
    """Arguments that a class's ``forward`` does not take."""
    parameters = inspect.signature(kind.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        return []
    return [name for name in names if name and name not in parameters]
