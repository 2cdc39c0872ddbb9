"""Allegro (``AllegroTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states",)

ALLEGRO = ModelPlan(
    model="AllegroTransformer3DModel", pipelines=("AllegroPipeline",),
    grid=Latent("bcfhw", cut="f"), frames_per_second=15,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=("hidden_states",),
        rows={"hidden_states": of("image"), "image_rotary_emb": (None, of("image"))},
        attention={"attn1": ("image",), "attn2": CROSS}, per_request={"attn2.to_k": TEXT, "attn2.to_v": TEXT},
    ),),
    inputs=(*TEXT, "timestep", "encoder_attention_mask", "image_rotary_emb"), unbatched_inputs=("image_rotary_emb",),
    embed="pos_embed", tail="proj_out", per_call=("adaln_single",), per_request={"caption_projection": TEXT},
)  # fmt: skip
