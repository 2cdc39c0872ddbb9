"""Plans: what the engine knows of each diffusers transformer class, as data."""

from __future__ import annotations

from torch import nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.families.flux import FLUX
from patchpipe.models.families.flux2 import FLUX2
from patchpipe.models.families.pixart import PIXART
from patchpipe.models.families.qwen import QWEN_IMAGE
from patchpipe.models.families.sd3 import SD3
from patchpipe.models.families.wan import WAN
from patchpipe.models.plan import ModelPlan

PLANS: tuple[ModelPlan, ...] = (FLUX, SD3, PIXART, QWEN_IMAGE, FLUX2, WAN)


def supported() -> list[str]:
    """Names of the transformer classes that have a plan."""
    return [plan.model for plan in PLANS]


def plan_for(model: nn.Module | str) -> ModelPlan:
    """The plan of a transformer, by its class or a class it derives from.

    Args:
        model: The transformer, or the name of its class alone; its configuration is then left unchecked.

    Raises:
        UnsupportedModel: No plan describes the class, or not as it is configured.
    """
    names = [model] if isinstance(model, str) else [cls.__name__ for cls in type(model).__mro__]
    for plan in PLANS:
        if plan.model in names:
            if not isinstance(model, str):
                plan.check_settings(model.config)
            return plan
    raise UnsupportedModel(
        f"{names[0]} has no plan yet; supported are {', '.join(supported())}. "
        f"A plan is a few lines of data: see docs/adding-a-model.md"
    )
