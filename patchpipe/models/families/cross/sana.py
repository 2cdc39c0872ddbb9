"""Sana (``SanaTransformer2DModel``): linear attention, cross-attention to text, 3×3 convolutions."""

from patchpipe.models.blocks import CROSS, BlockList
from patchpipe.models.plan import ModelPlan

SANA = ModelPlan(
    model="SanaTransformer2DModel",
    pipelines=("SanaPipeline",),
    blocks=(
        BlockList(attention={"attn2": CROSS}, sums=("attn1",), borders=("ff.conv_depth",), row_counts=("height",)),
    ),
    inputs=("encoder_attention_mask",),
    embed="patch_embed",
)
