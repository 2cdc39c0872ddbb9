"""Ovis-Image (``OvisImageTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

OVIS_IMAGE = ModelPlan(
    model="OvisImageTransformer2DModel",
    pipelines=("OvisImagePipeline",),
    grid=PACKED,
    blocks=(DUAL, SINGLE),
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids"),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    embed="x_embedder",
    tail="proj_out",
    per_call=("timestep_embedder", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
