"""Stable Diffusion 3 and 3.5 (``SD3Transformer2DModel``): joint attention, dual attention in 3.5."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

SD3 = ModelPlan(
    model="SD3Transformer2DModel",
    pipelines=variants("StableDiffusion3", "", "Img2Img", "Inpaint", "ControlNet", "ControlNetInpainting"),
    blocks=(
        BlockList(
            streams=("encoder_hidden_states", "hidden_states"),
            attention={"attn": ("image", "text"), "attn2": ("image",)},
            left_out_by="skip_layers",
        ),
    ),
    inputs=("pooled_projections",),
    residuals={"block_controlnet_hidden_states": of("image")},
    adapters={"SD3IPAdapterJointAttnProcessor2_0": ("image",)},
    tensor="usual",
)
