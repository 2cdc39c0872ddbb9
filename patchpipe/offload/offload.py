"""Hangs streamed weights on a rank's blocks: before a block runs its weights are there, afterwards they may go."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.models.blocks import BlockPlace
from patchpipe.offload.choice import Chosen, Inventory, Link, choose
from patchpipe.offload.copying import Copier, copier_for
from patchpipe.offload.gathering import Gathering
from patchpipe.offload.mover import Mover, MoverStats, Streamed
from patchpipe.offload.riding import Ride, Run
from patchpipe.offload.ring import Placement
from patchpipe.offload.weights import DiskHome, Home, HostHome, Stored, Weight, views, weights_of
from patchpipe.stage.attention import override
from patchpipe.stage.stage import Stage

logger = logging.getLogger("patchpipe")
Pass = Callable[[Sequence[BlockPlace]], Sequence[float]]


@dataclass(frozen=True)
class Means:
    """What a rank moves weights with, as far as the caller knows it.

    Attributes:
        link: What they come over.
        memory: Bytes of the device for the blocks' weights; ``None`` is as many as it takes.
        seconds: How long each of some blocks computes in one pass.
        stored: Where each parameter of a transformer lies on disk, by the transformer's id.
    """

    link: Link
    memory: int | None
    seconds: Pass
    stored: Mapping[int, Mapping[str, Stored]]


class Offload:
    """The weights of all blocks of one rank.

    Args:
        config: The layout.
        group: The ranks.
        means: What they are moved with.
        transformers: How many transformers take turns.

    Attributes:
        chosen: What was picked for the transformer attached last.
    """

    def __init__(self, config: ParallelConfig, group: Group, means: Means, transformers: int = 1) -> None:
        assert config.offload is not None
        self.asked: OffloadConfig = config.offload
        self.chosen: Chosen | None = None
        self._config, self._group, self._means, self._transformers = config, group, means, transformers
        self._copier: Copier | None = None
        self._mover: Mover | None = None
        self._ring: Tensor | None = None
        self._attached: list[AttachedBlocks] = []
        self._numbers: dict[int, int] = {}  # of transformers, by their stages' ids
        self._gathering = Gathering.over(group) if self.asked.gathered else None
        self._to_compare = False
        self.ride: Ride | None = None

    def attach(self, stage: Stage) -> Callable[[], None]:
        """Takes a stage's weights to where they come from; its other hooks are on already.

        Returns:
            What brings them back.

        Raises:
            ValueError: The memory is too small, or a weight cannot be moved.
        """
        blocks = AttachedBlocks(stage, self)
        found = [blocks.weights(place) for place in stage.blocks]
        inventory = Inventory(
            tuple(tuple(weight.nbytes for weight in weights) for weights in found),
            tuple(self._means.seconds(stage.blocks)),
            transformers=self._transformers,
            fixed=blocks.fixed,
        )
        chosen = self.chosen = choose(self.asked, inventory, self._means.link, self._means.memory)
        self._give_up_ring()
        if self._gathering is not None:
            self._gathering.compare("what stays on the device", [chosen.resident, inventory.weights, chosen.ring])
        try:
            blocks.put(found, chosen)
        except ValueError:
            blocks.restore()
            raise
        self._attached.append(blocks)
        logger.info("%s", self.describe())
        return lambda: self._detach(blocks)

    def key(self, stage: Stage, place: BlockPlace) -> str:
        """A block's name among all that come and go."""
        number = self._numbers.setdefault(id(stage), len(self._numbers))
        return place.name if number == 0 else f"{place.name} of transformer {number + 1}"

    def _detach(self, blocks: AttachedBlocks) -> None:
        self._attached.remove(blocks)
        self._give_up_ring()
        blocks.restore()

    # -- at work ---------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the rank computes."""
        return self._group.device

    @property
    def mover(self) -> Mover:
        """What copies, made when it is first needed."""
        if self._mover is None:
            assert self.chosen is not None
            size = max(each.chosen.ring for each in self._attached)
            if self._ring is None or self._ring.numel() != size:
                self._ring = torch.empty(size, dtype=torch.uint8, device=self._group.device)
            self._copier = self._copier or copier_for(self._group.device, self.asked.throttle, self._gathering)
            gate = self._group.open_gate() if self.chosen.transfers.gate and self._group.world_size > 1 else None
            together, timeout = self._gathering is not None, self._config.timeout
            self._mover = Mover(self._ring, self._copier, self.chosen.transfers, gate, timeout, together=together)
            for each in self._attached:
                self._mover.add(each.streamed)
            weakref.finalize(self, self._mover.close)  # its thread knows nothing of the model, which may be let go
        if self._gathering is not None and not self._to_compare:
            self._to_compare = True
            self._group.later(self._compare_orders)
        return self._mover

    @property
    def streams(self) -> bool:
        """Whether any weight comes and goes."""
        return any(each.streamed for each in self._attached)

    def together(self, stage: Stage, runs: Sequence[Run]) -> None:
        """Runs calls of one step of a transformer, from block to block side by side.

        Args:
            stage: This rank's part of it.
            runs: The calls.
        """
        self.ride = Ride(runs, stage.exchange_work, self.device)
        try:
            self.ride.go()
        finally:
            self.ride = None

    def _compare_orders(self) -> None:
        """At the end of a request: ranks that copy together must have run the same blocks."""
        self._to_compare = False
        assert self._gathering is not None
        self._gathering.compare("the blocks that they ran", self._mover.order if self._mover else 0)

    @property
    def ring(self) -> Tensor:
        """The working buffer."""
        assert self._ring is not None
        return self._ring

    def _give_up_ring(self) -> None:
        """What is in it, and where views of it lie, holds no longer."""
        if self._mover is not None:
            self._mover.close()
        self._mover = self._ring = None
        for each in self._attached:
            each.forget()

    # -- for people ------------------------------------------------------------------------------

    @property
    def stats(self) -> MoverStats:
        """What was copied since the blocks were attached."""
        return MoverStats() if self._mover is None else self._mover.stats

    def as_dict(self) -> dict[str, Any]:
        """What was picked and done, as plain data."""
        assert self.chosen is not None
        chosen = self.chosen
        return {
            "resident_share": chosen.share,
            "resident_bytes": chosen.stays,
            "ring_bytes": chosen.ring,
            "streamed_bytes_per_pass": sum(chosen.streamed),
            "chunk_bytes": chosen.transfers.chunk,
            "depth": chosen.transfers.depth,
            "gate": chosen.transfers.gate,
            **asdict(self.stats),
        }

    def describe(self) -> str:
        """One line for people: what stays and what comes."""
        assert self.chosen is not None
        chosen = self.chosen
        if not sum(chosen.streamed):
            return f"offload: all {chosen.stays / 1e6:,.1f} MB of the blocks' weights stay on the device"
        return (
            f"offload: {chosen.share:.0%} of the blocks' weights stay on the device ({chosen.stays / 1e6:,.1f} MB); "
            f"{sum(chosen.streamed) / 1e6:,.1f} MB come from the {self.asked.tier} in every pass, in chunks of "
            f"{chosen.transfers.chunk / 1e6:,.2f} MB, {chosen.transfers.depth} ahead, through a buffer of "
            f"{chosen.ring / 1e6:,.1f} MB; {'with' if chosen.transfers.gate else 'without'} the gate"
        )


