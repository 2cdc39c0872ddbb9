"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.families.dual.lists import DUAL, SINGLE, WITH_REFERENCES
from patchpipe.models.plan import ModelPlan, of

REPEAT = "controlnet_blocks_repeat"

FLUX = ModelPlan(
    model="FluxTransformer2DModel",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxKontextPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    grid=WITH_REFERENCES,
    blocks=(DUAL, SINGLE),
    inputs=("encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids", REPEAT),
    ignored_inputs=("joint_attention_kwargs",),
    residuals=dict.fromkeys(("controlnet_block_samples", "controlnet_single_block_samples"), of("image", "reference")),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    tensor="class",
    embed="x_embedder",
    tail="proj_out",
    per_call=("time_text_embed", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
