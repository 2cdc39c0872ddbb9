"""Kandinsky 5 (``Kandinsky5Transformer3DModel``): clips, a picture being one of one frame; blocks on the text first."""

from patchpipe.models.blocks import CROSS, BlockList, of
from patchpipe.models.families.kinds import variants
from patchpipe.models.latent import Latent
from patchpipe.models.plan import ModelPlan

POSITIONS = ("visual_rope_pos", "text_rope_pos", "scale_factor")

KANDINSKY5 = ModelPlan(
    model="Kandinsky5Transformer3DModel",
    pipelines=variants("Kandinsky5", "T2V", "I2V", "T2I"),
    grid=Latent("bfhwc", cut="f"),
    blocks=(
        BlockList(
            path="visual_transformer_blocks",
            count="num_visual_blocks",
            streams=("visual_embed",),
            rows={"rope": of("image")},
            attention={"self_attention": ("image",), "cross_attention": CROSS},
            per_call=("visual_modulation", "cross_attention.to_key", "cross_attention.to_value"),
        ),
    ),
    inputs=("pooled_projections", *POSITIONS),
    unbatched_inputs=POSITIONS,
    guidance="calls",
    embed="visual_embeddings",
    per_call=("text_transformer_blocks.*", "out_layer.modulation"),
    per_request={"text_embeddings": ("encoder_hidden_states",), "pooled_text_embeddings": ("pooled_projections",)},
)
