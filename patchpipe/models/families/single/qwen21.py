"""Qwen-Image 2.1 (``QwenImage21Transformer2DModel``): one stream, whose text and given pictures see no picture."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.latent import Latent, last_of_shapes, others_of_shapes
from patchpipe.models.plan import ModelPlan, Prefix

QWEN_IMAGE_21 = ModelPlan(
    model="QwenImage21Transformer2DModel",
    grid=Latent("bnc", sizes=last_of_shapes, ahead=others_of_shapes),
    blocks=(
        BlockList(
            rows=dict.fromkeys(("rotary_emb", "target_token_mask"), of("image", dim=0)),
            attention={"attn": ("image",)},
            cache="layer_cache",
        ),
    ),
    inputs=("img_shapes", "img_mask", "encoder_hidden_states_mask", "kv_cache", "kv_cache_mode"),
    guidance="calls",
    per_call=("modulation",),
    per_request={"pos_embed": ("img_shapes", "img_mask")},
    tail="",
    tensor="class",
    prefix=Prefix(always=True, mask="encoder_hidden_states_mask"),
)