class AttachedBlocks:
    """The blocks of one stage, whose weights come and go.

    Args:
        stage: The stage.
        offload: The rank's.

    Attributes:
        fixed: Bytes of weights that cannot move.
        streamed: What comes for each block.
        chosen: What was picked.
    """

    def __init__(self, stage: Stage, offload: Offload) -> None:
        self.stage, self.offload = stage, offload
        self.fixed = 0
        self.streamed: dict[Any, Streamed] = {}
        self.chosen: Chosen
        self._undo: list[Callable[[], None]] = []
        self._moved: list[tuple[Weight, torch.device]] = []
        self._homes: list[Home] = []
        self._blocks: list[StreamedBlock] = []
        self._uses = _uses(stage.model)

    def weights(self, place: BlockPlace) -> list[Weight]:
        """The weights of a block that can come and go; counts those that cannot."""
        here = _uses(place.block)
        found = weights_of(place.block, place.name, lambda each: self._uses[id(each)] > here[id(each)])
        moving = {id(weight.found) for weight in found}
        staying = {id(each): each for each in place.block.parameters() if not each.is_meta and id(each) not in moving}
        for each in staying.values():
            each.data = each.data.to(self.offload.device)
            self.fixed += each.numel() * each.element_size()
        return found

    def put(self, found: Sequence[Sequence[Weight]], chosen: Chosen) -> None:
        """Takes every weight to where it is to be."""
        self.chosen = chosen
        places = self.stage.blocks
        kept = [set(numbers) for numbers in chosen.resident]
        coming = [
            [weight for at, weight in enumerate(weights) if at not in stay]
            for weights, stay in zip(found, kept, strict=True)
        ]
        keys = [self.offload.key(self.stage, place) for place, weights in zip(places, coming, strict=True) if weights]
        following = dict(zip(keys, [*keys[1:], *keys[:1]], strict=True))
        for weights, stay in zip(found, kept, strict=True):
            for at in stay:
                self._keep(weights[at])
        for place, weights in zip(places, coming, strict=True):
            if weights:
                key = self.offload.key(self.stage, place)
                self.streamed[key] = Streamed(self._home(weights), sizes_of(weights), following[key])
                block = StreamedBlock(place.block, key, weights, self.offload)
                self._blocks.append(block)
                self._undo.append(override(place.block, block))

    def _keep(self, weight: Weight) -> None:
        """A weight stays on the device."""
        device, mapped = self.offload.device, self.offload.asked.tier == "disk"
        plain = [each.to(device, copy=mapped) for each in weight.plain]
        if mapped or any(one is not other for one, other in zip(plain, weight.plain, strict=True)):
            self._moved.append((weight, weight.plain[0].device))
            weight.plain = plain
            weight.settle()

    def _home(self, weights: Sequence[Weight]) -> Home:
        """Where a block's weights come from; there they are when the block does not run."""
        self._moved += [(weight, weight.plain[0].device) for weight in weights]
        cuda = self.offload.device.type == "cuda"
        home: Home
        if self.offload.asked.tier == "disk":
            stored = self.offload._means.stored.get(id(self.stage.model), {})
            home = DiskHome(weights, stored, self.chosen.transfers.chunk, pinned=cuda)
        else:
            home = HostHome(weights, pinned=cuda)
            for weight in weights:
                weight.settle()
        self._homes.append(home)
        return home

    def forget(self) -> None:
        """The buffer is another one from now on."""
        for block in self._blocks:
            block.forget()

    def restore(self) -> None:
        """Puts every parameter back as it was found."""
        while self._undo:
            self._undo.pop()()
        while self._moved:
            weight, device = self._moved.pop()
            weight.move(device)
        for home in self._homes:
            home.close()
        self._homes.clear()
        self._blocks.clear()


