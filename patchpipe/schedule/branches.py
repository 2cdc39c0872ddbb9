"""Guidance branches, and which of their calls are synchronous because a forecast has failed.

How well a forecast did is known as soon as the first patch has passed the first layer: what would have been forecast
for its rows can be compared with what came. Rank 0 runs that layer in every layout, and it is the first to begin the
next call. So it decides for all, on what does not depend on the layout, and nobody waits for it: it leaves a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchpipe.config import WATCHED
from patchpipe.distributed.mesh import Group
from patchpipe.errors import RankLost
from patchpipe.lockstep.points import Points
from patchpipe.parallel.displaced import Layers
from patchpipe.parallel.lossy.residuals import Residuals
from patchpipe.parallel.lossy.ulysses import ChangedLayer
from patchpipe.schedule.shared_keys import SharedKeys
from patchpipe.stage.keys.forecast import Clock, Pace
from patchpipe.stage.keys.prefix import Prefixes
from patchpipe.stage.keys.store import LayerStore, LayerStores

ROUGH = 0.5  # of the last change: an error of the forecast beyond which it is of little use
JUMP = 3.0  # times the error before
MOST = 3  # synchronous steps beside those a request begins with


@dataclass
class Branch:
    """One guidance branch: its keys and values must never serve another.

    Attributes:
        index: Its place among the request's branches.
        left_out: What its calls leave out; see ``Stage.left_out``.
        calls: Calls of the transformer made for this branch so far.
        stores: Keys and values of each half of its batch, by attention layer.
        parts: The same where ranks see each other's part of the latent late, in the order layers run.
        told: Rows of keys and values as other ranks have them, where changes are sent.
        changed: The same where ranks send only the tokens that have changed.
        first_level: The noise level of its first call, or 0.
        prefixes: What each half of its batch keeps of the first call; see ``plan.Prefix``.
        shared: What comes and goes for blocks that two stages share.
        clock: The noise levels of its calls.
        cold: Whether keys and values of earlier calls are gone, so that the next call must be synchronous.
        followed: The last call of the first branch whose decision it has followed.
    """

    index: int = 0
    left_out: frozenset[int | str] = frozenset()
    calls: int = 0
    stores: tuple[LayerStores, LayerStores] = field(default_factory=lambda: ({}, {}))
    parts: Layers = field(default_factory=list)
    told: Residuals = field(default_factory=Residuals)
    changed: list[ChangedLayer] = field(default_factory=list)
    first_level: float = 0.0
    prefixes: tuple[Prefixes, Prefixes] = field(default_factory=lambda: ({}, {}))
    shared: list[SharedKeys] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    cold: bool = False
    followed: int = 0

    @property
    def bytes(self) -> int:
        """Memory of its keys and values."""
        layers = sum(store.bytes for half in (*self.stores, *self.prefixes) for store in half.values())
        return layers + sum(store.bytes for store in (*self.parts, *self.changed, self.told))

    def move(self, device: torch.device) -> None:
        """Takes all keys and values to another device; nothing of the request is under way."""
        stores = [store for half in (*self.stores, *self.prefixes) for store in half.values()]
        for store in (*stores, *self.parts, *self.changed, self.told):
            store.move(device)

    def paces(self, time: Tensor | float, passes: int, *, asked: bool) -> tuple[Pace | None, ...]:
        """How the noise level of each pass of a call follows the last ones, if that is asked for."""
        return tuple(self.clock.tick(time) if asked else None for _ in range(passes))

    def level_of(self, time: Tensor | float) -> float:
        """A call's noise level beside that of the first one; reads its time from the device."""
        level = float(torch.as_tensor(time).amax())
        self.first_level = self.first_level or level
        return level / self.first_level if self.first_level else 0.0


class Watch:
    """Whether a request's next step is to be synchronous, because keys and values did not go on as before.

    The first picture of the batch decides, in the first guidance branch.

    Args:
        group: The ranks.
        points: What all of them pass in the same order.
    """

    def __init__(self, group: Group, points: Points) -> None:
        self._group, self._points = group, points
        self._error = 0.0  # of the forecast in the call before
        self._spent = 0
        self._decision = (0, False)  # of the last call of the first branch: its number, and whether it is synchronous

    def follows(self, branch: Branch) -> bool:
        """Whether a branch's next call is to be synchronous; every rank comes here with the same call."""
        if branch.index == 0:
            self._decision = (branch.calls, self._decide(branch.stores[0]))
        call, rough = self._decision
        news, branch.followed = call != branch.followed, call
        return rough and news

    def _decide(self, stores: LayerStores) -> bool:
        """Rank 0's decision, on every rank."""
        with self._points.passing("decides on the warm-up"):
            topic = f"warm-up {self._points.begun}"
            if self._group.rank == 0:
                rough = self._rough(stores)
                if self._points.board is not None:
                    self._points.board.note(topic, rough)
            else:
                rough = self._hear(topic)
        return rough

    def _rough(self, stores: LayerStores) -> bool:
        first = next((store for store in stores.values() if isinstance(store, LayerStore)), None)
        error, before = 0.0 if first is None else first.error, self._error
        self._error = error
        rough = error > max(ROUGH, JUMP * before) and self._spent < MOST and not self._decision[1]
        self._spent += rough  # never two in a row: what the jump has left behind is gone after one
        return rough

    def _hear(self, topic: str) -> bool:
        assert self._points.board is not None
        with self._group.failures.explaining("rank 0"):
            found = self._points.board.hear(topic, self._group.failures.told)
        if found is None:
            raise RankLost(f"rank 0 did not say whether a step is synchronous within {self._group.config.timeout:g} s")
        return bool(found)


def watch_for(group: Group, points: Points) -> Watch | None:
    """What decides on a request's steps as it goes; ``None`` where their number is known."""
    return Watch(group, points) if group.config.warmup == WATCHED else None
