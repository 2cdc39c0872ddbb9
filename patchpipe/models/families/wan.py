"""Wan 2.1 and 2.2 (``WanTransformer3DModel``): clips; self-attention on them, cross-attention to text and pictures."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.kinds import CLIP, SELF_AND_CROSS, variants
from patchpipe.models.plan import ModelPlan

WAN = ModelPlan(
    model="WanTransformer3DModel",
    pipelines=(*variants("Wan", "", "ImageToVideo", "VideoToVideo"), "LucyEditPipeline"),
    grid=CLIP,
    blocks=(replace(SELF_AND_CROSS, path="blocks", rows={"rotary_emb": of("image"), "temb": of("image", ndim=4)}),),
    inputs=("encoder_hidden_states_image",),
    guidance="calls",
    frames_per_second=16,
)
