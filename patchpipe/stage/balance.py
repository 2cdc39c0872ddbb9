"""Which blocks each stage owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import inf

from torch import nn

from patchpipe.config import ALL_STEPS, ParallelConfig
from patchpipe.models.plan import BlockPlace, ModelPlan, attention_width
from patchpipe.stage.patches import PatchCosts

# A picture of 1024×1024 pixels with a prompt of 512 tokens: counts only weigh blocks against each other.
NOMINAL_IMAGE_TOKENS = 4096
NOMINAL_TEXT_TOKENS = 512
ROUNDING = 1e-9  # of sums of costs

# Operations a device does while its link moves a byte: a card of 90 TFLOP/s on PCIe 4.0 (20 GB/s), a core of 80 GFLOP/s
# beside processes on the same host (2 GB/s). Fixed, so that the same call paints the same picture wherever it runs.
OPERATIONS_PER_BYTE = {"nccl": 4500.0, "gloo": 40.0}
# Tokens that take as long as what a patch costs beside them: on an L40 by published times of FLUX.1 in patches (see the
# planner's profiles), on a core by `python -m bench.one_device`.
TOKENS_OF_A_PATCH = {"nccl": 128.0, "gloo": 16.0}
WORTH_HOLDING = 0.97  # of the dearest stage's time: below it, two stages hold and run the block between them
DECIMALS = 3  # of a share of a block
SMALLEST_SHARE = 0.06  # of a block's patches, below which one stage takes them all


@dataclass(frozen=True)
class Boundary:
    """Where one stage ends and the next begins, which may be within a block: both then run it in turns.

    Turns are the halves of a batch, each with keys and values of its own, or the patches of a latent. Where 3.5 blocks
    would be a stage's fair share, it runs 4 for one half of them and 3 for the other.

    Attributes:
        block: Blocks before it, in running order.
        share: Of the turns in which the next block is run before it too, the first ones.
    """

    block: int
    share: float = 0.0

    def taken(self, turns: int) -> int:
        """In how many turns the next block is run before it."""
        return round(self.share * turns)

    def at(self, turn: int, turns: int) -> int:
        """Blocks before it in one of so many turns."""
        return self.block + (turn < self.taken(turns))

    @property
    def places(self) -> tuple[int, ...]:
        """Where it can be."""
        return (self.block, self.block + 1) if self.share else (self.block,)


@dataclass(frozen=True)
class StageBlocks:
    """The blocks of one stage.

    Attributes:
        start: Where it begins.
        stop: Where it ends.
        halves: Whether the turns are halves of a batch; else they are patches.
    """

    start: Boundary
    stop: Boundary
    halves: bool = False

    @property
    def held(self) -> range:
        """All blocks of the stage."""
        return range(self.start.block, self.stop.places[-1])

    @property
    def whole(self) -> range:
        """What it runs where there are no turns: a block that two stages share is the later one's."""
        return range(self.start.block, self.stop.block)

    def of(self, turn: int, turns: int = 2) -> range:
        """What it runs in a turn."""
        return range(self.start.at(turn, turns), self.stop.at(turn, turns))

    @property
    def shared(self) -> tuple[int, ...]:
        """The blocks that a neighbour runs too."""
        return tuple(boundary.block for boundary in (self.start, self.stop) if boundary.share)


def patch_costs(width: int, blocks: int, config: ParallelConfig, backend: str) -> PatchCosts:
    """What a patch costs beside the compute of its tokens, on a nominal device.

    A channel of a token is two bytes on the way, four on a CPU. A block is taken for twelve square matrices. All of it
    is the same on every rank, whatever it holds and computes on.

    Args:
        width: Channels of a token.
        blocks: Blocks of the model.
        config: The layout.
        backend: How the ranks talk, ``"nccl"`` or ``"gloo"``.
    """
    if config.pipefusion == 1:
        return PatchCosts()
    size = 2 if backend == "nccl" else 4
    operations = 24 * width * blocks / (config.pipefusion * config.tensor)
    return PatchCosts(size * OPERATIONS_PER_BYTE[backend] / operations, TOKENS_OF_A_PATCH[backend])


