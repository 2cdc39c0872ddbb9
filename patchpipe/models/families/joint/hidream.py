"""HiDream-I1 (``HiDreamImageTransformer2DModel``): a text of its own joins every block; pictures are filled up."""

from dataclasses import replace

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.plan import ModelPlan

PICTURE, ALL = ("image", "pad"), ("image", "pad", "text")  # filled up where it is not square
DUAL = BlockList(
    path="double_stream_blocks",
    streams=("hidden_states", "encoder_hidden_states"),
    rows={"hidden_states": of(*PICTURE), "hidden_states_masks": of(*PICTURE), "image_rotary_emb": of(*ALL)},
    attention={"block.attn1": ALL},
    whole_between=True,
)
SINGLE = replace(
    DUAL,
    path="single_stream_blocks",
    count="num_single_layers",
    streams=("hidden_states",),
    rows=dict.fromkeys(("hidden_states", "hidden_states_masks", "image_rotary_emb"), of(*ALL)),
)
TEXTS = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3")

HIDREAM = ModelPlan(
    model="HiDreamImageTransformer2DModel",
    blocks=(DUAL, SINGLE),
    inputs=(*TEXTS, "pooled_embeds"),
    batch_dims={"encoder_hidden_states_llama3": 1},
    time="timesteps",
    text="encoder_hidden_states_t5",
    per_request={"p_embedder": ("pooled_embeds",), "caption_projection.*": TEXTS},
)
