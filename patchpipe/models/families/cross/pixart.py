"""PixArt-α and PixArt-Σ (``PixArtTransformer2DModel``): self-attention on the image, cross-attention to text."""

from patchpipe.models.families.kinds import SELF_AND_CROSS, variants
from patchpipe.models.plan import ModelPlan

PIXART = ModelPlan(
    model="PixArtTransformer2DModel",
    pipelines=variants("PixArt", "Alpha", "Sigma"),
    blocks=(SELF_AND_CROSS,),
    inputs=("added_cond_kwargs", "encoder_attention_mask"),
    tensor="usual",
)
