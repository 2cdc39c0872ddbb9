"""LongCat-Image (``LongCatImageTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

LONGCAT_IMAGE = ModelPlan(
    model="LongCatImageTransformer2DModel",
    pipelines=("LongCatImagePipeline",),
    grid=PACKED,
    blocks=(DUAL, SINGLE),
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids"),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    embed="x_embedder",
    tail="proj_out",
    per_call=("time_embed", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
