"""Which blocks each stage owns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.layout.patching import PatchCosts
from patchpipe.layout.split import DECIMALS, StageBlocks, split_costs, stages_of
from patchpipe.models.blocks import BlockPlace, attention_width, part_of
from patchpipe.models.plan import ModelPlan
from patchpipe.stage.keys.early import check_values

# A picture of 1024×1024 pixels with a prompt of 512 tokens: counts only weigh blocks against each other.
NOMINAL_IMAGE_TOKENS = 4096
NOMINAL_TEXT_TOKENS = 512

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


def split_blocks(model: nn.Module, plan: ModelPlan, config: ParallelConfig) -> list[StageBlocks]:
    """The blocks that each stage owns.

    Raises:
        ValueError: More stages than blocks, ``stage_blocks`` that do not add up, or values that cannot go first.
    """
    places = plan.blocks_of(model)
    check_stages(config, len(places), plan)
    if config.values_first:
        check_values(model, plan)
    if config.stage_blocks is not None:
        return stages_of(config.stage_blocks)
    costs = [block_cost(place) for place in places]
    shared = config.may_share if plan.shares_blocks else False
    return split_costs(costs, config.pipefusion, halved=may_go_apart(plan.guidance, config), shared=shared)


def goes_in_halves(config: ParallelConfig, split: Sequence[StageBlocks]) -> bool:
    """Whether batches of an even number of entries go through the stages in halves."""
    if config.split_batch is not None:
        return config.split_batch
    return any(stage.halves for stage in split)


def may_go_apart(guidance: str, config: ParallelConfig) -> bool:
    """Whether the halves of guided batches may have stages of their own.

    Args:
        guidance: Whether the model's guidance branches come in one ``"batch"`` or as two ``"calls"``.
        config: The layout.
    """
    batch = guidance == "batch" and config.cfg == 1 and config.split_batch is not False and not config.share_blocks
    return batch and config.pipefusion > 1 and not config.synchronous


def check_stages(config: ParallelConfig, blocks: int, plan: ModelPlan) -> None:
    """Refuses stages that a model of so many blocks cannot fill.

    Raises:
        ValueError: More stages than blocks, ``stage_blocks`` that do not add up, or ways of sharing that do not suit
            what rows of the model meet in.
    """
    if not plan.attends and max(config.ulysses, config.ring, config.distrifusion) > 1:
        raise ValueError(
            f"ulysses, ring and distrifusion are not supported for {plan.model}, in which rows meet in sums and "
            f"convolutions instead of attention: use pipefusion, cfg or data"
        )
    if not plan.shares_blocks and (config.share_blocks or any(size % 1 for size in config.stage_blocks or ())):
        raise ValueError(
            f"two stages of {plan.model} cannot share a block, since more than keys and values of rows would have to "
            f"be exchanged: use share_blocks=False, and whole numbers of stage_blocks"
        )
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
    served = {"image": image, "text": text, "both": image + text}
    cost = 0.0
    for name, parameter in place.block.named_parameters():
        if parameter.ndim < 2 or name.startswith(place.listing.per_call):
            continue
        cost += parameter.numel() * served[place.serves(name)]
    for path, mixed in place.listing.attention.items():
        layer = part_of(place.block, path)
        if layer is not None:
            pairs = image * text if not mixed else (image + (text if len(mixed) > 1 else 0)) ** 2
            cost += 2 * pairs * attention_width(layer)
    return cost
