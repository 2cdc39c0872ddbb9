"""Krea 2 (``Krea2Transformer2DModel``): padded text under a mask."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import MASKED_TEXT
from patchpipe.models.latent import Latent, sizes_by_ids
from patchpipe.models.plan import ModelPlan

ALL = ("text", "image")

KREA2 = ModelPlan(
    model="Krea2Transformer2DModel",
    grid=Latent("bnc", sizes=sizes_by_ids("position_ids", column=1, of_text=True)),
    blocks=(
        BlockList(
            rows={"hidden_states": of(*ALL), "image_rotary_emb": of(*ALL, dim=0), "attention_mask": of(*ALL, dim=3)},
            attention={"attn": ALL},
            mask="attention_mask",
        ),
    ),
    inputs=("encoder_attention_mask", "position_ids"),
    guidance="calls",
    per_request={"text_fusion": MASKED_TEXT, "txt_in": MASKED_TEXT, "rotary_emb": ("position_ids",)},
)
