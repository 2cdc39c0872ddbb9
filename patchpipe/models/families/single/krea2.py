"""Krea 2 (``Krea2Transformer2DModel``): padded text under a mask."""

from patchpipe.models.latent import Latent, sizes_by_ids
from patchpipe.models.plan import BlockList, ModelPlan, of

ALL = ("text", "image")
TEXT = ("encoder_hidden_states", "encoder_attention_mask")

KREA2 = ModelPlan(
    model="Krea2Transformer2DModel",
    pipelines=("Krea2Pipeline",),
    grid=Latent("bnc", sizes=sizes_by_ids("position_ids", column=1, of_text=True)),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of(*ALL), "image_rotary_emb": of(*ALL, dim=0), "attention_mask": of(*ALL, dim=3)},
            attention={"attn": ALL},
            mask="attention_mask",
        ),
    ),
    inputs=(*TEXT, "timestep", "position_ids"),
    ignored_inputs=("attention_kwargs",),
    unbatched_inputs=("position_ids",),
    guidance="calls",
    embed="img_in",
    per_call=("time_embed", "time_mod_proj"),
    per_request={"text_fusion": TEXT, "txt_in": TEXT, "rotary_emb": ("position_ids",)},
)
