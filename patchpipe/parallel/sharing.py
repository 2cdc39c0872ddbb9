"""Picks how the ranks that share a patch attend together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from patchpipe.distributed.exchange import Trading
from patchpipe.distributed.mesh import Group
from patchpipe.parallel.levels import Levels
from patchpipe.parallel.lossy.ulysses import ChangedLayer, ChangedUlysses, Moment
from patchpipe.parallel.ring import Ring
from patchpipe.parallel.ulysses import Ulysses
from patchpipe.stage.attending import Sharing
from patchpipe.stage.patches import Cut, Patch


def sharing_for(group: Group, patch: Patch, pieces: tuple[Patch, ...]) -> Sharing | None:
    """The way this group shares patches; ``None`` if each has a rank of its own.

    Args:
        group: The ranks.
        patch: The patch, whole.
        pieces: The rows of each rank that shares it, in the order of ``Mesh.part``.
    """
    mesh = group.mesh
    if mesh.parts == 1:
        return None
    ulysses = None
    if mesh.size("ulysses") > 1:
        start = mesh.part - mesh.at("ulysses")
        ulysses = Ulysses(ulysses_line(group), patch, pieces[start : start + mesh.size("ulysses")])
        if group.config.values_first:
            group.later(ulysses.settle)
    if mesh.size("ring") == 1:
        return ulysses
    return Ring(group.lines["ring"], patch, pieces, ulysses)


class KeptChanged(Protocol):
    """What a guidance branch keeps where only changed tokens are sent."""

    changed: list[ChangedLayer]

    def level_of(self, time: Tensor | float) -> float:
        """A call's noise level, beside that of the first call."""
        ...


def changed_for(
    group: Group, cut: Cut, kept: KeptChanged, time: Tensor | float, *, synchronous: bool
) -> ChangedUlysses:
    """How this group's ranks attend in one call where they send only the tokens that have changed.

    Args:
        group: The ranks.
        cut: The cut of the call's latent.
        kept: What the call's guidance branch keeps.
        time: Of the call, which falls with the noise level.
        synchronous: Whether the call is part of the warm-up.
    """
    config = group.config
    assert config.changed_tokens is not None
    moment = Moment.of(kept.level_of(time), config.changed_tokens, synchronous=synchronous, forecast=config.forecasts)
    pieces = cut.split(cut.whole, group.mesh.parts)
    return ChangedUlysses(ulysses_line(group), cut.whole, pieces, kept.changed, moment)


def ulysses_line(group: Group) -> Trading:
    """The ranks that share heads, on one level or on two."""
    if "ulysses_outer" not in group.lines:
        return group.lines["ulysses"]
    return Levels(group.lines["ulysses_inner"], group.lines["ulysses_outer"])