def split_blocks(model: nn.Module, plan: ModelPlan, config: ParallelConfig) -> list[StageBlocks]:
    """The blocks that each stage owns.

    Raises:
        ValueError: More stages than blocks, or ``stage_blocks`` that do not add up.
    """
    places = plan.blocks_of(model)
    check_stages(config, len(places), plan)
    if config.stage_blocks is not None:
        return stages_of(config.stage_blocks)
    costs = [block_cost(place) for place in places]
    return split_costs(costs, config.pipefusion, halved=may_go_apart(plan.guidance, config), shared=may_share(config))


def goes_in_halves(config: ParallelConfig, split: Sequence[StageBlocks]) -> bool:
    """Whether batches of an even number of entries go through the stages in halves."""
    if config.split_batch is not None:
        return config.split_batch
    return any(stage.halves for stage in split)


def shared_blocks(split: Sequence[StageBlocks]) -> tuple[int, ...]:
    """The blocks that two stages run, each for some of the patches: both hold them, with their keys and values."""
    return tuple(stage.stop.block for stage in split if stage.stop.share and not stage.halves)


def sharing_stages(split: Sequence[StageBlocks]) -> tuple[int, ...]:
    """The stages that share their last block with the next one."""
    return tuple(index for index, stage in enumerate(split) if stage.stop.share and not stage.halves)


def may_go_apart(guidance: str, config: ParallelConfig) -> bool:
    """Whether the halves of guided batches may have stages of their own.

    Args:
        guidance: Whether the model's guidance branches come in one ``"batch"`` or as two ``"calls"``.
        config: The layout.
    """
    batch = guidance == "batch" and config.cfg == 1 and config.split_batch is not False and not config.share_blocks
    return batch and config.pipefusion > 1 and not config.synchronous


def may_share(config: ParallelConfig) -> bool | None:
    """Whether neighbouring stages may share a block by patches; ``None`` where it makes stages enough cheaper."""
    streams = config.pipefusion > 1 and config.warmup not in (0, ALL_STEPS) and config.patches != 1
    return config.share_blocks if streams and config.stage_blocks is None and not config.split_batch else False


def stages_of(sizes: Sequence[float]) -> list[StageBlocks]:
    """Stages of so many blocks each, one or more; a fraction of a block is that share of its patches."""
    stops = [round(stop, DECIMALS) for stop in accumulate(sizes, initial=0)]
    return _between([Boundary(int(stop), round(stop % 1, DECIMALS)) for stop in stops])


def sizes_of(split: Sequence[StageBlocks]) -> tuple[float, ...]:
    """Blocks of each stage, as ``stages_of`` takes them."""
    stops = [round(stage.stop.block + stage.stop.share, DECIMALS) for stage in split]
    sizes = [round(stop - start, DECIMALS) for start, stop in pairwise([0.0, *stops])]
    return tuple(int(size) if size == int(size) else size for size in sizes)


def _between(boundaries: list[Boundary], *, halves: bool = False) -> list[StageBlocks]:
    return [StageBlocks(start, stop, halves) for start, stop in pairwise(boundaries)]