class WorkingBuffer(Protocol):
    """What blocks find their weights in."""

    @property
    def mover(self) -> Mover:
        """What fills it."""
        ...

    @property
    def ring(self) -> Tensor:
        """Its memory, once the mover is there."""
        ...

    @property
    def ride(self) -> Ride | None:
        """The calls that go through the blocks together at this moment, if several do."""
        ...


class StreamedBlock:
    """Stands in for the ``forward`` of a block whose weights come and go.

    Args:
        block: The block.
        key: Its name for the mover.
        weights: Its weights; what the block has in their place now it has whenever it does not run.
        buffer: Where they come to.
    """

    def __init__(self, block: nn.Module, key: Any, weights: Sequence[Weight], buffer: WorkingBuffer) -> None:
        self.key, self.weights, self.buffer = key, weights, buffer
        self.compute: Callable[..., Any] = block.forward
        self._at_home = [module._parameters[leaf] for module, leaf in (each.owners[0] for each in weights)]
        self._views: dict[int, list[nn.Parameter]] = {}  # by where in the buffer the block begins

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's streams."""
        if self.buffer.ride is not None:
            return self.buffer.ride.through(self, lambda: self.compute(*args, **kwargs))
        self.hold()
        try:
            return self.compute(*args, **kwargs)
        finally:
            self.let_go()

    def hold(self) -> None:
        """Waits until the block's weights are there."""
        placement = self.buffer.mover.need(self.key)
        try:
            self._put(self._placed(placement))
        except BaseException:
            self.let_go()
            raise

    def let_go(self) -> None:
        """The block's weights may go."""
        self._put(self._at_home)
        self.buffer.mover.done()

    def forget(self) -> None:
        """The views that were made are no longer of the buffer."""
        self._views.clear()

    def _placed(self, placement: Placement) -> list[nn.Parameter]:
        at = placement.start % self.buffer.ring.numel()
        if at not in self._views:
            self._views[at] = views(self.weights, placement, self.buffer.ring)
        return self._views[at]

    def _put(self, parameters: Sequence[nn.Parameter | None]) -> None:
        for weight, parameter in zip(self.weights, parameters, strict=True):
            assert parameter is not None
            weight.put(parameter)


def sizes_of(weights: Sequence[Weight]) -> tuple[int, ...]:
    """Bytes that each plain tensor of some weights takes in a buffer."""
    return tuple(size for weight in weights for size in weight.sizes)


def _uses(model: nn.Module) -> Counter[int]:
    """How often each parameter of a model is in it."""
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    return Counter(id(each) for module in modules for each in module._parameters.values())
