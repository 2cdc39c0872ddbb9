"""What diffusers' classes mostly call things: what a plan need not say.

Names are a convention, not a law. So each is taken only where the module also looks the part (it is given what modules
of that name are given), and a plan that names a module itself is the one that counts. Parity with plain diffusers is
tested for every class.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

ATTENTION_ARGUMENTS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")
UNBATCHED = ("image_rotary_emb", "img_shapes")
IDS = ("img_ids", "txt_ids", "position_ids")  # of one picture, [tokens, axes], or of each of a batch
TEXT_PARAMETERS = ("context", "add_", "_added_", "txt_", "_t.")
BLOCK_TIME = (
    *("norm.linear", "norm1.linear", "norm1_context.linear", "norm2.linear"),
    *("adaLN_modulation", "block.adaLN_modulation", "img_mod", "txt_mod"),
)
TIME = (
    *("time_embed", "time_text_embed", "time_embedding", "time_embeddings", "timestep_embedder", "t_embedder"),
    *("time_condition_embed", "condition_embedder", "time_guidance_embed", "time_extra_emb", "time_in", "adaln_single"),
    *("time_step_proj", "time_mod_proj", "norm_out.linear", "adaLN_modulation", "final_layer.adaLN_modulation"),
)
EMBED = ("x_embedder", "img_in", "proj_in", "patch_embedding", "pos_embed")  # the first that a model has
TAIL = "proj_out"
TEXT_EMBEDDERS = ("context_embedder", "caption_projection", "txt_in", "patch_embed.text_proj")
SPLIT_OUTPUTS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # of attention, by its heads
TENSOR = {
    **{f"{layer}.{name}": "colwise" for layer in ("attn", "attn1", "attn2") for name in SPLIT_OUTPUTS},
    **{f"{layer}.{name}": "rowwise" for layer in ("attn", "attn1", "attn2") for name in ("to_out.0", "to_add_out")},
    **{f"{layer}.net.0.proj": "colwise" for layer in ("ff", "ff_context")},
    **{f"{layer}.net.2": "rowwise" for layer in ("ff", "ff_context")},
}  # of a block, as in diffusers' _tp_plan


def pipeline(model: str) -> str:
    """The first pipeline of a transformer class: ``AuraFlowPipeline`` of ``AuraFlowTransformer2DModel``."""
    return re.sub(r"(Transformer)?[23]DModel$", "Pipeline", model)


def per_call(model: nn.Module) -> tuple[str, ...]:
    """Modules of a model, by path, whose result follows from time and text: the same for every patch of a call."""
    return tuple(path for path in TIME if _found(model, path) is not None)


def per_request(model: nn.Module, latent: str, text: str, inputs: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Modules whose result follows from some inputs alone, and these inputs.

    Args:
        model: The model.
        latent: The input that is the latent, of which only the shape counts.
        text: The input that identifies the prompt.
        inputs: What the model may be called with.
    """
    found: dict[str, tuple[str, ...]] = {path: (text,) for path in TEXT_EMBEDDERS if len(_arguments(model, path)) == 1}
    if _arguments(model, "rope") == [latent]:
        found["rope"] = (latent,)
    if _arguments(model, "pos_embed") == ["ids"] and set(IDS[:2]) <= set(inputs):
        found["pos_embed"] = IDS[:2]
    return found


def embed(model: nn.Module) -> str:
    """The module that turns the latent into tokens, or nothing."""
    return next((path for path in EMBED if _found(model, path) is not None), "")


def tail(model: nn.Module) -> str:
    """The module that turns tokens into the prediction, or nothing."""
    return TAIL if _found(model, TAIL) is not None else ""


def _found(model: nn.Module, path: str) -> nn.Module | None:
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _arguments(model: nn.Module, path: str) -> list[str]:
    module = _found(model, path)
    if module is None or isinstance(module, nn.ModuleList):
        return []
    return list(inspect.signature(type(module).forward).parameters)[1:]
