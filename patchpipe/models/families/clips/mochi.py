"""Mochi (``MochiTransformer3DModel``): clips; dual-stream blocks whose attention takes entries one by one."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import CLIP, JOINT, ROTARY
from patchpipe.models.plan import ModelPlan

MOCHI = ModelPlan(
    model="MochiTransformer3DModel",
    grid=CLIP,
    blocks=(
        BlockList(
            streams=JOINT.streams,
            rows={"encoder_attention_mask": of("text"), **ROTARY},
            attention={"attn1": ("image", "text")},
            mask="encoder_attention_mask",
            drops_masked=True,
        ),
    ),
    inputs=("encoder_attention_mask",),
    embed="patch_embed",
    per_call=("rope",),
    frames_per_second=30,
)
