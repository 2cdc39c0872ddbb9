"""Bria 3.2 (``BriaTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

BRIA = ModelPlan(
    model="BriaTransformer2DModel",
    pipelines=("BriaPipeline",),
    grid=PACKED,
    blocks=(DUAL, SINGLE),
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids"),
    ignored_inputs=("attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    embed="x_embedder",
    tail="proj_out",
    per_call=("time_embed", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
