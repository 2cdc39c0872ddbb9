"""Hunyuan-DiT (``HunyuanDiT2DModel``): blocks of the second half take what one of the first half returned."""

from dataclasses import replace

from patchpipe.models.families.kinds import ROTARY, SELF_AND_CROSS
from patchpipe.models.plan import ModelPlan

HUNYUAN_DIT = ModelPlan(
    model="HunyuanDiT2DModel",
    blocks=(replace(SELF_AND_CROSS, path="blocks", rows=ROTARY, links=("skip",), per_request={}),),
    inputs=(
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "image_rotary_emb",
    ),
    per_request={"text_embedder": ("encoder_hidden_states_t5",)},
)
