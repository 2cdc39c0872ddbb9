"""LTX-Video (``LTXVideoTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.kinds import NUMBERS, PACKED_CLIP, SELF_AND_CROSS, variants
from patchpipe.models.plan import ModelPlan

LTX = ModelPlan(
    model="LTXVideoTransformer3DModel",
    pipelines=variants("LTX", "", "ImageToVideo"),
    grid=PACKED_CLIP,
    blocks=(replace(SELF_AND_CROSS, rows=dict.fromkeys(("image_rotary_emb", "temb"), of("image"))),),
    inputs=("encoder_attention_mask", *NUMBERS, "rope_interpolation_scale"),
    unbatched_inputs=("rope_interpolation_scale",),
    per_request={"rope": ("hidden_states", "rope_interpolation_scale")},
)
