"""Hangs streamed weights on a rank's blocks: before a block runs its weights are there, afterwards they may go."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.models.blocks import BlockPlace
from patchpipe.offload.choice import Chosen, Inventory, Link, choose
from patchpipe.offload.copying import Copier, copier_for
from patchpipe.offload.gathering import Gathering
from patchpipe.offload.mover import Mover, MoverStats, Streamed
from patchpipe.offload.riding import Ride, Run
from patchpipe.offload.shared.sharing import InHost, Sharing, digest_of, in_host
from patchpipe.offload.streaming import StreamedBlock, sizes_of
from patchpipe.offload.weights import DiskHome, Home, Stored, Weight, give_back, weights_of
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
        self._sharing = Sharing(group.rank)
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
            PatchpipeError: A rank that holds the same weights failed.
        """
        blocks = AttachedBlocks(stage, self)
        found, problem = attempt(lambda: self._choose(blocks))
        sharing = self._sharing = self._share(found, problem)
        assert found is not None
        weights, self.chosen = found
        self._give_up_ring()
        if self._gathering is not None:
            told = [digest_of(weights, self.chosen.resident), self.chosen.ring]
            self._gathering.compare("what stays on the device", told)
        try:
            blocks.put(weights, self.chosen, sharing)
        except (ValueError, PatchpipeError):
            blocks.restore()
            raise
        self._attached.append(blocks)
        logger.info("%s", self.describe())
        return lambda: self._detach(blocks)

    def _choose(self, blocks: AttachedBlocks) -> tuple[list[list[Weight]], Chosen]:
        """The weights of a stage's blocks, and which of them stay."""
        places = blocks.stage.blocks
        found = [blocks.weights(place) for place in places]
        inventory = Inventory(
            tuple(tuple(weight.nbytes for weight in weights) for weights in found),
            tuple(self._means.seconds(places)),
            transformers=self._transformers,
            fixed=blocks.fixed,
        )
        return found, choose(self.asked, inventory, self._means.link, self._means.memory)

    def _share(self, found: tuple[list[list[Weight]], Chosen] | None, problem: Exception | None) -> Sharing:
        """The ranks whose weights are in host memory once; raises the problem of any of them."""
        if self.asked.tier == "host":
            digest = None if found is None else digest_of(found[0], found[1].resident)
            return Sharing.among(self._group, digest, problem)
        if problem is not None:
            raise problem
        return Sharing(self._group.rank)

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

    @property
    def host(self) -> InHost:
        """What of the weights is in host memory."""
        return in_host([home for each in self._attached for home in each.homes], self._sharing.ranks)

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
            "host_bytes": self.host.bytes,
            "host_shared_bytes": self.host.shared,
            "host_ranks": list(self.host.ranks),
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
            f"{chosen.ring / 1e6:,.1f} MB; {'with' if chosen.transfers.gate else 'without'} the gate{self.host.words}"
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
        sharing: The ranks whose weights are in host memory once.
        homes: Where the weights of each block come from that has any to come.
    """

    def __init__(self, stage: Stage, offload: Offload) -> None:
        self.stage, self.offload = stage, offload
        self.fixed = 0
        self.streamed: dict[Any, Streamed] = {}
        self.chosen: Chosen
        self.sharing: Sharing
        self._undo: list[Callable[[], None]] = []
        self._moved: list[tuple[Weight, torch.device]] = []
        self.homes: list[Home] = []
        self._blocks: list[StreamedBlock] = []
        self._uses = _uses(stage.model)
        self._stored = offload._means.stored.get(id(stage.model), {})  # what may lie in a file that is mapped

    def weights(self, place: BlockPlace) -> list[Weight]:
        """The weights of a block that can come and go; counts those that cannot."""
        here = _uses(place.block)
        found = weights_of(place.block, place.name, lambda each: self._uses[id(each)] > here[id(each)])
        moving = {id(weight.found) for weight in found}
        for name, each in place.block.named_parameters(prefix=place.name):
            if not each.is_meta and id(each) not in moving:
                each.data = each.data.to(self.offload.device, copy=name in self._stored)
                self.fixed += each.numel() * each.element_size()
        return found

    def put(self, found: Sequence[Sequence[Weight]], chosen: Chosen, sharing: Sharing) -> None:
        """Takes every weight to where it is to be."""
        self.chosen, self.sharing = chosen, sharing
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
        device, mapped = self.offload.device, weight.name in self._stored
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
            home = DiskHome(weights, self._stored, self.chosen.transfers.chunk, pinned=cuda)
        else:
            home = self.sharing.home(weights, pinned=cuda)
            for weight in weights:
                weight.settle()
            give_back()
        self.homes.append(home)
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
        for home in self.homes:
            home.close()
        self.homes.clear()
        self._blocks.clear()


def _uses(model: nn.Module) -> Counter[int]:
    """How often each parameter of a model is in it."""
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    return Counter(id(each) for module in modules for each in module._parameters.values())
