"""DiT (``DiTTransformer2DModel``): pictures of a class, with no text."""

from patchpipe.models.blocks import BlockList
from patchpipe.models.plan import ModelPlan

DIT = ModelPlan(
    model="DiTTransformer2DModel",
    blocks=(BlockList(attention={"attn1": ("image",)}, per_call=("norm1.emb", "norm1.linear")),),
    text="class_labels",
    tail="proj_out_2",
    shared_parts=("transformer_blocks.0.norm1.emb",),
)
