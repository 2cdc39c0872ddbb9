"""Which blocks each stage owns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from math import inf

from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.models.plan import BlockPlace, ModelPlan
from patchpipe.patches import PatchCosts

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
WORTH_HOLDING = 0.97  # of the dearest stage's time: below it, halves of a batch are given stages of their own


@dataclass(frozen=True)
class StageBlocks:
    """The blocks of one stage, as ranges in running order.

    The halves of a batch have keys and values of their own and so may leave a stage after different blocks: where
    3.5 blocks would be a stage's fair share, it runs 4 for one half and 3 for the other.

    Attributes:
        first: What the first half runs, and a batch that has no halves.
        second: What the second half runs.
    """

    first: range
    second: range

    @property
    def held(self) -> range:
        """All blocks of the stage."""
        return range(min(self.first.start, self.second.start), max(self.first.stop, self.second.stop))

    def of(self, half: int) -> range:
        """What a half runs."""
        return self.second if half else self.first


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
    return split_costs(costs, config.pipefusion, halved=may_go_apart(plan.guidance, config))


def goes_in_halves(config: ParallelConfig, split: Sequence[StageBlocks]) -> bool:
    """Whether batches of an even number of entries go through the stages in halves."""
    if config.split_batch is not None:
        return config.split_batch
    return any(stage.first != stage.second for stage in split)


def may_go_apart(guidance: str, config: ParallelConfig) -> bool:
    """Whether the halves of guided batches may have stages of their own.

    Args:
        guidance: Whether the model's guidance branches come in one ``"batch"`` or as two ``"calls"``.
        config: The layout.
    """
    batch = guidance == "batch" and config.cfg == 1 and config.split_batch is not False
    return batch and config.pipefusion > 1 and not config.synchronous


def stages_of(sizes: tuple[int, ...]) -> list[StageBlocks]:
    """Stages of so many blocks each."""
    ranges = [range(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
    return [StageBlocks(blocks, blocks) for blocks in ranges]


def split_costs(costs: list[float], stages: int, *, halved: bool = False) -> list[StageBlocks]:
    """The stages whose dearest is as cheap as it can be.

    Args:
        costs: Of each block.
        stages: How many there are to be.
        halved: Whether the halves of a batch may have their own, where that makes stages enough cheaper.
    """
    whole = balanced(costs, stages)
    if halved:
        half_blocks = [cost / 2 for cost in costs for _ in range(2)]
        sizes = balanced(half_blocks, stages)
        stops = list(accumulate(sizes, initial=0))
        first, second = [-(-stop // 2) for stop in stops], [stop // 2 for stop in stops]
        pairs = zip(pairwise(first), pairwise(second), strict=True)
        split = [StageBlocks(range(*one), range(*two)) for one, two in pairs]
        cheaper = _dearest(half_blocks, sizes) <= WORTH_HOLDING * _dearest(costs, whole)
        if cheaper and all(stage.first and stage.second for stage in split):
            return split
    return stages_of(whole)


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
    if config.stage_blocks is not None and sum(config.stage_blocks) != blocks:
        total = sum(config.stage_blocks)
        raise ValueError(f"stage_blocks={config.stage_blocks} adds up to {total} but {plan.model} has {blocks} blocks")


def block_cost(place: BlockPlace) -> float:
    """Multiply-adds of one block for a nominal picture.

    Linear layers count once per token of the stream they serve, modulation (the plan's ``conditioning``) once per
    image and thus nothing, attention its two products over the whole sequence.
    """
    image, text = NOMINAL_IMAGE_TOKENS, NOMINAL_TEXT_TOKENS
    cost = 0.0
    for name, parameter in place.block.named_parameters():
        if parameter.ndim < 2 or name.startswith(place.listing.conditioning):
            continue
        serves_text = any(part in name for part in place.listing.text_parameters)
        cost += parameter.numel() * (text if serves_text else image)
    for path, kind in place.listing.attention.items():
        layer = getattr(place.block, path, None)
        if layer is not None:
            keys = {"joint": image + text, "image": image, "cross": text}[kind]
            cost += 2 * image * keys * layer.to_q.out_features
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
