"""Chroma (``ChromaTransformer2DModel``): a mask by query and key over text and picture, which no patch cuts."""

from dataclasses import replace

from patchpipe.models.families.dual.lists import DUAL, MERGED, PACKED
from patchpipe.models.plan import ModelPlan

CHROMA = ModelPlan(
    model="ChromaTransformer2DModel",
    pipelines=("ChromaPipeline",),
    grid=PACKED,
    blocks=tuple(replace(blocks, mask="attention_mask", per_call=()) for blocks in (DUAL, MERGED)),
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids", "attention_mask"),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    embed="x_embedder",
    per_call=("time_text_embed", "distilled_guidance_layer"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
