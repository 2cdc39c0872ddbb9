"""Lumina Image 2.0 (``Lumina2Transformer2DModel``): refiners for picture and text, then blocks on both as one."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import MASKED_TEXT
from patchpipe.models.plan import ModelPlan

ALL = ("text", "image")
ROTARY = {"image_rotary_emb": of("image")}
REFINER = BlockList(path="noise_refiner", count="num_refiner_layers", attention={"attn": ("image",)}, rows=ROTARY)
LAYERS = BlockList(
    path="layers", attention={"attn": ALL}, rows=dict.fromkeys(("hidden_states", "image_rotary_emb"), of(*ALL))
)

LUMINA2 = ModelPlan(
    model="Lumina2Transformer2DModel",
    blocks=(REFINER, LAYERS),
    inputs=("encoder_attention_mask",),
    lengths=("encoder_attention_mask",),
    same_lengths=True,
    guidance="calls",
    tail="norm_out",
    per_call=("time_caption_embed.timestep_embedder",),
    per_request={"time_caption_embed.caption_embedder": MASKED_TEXT, "context_refiner.*": MASKED_TEXT},
)
