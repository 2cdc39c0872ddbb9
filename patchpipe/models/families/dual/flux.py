"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.families.dual.lists import DUAL, SINGLE, WITH_REFERENCES
from patchpipe.models.plan import ModelPlan

FLUX = ModelPlan(
    model="FluxTransformer2DModel",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxKontextPipeline",
    ),
    grid=WITH_REFERENCES,
    blocks=(DUAL, SINGLE),
    inputs=("encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    tensor="class",
    embed="x_embedder",
    tail="proj_out",
    per_call=("time_text_embed", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
