"""PRX (``PRXTransformer2DModel``): the picture attends to itself and to the text at once."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.plan import ModelPlan

BLOCKS = BlockList(
    path="blocks",
    count="depth",
    rows={
        **dict.fromkeys(("encoder_hidden_states", "attention_mask"), of("text")),
        "image_rotary_emb": of("image", dim=2),
    },
    attention={"attention": ("text", "image")},
    asking={"attention": ("image",)},
    mask="attention_mask",
    per_call=("modulation",),
)

PRX = ModelPlan(
    model="PRXTransformer2DModel",
    blocks=(BLOCKS,),
    inputs=("attention_mask",),
    tail="final_layer",
)
