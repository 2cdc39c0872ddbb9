"""Allegro (``AllegroTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.kinds import CLIP, SELF_AND_CROSS
from patchpipe.models.plan import ModelPlan

ALLEGRO = ModelPlan(
    model="AllegroTransformer3DModel",
    grid=CLIP,
    blocks=(replace(SELF_AND_CROSS, rows={"image_rotary_emb": (None, of("image"))}),),
    inputs=("encoder_attention_mask", "image_rotary_emb"),
    frames_per_second=15,
)