def split_costs(
    costs: list[float], stages: int, *, halved: bool = False, shared: bool | None = False
) -> list[StageBlocks]:
    """The stages whose dearest is as cheap as it can be.

    Args:
        costs: Of each block.
        stages: How many there are to be.
        halved: Whether the halves of a batch may have their own, where that makes stages enough cheaper.
        shared: Whether neighbours share the block between them by patches; ``None`` does so in the same case.
    """
    whole = balanced(costs, stages)
    limit = WORTH_HOLDING * _dearest(costs, whole)
    if halved:
        half_blocks = [cost / 2 for cost in costs for _ in range(2)]
        sizes = balanced(half_blocks, stages)
        split = _between([Boundary(stop // 2, stop % 2 / 2) for stop in accumulate(sizes, initial=0)], halves=True)
        if _dearest(half_blocks, sizes) <= limit and all(stage.of(0) and stage.of(1) for stage in split):
            return split
    if shared or (shared is None and sum(costs) / stages <= limit):
        split = _between(_even_boundaries(costs, stages))
        if all(_never_idle(stage) for stage in split):
            return split
    return stages_of(whole)


def _even_boundaries(costs: list[float], stages: int) -> list[Boundary]:
    """Boundaries between stages of the same cost, within a block unless they are all but between two."""
    until = [0.0, *accumulate(costs)]
    found = [Boundary(0)]
    for stage in range(1, stages):
        wanted = until[-1] * stage / stages
        block = max(index for index in range(len(costs)) if until[index] <= wanted)
        share = (wanted - until[block]) / costs[block]
        near = share < SMALLEST_SHARE or share > 1 - SMALLEST_SHARE
        found.append(Boundary(block + round(share)) if near else Boundary(block, round(share, DECIMALS)))
    return [*found, Boundary(len(costs))]


def _never_idle(stage: StageBlocks) -> bool:
    """Whether it has a block to run for every patch, however many there are."""
    return len(stage.whole) > 1 or (len(stage.whole) == 1 and stage.start.share <= stage.stop.share)


def _dearest(costs: list[float], sizes: tuple[int, ...]) -> float:
    return max(sum(costs[start:stop]) for start, stop in pairwise(accumulate(sizes, initial=0)))


def check_stages(config: ParallelConfig, blocks: int, plan: ModelPlan) -> None:
    """Refuses stages that a model of so many blocks cannot fill.

    Raises:
        ValueError: More stages than blocks, or ``stage_blocks`` that do not add up.
    """
    if config.pipefusion > blocks:
        raise ValueError(
            f"pipefusion={config.pipefusion} is more stages than the {blocks} blocks of {plan.model}: "
            f"use pipefusion={blocks} or fewer"
        )
    total = round(sum(config.stage_blocks or ()), DECIMALS)
    if config.stage_blocks is not None and total != blocks:
        raise ValueError(f"stage_blocks={config.stage_blocks} adds up to {total} but {plan.model} has {blocks} blocks")


def block_cost(place: BlockPlace) -> float:
    """Multiply-adds of one block for a nominal picture.

    Linear layers count once per token of the stream they serve, or of both that they serve, modulation (the plan's
    ``per_call``) once per image and thus nothing, attention its two products over the whole sequence.
    """
    image, text = NOMINAL_IMAGE_TOKENS, NOMINAL_TEXT_TOKENS
    both = not place.listing.text_parameters and any(len(mixed) > 1 for mixed in place.self_attention.values())
    cost = 0.0
    for name, parameter in place.block.named_parameters():
        if parameter.ndim < 2 or name.startswith(place.listing.per_call):
            continue
        serves_text = any(part in name for part in place.listing.text_parameters)
        cost += parameter.numel() * (text if serves_text else image + text if both else image)
    for path, mixed in place.listing.attention.items():
        layer = getattr(place.block, path, None)
        if layer is not None:
            pairs = image * text if not mixed else (image + (text if len(mixed) > 1 else 0)) ** 2
            cost += 2 * pairs * attention_width(layer)
    return cost


def balanced(costs: list[float], stages: int) -> tuple[int, ...]:
    """Sizes of contiguous groups, none empty, whose dearest is as cheap as it can be; of such splits the most even."""
    until = [0.0, *accumulate(costs)]

    def stops(start: int, left: int) -> range:
        """Where the first of the groups left may end."""
        return range(start + 1, len(costs) - left + 2) if left > 1 else range(len(costs), len(costs) + 1)

    @cache
    def dearest(start: int, left: int) -> float:
        if not left:
            return 0.0
        return min(max(until[stop] - until[start], dearest(stop, left - 1)) for stop in stops(start, left))

    limit = dearest(0, stages) * (1 + ROUNDING)

    @cache
    def most_even(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        if not left:
            return 0.0, ()
        options = []
        for stop in stops(start, left):
            cost = until[stop] - until[start]
            squares, rest = most_even(stop, left - 1)
            options.append((cost**2 + squares if cost <= limit else inf, (stop - start, *rest)))
        return min(options)

    return most_even(0, stages)[1]
