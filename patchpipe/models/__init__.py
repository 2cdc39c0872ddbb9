"""Plans: what the engine knows of each diffusers transformer class, as data."""

from __future__ import annotations

from torch import nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.flux import FLUX
from patchpipe.models.pixart import PIXART
from patchpipe.models.plan import ModelPlan
from patchpipe.models.sd3 import SD3

PLANS: tuple[ModelPlan, ...] = (FLUX, SD3, PIXART)


def supported() -> list[str]:
    """Names of the transformer classes that have a plan."""
    return [plan.model for plan in PLANS]


def plan_for(model: nn.Module | str) -> ModelPlan:
    """The plan of a transformer, by its class or a class it derives from.

    Raises:
        UnsupportedModel: No plan describes the class.
    """
    names = [model] if isinstance(model, str) else [cls.__name__ for cls in type(model).__mro__]
    for plan in PLANS:
        if plan.model in names:
            return plan
    raise UnsupportedModel(
        f"{names[0]} has no plan yet; supported are {', '.join(supported())}. "
        f"A plan is a few lines of data: see docs/adding-a-model.md"
    )
