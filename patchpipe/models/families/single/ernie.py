"""ERNIE-Image (``ErnieImageTransformer2DModel``): rows come first in its blocks, before the batch."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.plan import ModelPlan

ALL = ("image", "text")
FIRST, SECOND, LAST = (of(*ALL, dim=dim) for dim in (0, 1, 3))

ERNIE_IMAGE = ModelPlan(
    model="ErnieImageTransformer2DModel",
    blocks=(
        BlockList(
            path="layers",
            streams=("x",),
            rows={"x": FIRST, "temb": FIRST, "rotary_pos_emb": SECOND, "attention_mask": LAST},
            attention={"self_attention": ALL},
            mask="attention_mask",
        ),
    ),
    inputs=("text_lens",),
    text="text_bth",
    tail="final_linear",
    per_request={"text_proj": ("text_bth",)},
)
