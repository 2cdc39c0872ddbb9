"""Guiders of modular pipelines: which of them work, and why others do not.

Most combine predictions. Some have layers of the transformer left out in calls of their own, by diffusers' hooks; see
``models.skips``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import BaseGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.models import plan_for


def check_guiders(pipe: Any, model: nn.Module, config: ParallelConfig) -> None:
    """Refuses a guider that changes the transformer in a way that ranks and patches do not carry.

    Args:
        pipe: The pipeline.
        model: Its transformer.
        config: The layout.

    Raises:
        ValueError: Names the guider, and what to use.
    """
    for name, part in list(vars(pipe).items()):
        kind: Any = type(part)
        if isinstance(part, BaseGuidance) and kind.cleanup_models is not BaseGuidance.cleanup_models:
            reason = next(_reasons(part, model, config), None)
            if reason is not None:
                raise ValueError(
                    f"the {name} {kind.__name__} {reason}: use a guider that only combines predictions, such as "
                    f"ClassifierFreeGuidance or AdaptiveProjectedGuidance, or run the pipeline on one device"
                )


def _reasons(guider: BaseGuidance, model: nn.Module, config: ParallelConfig) -> Iterator[str]:
    """Why it is not carried."""
    lists = [value for value in vars(guider).values() if isinstance(value, list)]
    skips = [each for value in lists for each in value if isinstance(each, LayerSkipConfig)]
    if not skips:
        yield "changes layers of the transformer in some of its calls, and a rank has only its own"
    if config.compile:
        yield "changes layers in some of its calls, which compile=True would compile anew each time"
    for skip in skips:
        if skip.dropout < 1:
            yield "drops at random what layers make, so that every rank would drop something else"
        blocks = _path(skip, model)
        if blocks not in {listing.path for listing in plan_for(model).blocks}:
            yield f"leaves out layers of {blocks}, which is no list of blocks that stages have"
        if skip.skip_attention and skip.skip_ff and _swaps(model.get_submodule(blocks)):
            yield "leaves out blocks that have two streams, and diffusers then takes one for the other"


def _path(skip: LayerSkipConfig, model: nn.Module) -> str:
    """The list of blocks that is meant, as diffusers finds it."""
    if skip.fqn != "auto":
        return skip.fqn
    return next((name for name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS if hasattr(model, name)), "")


def _swaps(blocks: Any) -> bool:
    """Whether a block returns its text before its picture, where the hook returns the picture first."""
    try:
        return TransformerBlockRegistry.get(type(blocks[0])).return_encoder_hidden_states_index == 0
    except ValueError:  # the hook says so itself
        return False
