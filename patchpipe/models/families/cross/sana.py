"""Sana (``SanaTransformer2DModel``): linear attention, cross-attention to text, 3×3 convolutions."""

from patchpipe.models.blocks import CROSS, BlockList
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

SANA = ModelPlan(
    model="SanaTransformer2DModel",
    pipelines=variants("Sana", "", "Sprint", "SprintImg2Img"),
    blocks=(
        BlockList(attention={"attn2": CROSS}, sums=("attn1",), borders=("ff.conv_depth",), row_counts=("height",)),
    ),
    inputs=("encoder_attention_mask", "guidance"),
    embed="patch_embed",
)
