"""Helios (``HeliosTransformer3DModel``): clips in sections; what came before rides along."""

from patchpipe.models.blocks import CROSS, BlockList, of
from patchpipe.models.families.kinds import CLIP
from patchpipe.models.plan import ModelPlan

HISTORY = tuple(f"latents_history_{part}" for part in ("short", "mid", "long"))
INDICES = ("indices_hidden_states", *(f"indices_{name}" for name in HISTORY))
ALL = ("history", "image")

HELIOS = ModelPlan(
    model="HeliosTransformer3DModel",
    grid=CLIP,
    blocks=(
        BlockList(
            path="blocks",
            rows={"hidden_states": of(*ALL), "rotary_emb": of(*ALL), "temb": of(*ALL, ndim=4)},
            attention={"attn1": ALL, "attn2": CROSS},
            counts=("original_context_length",),
        ),
    ),
    inputs=(*INDICES, *HISTORY),
    unbatched_inputs=INDICES,
    guidance="calls",
    sections=True,
)
