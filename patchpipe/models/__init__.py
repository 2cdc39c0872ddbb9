"""Plans: what the engine knows of each diffusers transformer class, as data."""

from __future__ import annotations

from typing import Any

from torch import nn

from patchpipe.errors import UnsupportedModel
from patchpipe.models.families.clips.allegro import ALLEGRO
from patchpipe.models.families.clips.cogvideox import COGVIDEOX, CONSISID
from patchpipe.models.families.clips.cosmos import COSMOS
from patchpipe.models.families.clips.easyanimate import EASY_ANIMATE
from patchpipe.models.families.clips.helios import HELIOS
from patchpipe.models.families.clips.hunyuan_video import FRAMEPACK, HUNYUAN_VIDEO, HUNYUAN_VIDEO_15
from patchpipe.models.families.clips.kandinsky5 import KANDINSKY5
from patchpipe.models.families.clips.ltx2 import LTX2
from patchpipe.models.families.clips.mochi import MOCHI
from patchpipe.models.families.clips.wan_relatives import ANYFLOW, CHRONO_EDIT, SKYREELS_V2, WAN_ANIMATE, WAN_VACE
from patchpipe.models.families.cross.dit import DIT
from patchpipe.models.families.cross.hunyuandit import HUNYUAN_DIT
from patchpipe.models.families.cross.pixart import PIXART
from patchpipe.models.families.cross.prx import PRX
from patchpipe.models.families.cross.sana import SANA
from patchpipe.models.families.dual.bria import BRIA
from patchpipe.models.families.dual.chroma import CHROMA
from patchpipe.models.families.dual.fibo import BRIA_FIBO
from patchpipe.models.families.dual.flux import FLUX
from patchpipe.models.families.dual.flux2 import FLUX2
from patchpipe.models.families.dual.hunyuan_image import HUNYUAN_IMAGE
from patchpipe.models.families.dual.longcat import LONGCAT_IMAGE
from patchpipe.models.families.dual.ovis import OVIS_IMAGE
from patchpipe.models.families.joint.auraflow import AURAFLOW
from patchpipe.models.families.joint.cogview3 import COGVIEW3_PLUS
from patchpipe.models.families.joint.cogview4 import COGVIEW4
from patchpipe.models.families.joint.glm import GLM_IMAGE
from patchpipe.models.families.joint.hidream import HIDREAM
from patchpipe.models.families.joint.qwen import QWEN_IMAGE
from patchpipe.models.families.joint.sd3 import SD3
from patchpipe.models.families.ltx import LTX
from patchpipe.models.families.single.ernie import ERNIE_IMAGE
from patchpipe.models.families.single.ideogram4 import IDEOGRAM4
from patchpipe.models.families.single.krea2 import KREA2
from patchpipe.models.families.single.lumina2 import LUMINA2
from patchpipe.models.families.single.qwen21 import QWEN_IMAGE_21
from patchpipe.models.families.single.zimage import Z_IMAGE
from patchpipe.models.families.wan import WAN
from patchpipe.models.plan import ModelPlan
from patchpipe.models.refused import REFUSED

PLANS: tuple[ModelPlan, ...] = (
    *(FLUX, SD3, PIXART, QWEN_IMAGE, FLUX2, WAN, Z_IMAGE, COGVIEW4, LTX),
    *(CHROMA, OVIS_IMAGE, LONGCAT_IMAGE, BRIA, KREA2, LUMINA2, ERNIE_IMAGE, AURAFLOW, COGVIEW3_PLUS, GLM_IMAGE),
    *(BRIA_FIBO, HIDREAM, HUNYUAN_DIT, HUNYUAN_IMAGE, SANA, DIT, PRX, IDEOGRAM4, QWEN_IMAGE_21),
    *(LTX2, HUNYUAN_VIDEO, COGVIDEOX, HUNYUAN_VIDEO_15, FRAMEPACK, MOCHI, COSMOS, KANDINSKY5, ALLEGRO, EASY_ANIMATE),
    *(HELIOS, CHRONO_EDIT, ANYFLOW, SKYREELS_V2, WAN_VACE, WAN_ANIMATE, CONSISID),
)


def supported() -> list[str]:
    """Names of the transformer classes that have a plan."""
    return [plan.model for plan in PLANS]


def names_transformer(name: str) -> bool:
    """Whether a pipeline's component of this name is a transformer."""
    beside = any(plan.beside == name for plan in PLANS)
    return name == "transformer" or name.startswith("transformer_") or beside


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by name: one, several that take turns as in Wan 2.2, or one and another beside it.

    Those that ``torch.compile`` has wrapped come without its wrapper.

    Raises:
        ValueError: They differ in more than their weights.
    """
    found: dict[str, nn.Module] = {}
    for name, part in vars(pipe).items():
        if isinstance(part, nn.Module) and names_transformer(name):
            found[name] = getattr(part, "_orig_mod", part)
    first = found["transformer"]
    for name, model in found.items():
        if type(model) is not type(first) or settings_of(model) != settings_of(first):
            raise ValueError(
                f"{name} of {type(pipe).__name__} is not made like its transformer: several transformers of a pipeline "
                f"must be of one class and alike in their configuration"
            )
    return found


def settings_of(model: Any) -> dict[str, Any]:
    """A model's configuration without diffusers' own notes, whose order differs from process to process."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def plan_for(model: nn.Module | str) -> ModelPlan:
    """The plan of a transformer, by its class or a class it derives from.

    A model whose ``patchpipe_plan`` is a plan has that one: a way to try a plan without changing patchpipe.

    Args:
        model: The transformer, or the name of its class alone; its configuration is then left unchecked.

    Raises:
        UnsupportedModel: No plan describes the class, or not as it is configured.
    """
    own = None if isinstance(model, str) else vars(model).get("patchpipe_plan")
    if isinstance(own, ModelPlan):
        return own
    names = [model] if isinstance(model, str) else [cls.__name__ for cls in type(model).__mro__]
    for plan in PLANS:
        if plan.model in names:
            if not isinstance(model, str):
                plan.check_settings(model.config)
            return plan
    if names[0] in REFUSED:
        raise UnsupportedModel(f"{names[0]} cannot be spread over devices: {REFUSED[names[0]]}")
    raise UnsupportedModel(
        f"{names[0]} has no plan yet; supported are {', '.join(supported())}. "
        f"A plan is a few lines of data: see docs/adding-a-model.md"
    )
