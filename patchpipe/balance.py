"""Which blocks each stage owns."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
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


def split_blocks(model: nn.Module, plan: ModelPlan, config: ParallelConfig) -> list[range]:
    """The range of blocks, in running order, that each stage owns.

    Raises:
        ValueError: More stages than blocks, or ``stage_blocks`` that do not add up.
    """
    places = plan.blocks_of(model)
    check_stages(config, len(places), plan)
    sizes = config.stage_blocks or balanced([block_cost(place) for place in places], config.pipefusion)
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


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
