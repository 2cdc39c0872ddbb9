"""Cosmos 1, 2 and 2.5 (``CosmosTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.kinds import CLIP, ROTARY, SELF_AND_CROSS, variants
from patchpipe.models.plan import ModelPlan

ROWS = {
    "extra_pos_emb": of("image"),
    **ROTARY,
    **dict.fromkeys(("embedded_timestep", "temb"), of("image", ndim=3)),
}

COSMOS = ModelPlan(
    model="CosmosTransformer3DModel",
    pipelines=variants("Cosmos", "TextToWorld", "VideoToWorld", "2VideoToWorld", "2_5_PredictBase"),
    grid=CLIP,
    blocks=(replace(SELF_AND_CROSS, rows=ROWS),),
    inputs=("attention_mask", "fps", "condition_mask", "padding_mask"),
    unbatched_inputs=("padding_mask",),
    guidance="calls",
    embed="patch_embed",
    per_request={"crossattn_proj": ("encoder_hidden_states",)},
    frames_per_second=30,
)
