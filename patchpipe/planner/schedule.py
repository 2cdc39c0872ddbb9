"""From blocks to seconds: what a stage does with one patch, and how patches follow one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from patchpipe.config import PASSES, STREAMED
from patchpipe.layout.split import shared_blocks
from patchpipe.offload.choice import Chosen
from patchpipe.planner.cost import OUTSIDE_OPERATIONS, BlockSeconds, Tokens, block_parts, operations
from patchpipe.planner.layout import Layout
from patchpipe.planner.offloading import choice_for, stalled
from patchpipe.planner.work.workload import Block

PREDICTION_CHANNELS = 64  # of a token of the noise prediction, which goes back to the first stage
MERGE_BYTES = 40  # read and written per element and hop to merge two parts of an attention in float32
MERGE_OPERATIONS = 8
EXCHANGE_OPERATIONS = 16  # an exchange among ranks, for the host: copies, views and the collective itself
HOP_OPERATIONS = 12  # a hop of Ring: keys and values sent, received and waited for, without copies
COMPILED = 0.25  # of the operations of an eager block, as the host counts them, are left in a compiled one
STEADY_STEPS = 4  # played one by one, the rest at the last one's pace
Found = TypeVar("Found")


@dataclass(frozen=True)
class Unit:
    """What passes through the stages at once: half a patch's batch, or an entry of it in a synchronous step.

    Attributes:
        stages: Seconds on each stage, exchanges with ranks that share it included.
        compute: Of these, seconds of computing.
        hops: Seconds from each stage to the next; the last one from the last stage to the first.
        host: Seconds in which each stage's host starts all of it.
    """

    stages: tuple[float, ...]
    compute: tuple[float, ...]
    hops: tuple[float, ...]
    host: tuple[float, ...] = ()


@dataclass(frozen=True)
class Timing:
    """The seconds of a request.

    Attributes:
        seconds: All steps.
        synchronous: One synchronous step.
        period: From one steady step to the next.
        stages: Computing of each stage in a steady step.
        worked: Computing of each stage in all steps.
        hop: The longest hop of a patch.
        host: Seconds in which each stage's host starts what it does in a steady step.
    """

    seconds: float
    synchronous: float
    period: float
    stages: tuple[float, ...]
    worked: tuple[float, ...]
    hop: float
    host: tuple[float, ...]


def play(units: list[Unit], free: list[float], ready: list[float]) -> list[float]:
    """Sends units through the stages in order.

    Args:
        units: The units.
        free: When each stage has done what came before; updated.
        ready: When each unit may begin.

    Returns:
        When each unit's result is back at the first stage.
    """
    done = []
    for unit, moment in zip(units, ready, strict=True):
        for stage, seconds in enumerate(unit.stages):
            free[stage] = max(free[stage], moment) + seconds
            moment = free[stage] + unit.hops[stage]
        done.append(moment)
    return done


def total(
    synchronous: list[Unit],
    steady: list[Unit],
    warmup: int,
    steps: int,
    calls: int = 1,
    halves: int = 1,
    ahead: Sequence[Sequence[Unit]] = (),
) -> Timing:
    """Seconds of ``steps`` steps, of which ``warmup`` are synchronous.

    Args:
        synchronous: Units of one synchronous call.
        steady: Units of one steady call: the patches, each in as many halves.
        warmup: Synchronous steps.
        steps: All steps.
        calls: Calls in a step, one after the other; a step's patch begins when it is done in every call of the last.
        halves: Units of each patch, all of which must be done as well.
        ahead: What each call has ahead of its patches, in the first step, the second and so on: of the same patches.
    """
    count = len(steady[0].stages)
    once = max(play(synchronous * calls, [0.0] * count, [0.0] * len(synchronous) * calls))
    warm, streamed = min(warmup, steps), max(0, steps - warmup)
    drafts = [unit.compute for units in ahead for unit in units]
    free, ready, ends = [0.0] * count, [0.0] * len(steady), [0.0]
    played = len(ahead) + STEADY_STEPS
    for step in range(min(streamed, played)):
        opening = [*ahead[step]] if step < len(ahead) else []
        begin = [ready[at % len(ready)] for at in range(len(opening))]
        done = play([*opening, *steady] * calls, free, [*begin, *ready] * calls)
        done = [moment for at, moment in enumerate(done) if at % (len(opening) + len(steady)) >= len(opening)]
        patches = [max(done[at : at + halves]) for at in range(0, len(done), halves)]
        ready = [max(patches[at // halves :: len(steady) // halves]) for at in range(len(steady))]
        ends.append(max(done))
    period = ends[-1] - ends[-2] if len(ends) > 1 else once
    seconds = warm * once + ends[-1] + max(0, streamed - played) * period
    return Timing(
        seconds=seconds,
        synchronous=once,
        period=period,
        stages=_each(calls, [unit.compute for unit in steady]),
        worked=_sum(
            _each(calls, [unit.compute for unit in synchronous]), warm,
            _each(calls, [unit.compute for unit in steady]), streamed,
            _each(calls, drafts) if drafts else (0.0,) * count,
        ),
        hop=max((max(unit.hops) for unit in steady), default=0.0),
        host=_each(calls, [unit.host for unit in steady]),
    )  # fmt: skip


def _spent(blocks: list[tuple[float, float]], calls: int) -> tuple[list[float], list[float]]:
    """Seconds of each block for so many calls, and those of them that go to exchanges."""
    return [calls * (one + other) for one, other in blocks], [calls * other for _, other in blocks]


def _each(calls: int, units: list[tuple[float, ...]]) -> tuple[float, ...]:
    """Seconds of each stage, over the units."""
    return tuple(calls * sum(column) for column in zip(*units, strict=True))


def _sum(
    first: tuple[float, ...], times: int, second: tuple[float, ...], others: int, once: tuple[float, ...]
) -> tuple[float, ...]:
    return tuple(times * one + others * two + three for one, two, three in zip(first, second, once, strict=True))


def _of_each(blocks: Sequence[Block], find: Callable[[Block], Found]) -> list[Found]:
    """What is found of each block: once of those that are one object, as most are."""
    found = {key: find(block) for key, block in {id(block): block for block in blocks}.items()}
    return [found[id(block)] for block in blocks]


class Schedule:
    """The units of a layout.

    Args:
        layout: The layout.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout, self.workload, self.config = layout, layout.workload, layout.config
        self.device, self.link = layout.profile.device, layout.profile.link
        self._known: dict[tuple[Block, Tokens, bool], tuple[float, float]] = {}

    @cached_property
    def offloads(self) -> tuple[Chosen, ...]:
        """What stays of each stage's weights and how the rest comes; nothing where all of it stays."""
        if self.config.offload is None:
            return ()
        patches = self.layout.patches
        streams = len(patches) > 1 or self.config.distrifusion > 1
        piece = self.layout.piece(len(patches) - 1 if streams else None)
        known: dict[tuple[Block, ...], Chosen] = {}  # stages of the same blocks are alike
        for stage in range(self.config.pipefusion):
            held = self.layout.held(stage)
            if held not in known:
                spent = _of_each(held, lambda block: self._block(block, piece, streams))
                known[held] = choice_for(self.layout, stage, *_spent(spent, self.layout.together))
        return tuple(known[self.layout.held(stage)] for stage in range(self.config.pipefusion))

    @cached_property
    def timing(self) -> Timing:
        """The seconds of the request."""
        guided = self.workload.branches == 2
        warmup = self.workload.steps if self.config.synchronous else self.config.warmup_steps(guided=guided)
        streams = len(self.layout.patches) > 1 or self.config.distrifusion > 1
        whole = self._synchronous()
        if not streams:
            return total(whole, whole, 0, self.workload.steps, self.layout.calls)
        halves, patches = self.layout.halves, range(len(self.layout.patches))
        steady = [self._unit(self.layout.piece(patch), half, patch) for patch in patches for half in range(halves)]
        return total(whole, steady, warmup, self.workload.steps, self.layout.calls, halves, self._ahead(steady, guided))

    def _ahead(self, steady: list[Unit], guided: bool) -> list[list[Unit]]:
        """What the first steps have ahead of their patches."""
        if self.config.warmup == STREAMED:
            return [steady * (passes - 1) for passes in PASSES[guided]]
        return []

    def _synchronous(self) -> list[Unit]:
        """One synchronous call: the batch at once, or its entries one after the other where stages can overlap."""
        piece, halves = self.layout.piece(None), self.layout.halves
        if self.layout.system.entries_overlap and self.config.pipefusion > 1 and piece.batch > 1:
            entry = Tokens(piece.image, piece.text, piece.keys, piece.key_text)
            return [self._unit(entry, number // (piece.batch // halves)) for number in range(piece.batch)]
        return [self._unit(piece)]

    def _unit(self, piece: Tokens, half: int = 0, patch: int | None = None) -> Unit:
        times, compute, host, steady = [], [], [], patch is not None
        outside = OUTSIDE_OPERATIONS * self.device.launch * self.layout.profile.slowdown
        for stage in range(self.config.pipefusion):
            blocks = self.layout.run(stage, half, patch)
            spent = _of_each(blocks, lambda block: self._block(block, piece, steady))
            computed, exchanged = sum(one for one, _ in spent), sum(other for _, other in spent)
            if self.config.distrifusion > 1 and steady:  # the gathers of all layers run beside the computing
                exchanged = self.link.exposed(exchanged, computed)
            spending = outside + computed + exchanged
            if self.offloads:
                together = self.layout.together
                spending += stalled(self.offloads[stage], *_spent(spent, together)) / together
            spending += self.link.exposed(self._keys(stage, piece, patch), spending)
            host.append(self._host(blocks, piece))
            times.append(max(spending, host[-1]))
            compute.append(outside + computed)
        return Unit(tuple(times), tuple(compute), self._hops(piece), tuple(host))

    def _host(self, blocks: tuple[Block, ...], piece: Tokens) -> float:
        """Seconds in which the host starts all kernels of a stage: a faster device waits for them."""
        config, share = self.config, COMPILED if self.config.compile else 1.0
        exchanged = EXCHANGE_OPERATIONS * (4 * (config.ulysses > 1) + (config.distrifusion > 1))
        shared = exchanged + (config.ring - 1) * (HOP_OPERATIONS + MERGE_OPERATIONS)

        def started(block: Block) -> float:
            sums = EXCHANGE_OPERATIONS * (config.tensor > 1) * sum(matrix.summed for matrix in block.matrices)
            return share * (operations(block, piece) + shared * block.self_attentions + sums)

        return sum(_of_each(blocks, started), float(OUTSIDE_OPERATIONS)) * self.device.host

    def _hops(self, piece: Tokens) -> tuple[float, ...]:
        """Activations from stage to stage, and the small prediction back to the first."""
        workload, stages, line = self.workload, self.config.pipefusion, self.layout.line("pipefusion")
        if self.config.world_size == 1:
            return (0.0,)
        rows = piece.batch * (piece.image + piece.text)
        size = rows * workload.width * workload.itemsize / self.config.tensor
        back = piece.batch * piece.image * PREDICTION_CHANNELS * workload.itemsize
        return (self.link.send(size, line),) * (stages - 1) + (self.link.send(back, line),)

    def _keys(self, stage: int, piece: Tokens, patch: int | None) -> float:
        """Seconds in which a stage sends the keys and values of blocks that it shares with its neighbours."""
        if patch is None:
            return 0.0
        owned, count = self.layout.stages[stage], len(self.layout.patches)
        now, whole = owned.of(patch, count), piece.batch * (piece.image + piece.text) * self.layout.parts
        blocks = sum(index in now for index in shared_blocks([owned]) + shared_blocks(self.layout.stages[:stage][-1:]))
        size = 2 * whole * self.workload.width * self.workload.itemsize / (self.config.ulysses * self.config.tensor)
        return blocks * self.link.send(size, self.layout.line("pipefusion")) if blocks else 0.0

    def _block(self, block: Block, piece: Tokens, steady: bool) -> tuple[float, float]:
        """Seconds that a block computes, and that it is held up by ranks that share it."""
        key = (block, piece, steady)
        if key not in self._known:
            parts = self._computed(block, piece)
            self._known[key] = parts.total, self._exchanged(block, piece, parts)
        return self._known[key]

    def _computed(self, block: Block, piece: Tokens) -> BlockSeconds:
        tensor, itemsize = self.config.tensor, self.workload.itemsize
        parts = block_parts(block, piece, self.device, tensor=tensor, itemsize=itemsize)
        slowdown, merging = self.layout.profile.slowdown, 0.0
        hops = self.config.ring - 1
        if hops:
            elements = piece.batch * (piece.image + piece.text) * block.width / tensor
            once = elements * MERGE_BYTES / self.device.bandwidth + MERGE_OPERATIONS * self.device.launch
            merging = hops * once * block.self_attentions
        return BlockSeconds(slowdown * (parts.attention + merging), slowdown * parts.other)

    def _exchanged(self, block: Block, piece: Tokens, parts: BlockSeconds) -> float:
        rows = piece.batch * (piece.image + piece.text)
        activation = rows * block.width / self.config.tensor * self.workload.itemsize
        return block.self_attentions * (
            self._ulysses(activation) + self._ring(activation, parts.attention / max(1, block.self_attentions))
            + self._displaced(activation)
        ) + self._sums(block, piece)  # fmt: skip

    def _ulysses(self, activation: float) -> float:
        """Queries, keys, values and the result, each exchanged before anything goes on.

        That values go first, or heads in turns, is not counted.
        """
        ranks, inner, line = self.config.ulysses, self.config.ulysses_inner, self.layout.line("ulysses")
        if ranks == 1:
            return 0.0
        sent = activation * (ranks - 1) / ranks
        return 4 * (self.link.two_levels(sent, line, inner) if 1 < inner < ranks else self.link.all_to_all(sent, line))

    def _ring(self, activation: float, attention: float) -> float:
        """Keys and values of a neighbour arrive while those at hand are attended to."""
        ranks = self.config.ring
        if ranks == 1:
            return 0.0
        hop = self.link.send(2 * activation, self.layout.line("ring"))
        return (ranks - 1) * self.link.exposed(hop, attention / ranks)

    def _displaced(self, activation: float) -> float:
        ranks = self.config.distrifusion
        return self.link.all_gather(2 * activation, self.layout.line("distrifusion")) if ranks > 1 else 0.0

    def _sums(self, block: Block, piece: Tokens) -> float:
        if self.config.tensor == 1:
            return 0.0
        summed = [matrix for matrix in block.matrices if matrix.summed]
        sizes = [piece.of(matrix.stream) * matrix.outputs * self.workload.itemsize for matrix in summed]
        if self.layout.system.sums is not None:
            rows = piece.batch * (piece.image + piece.text)
            sizes = [rows * block.width * self.workload.itemsize] * self.layout.system.sums
        line = self.layout.line("tensor")
        return sum(self.link.all_reduce(size, line) for size in sizes if size)
