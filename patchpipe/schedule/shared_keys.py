"""Keys and values of a block that two neighbouring stages run in turns, kept alike on both.

Where blocks do not divide by the stages, the block between two of them is run by the earlier stage for the first
patches of a step and by the later one for the others. Each gives the other the keys and values of its patches. They
are needed later than the patch itself is: the later stage wants the first patches' when its own turn comes in the same
step, the earlier one wants the others' in the next step. So every patch attends to what it would attend to if one stage
ran the block alone, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from patchpipe.distributed.mesh import Group
from patchpipe.distributed.transport import Channel, Receive
from patchpipe.layout.split import Boundary, StageBlocks
from patchpipe.models.blocks import BlockPlace
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.keys.store import LayerStore, again_of
from patchpipe.stage.patches import Patch


@dataclass(frozen=True)
class SharedBlock:
    """A block on the boundary of this rank's stage.

    Attributes:
        boundary: The boundary.
        layers: Names of its self-attention layers.
        earlier: Whether this stage is the one before the boundary.
        channel: To and from the rank that runs the block on the other side.
    """

    boundary: Boundary
    layers: tuple[str, ...]
    earlier: bool
    channel: Channel


def shared_with_neighbours(stage: StageBlocks, places: Sequence[BlockPlace], group: Group) -> list[SharedBlock]:
    """The blocks that this rank's stage shares."""
    if stage.halves:
        return []
    found = []
    for boundary, earlier in ((stage.start, False), (stage.stop, True)):
        if boundary.share:
            place = places[boundary.block]
            layers = tuple(map(place.layer, place.self_attention))
            found.append(SharedBlock(boundary, layers, earlier, group.channel_for_keys(to_next=earlier)))
    return found


class SharedKeys:
    """What comes and goes for one shared block, in the calls of one guidance branch.

    Args:
        shared: The block.
        stores: The branch's keys and values, by layer.
    """

    def __init__(self, shared: SharedBlock, stores: Mapping[str, LayerStore]) -> None:
        self.shared, self.stores = shared, stores
        self.block, self.earlier = shared.boundary.block, shared.earlier
        self._patches: tuple[Patch, ...] = ()  # of the call that runs
        self._taken, self._both = 0, False  # those of them before the boundary; whether there are others too
        self._due: list[tuple[LayerStore, Patch, Receive, Pace | None]] = []  # what the next turn of this stage needs
        self._pace: Pace | None = None

    def begin(self, patches: Sequence[Patch], pace: Pace | None = None) -> None:
        """Begins a call; the later stage posts what it will bring.

        Args:
            patches: What the call runs.
            pace: Of the call, where stale rows are forecast.
        """
        self._pace = pace
        self._patches, self._taken = tuple(patches), self.shared.boundary.taken(len(patches))
        self._both = 0 < self._taken < len(patches)
        if self._both and not self.earlier:
            self._due = self._expect()

    def end(self) -> None:
        """Ends a call; the earlier stage posts what the others bring for the next one.

        Not sooner: it is this stage's own work that they wait for.
        """
        if self._both and self.earlier:
            self._due = self._expect()

    def _expect(self) -> list[tuple[LayerStore, Patch, Receive, Pace | None]]:
        return [
            (self.stores[name], patch, self.shared.channel.expect((size,), dtype), self._pace)
            for patch in self._patches
            if not self.own(patch)
            for name in self._layers
            for size, dtype in (self.stores[name].expected(patch),)
        ]

    @property
    def _layers(self) -> list[str]:
        """The layers, and those of them that attend once more; known when the first, synchronous call is done."""
        return [name for layer in self.shared.layers for name in (layer, again_of(layer)) if name in self.stores]

    def own(self, patch: Patch) -> bool:
        """Whether this stage runs the block for a patch."""
        return (patch.index < self._taken) == self.earlier

    def take(self) -> None:
        """Puts what has come since this stage's last turn into the stores."""
        for store, patch, receive, pace in self._due:
            store.put(patch, receive.take(), pace)
        self._due.clear()

    def give(self, patch: Patch) -> None:
        """Sends the keys and values of a patch that this stage has run."""
        for name in self._layers if self._both else ():
            self.shared.channel.send(self.stores[name].rows_of(patch))
