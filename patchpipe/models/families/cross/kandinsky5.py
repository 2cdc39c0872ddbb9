"""Kandinsky 5 (``Kandinsky5Transformer3DModel``): self-attention on the picture, cross-attention to text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

KANDINSKY5 = ModelPlan(
    model="Kandinsky5Transformer3DModel",
    pipelines=("Kandinsky5T2IPipeline",),
    grid=Latent("bfhwc", cut="h"),
    blocks=(
        BlockList(
            path="visual_transformer_blocks",
            count="num_visual_blocks",
            streams=("visual_embed",),
            rows={"visual_embed": of("image"), "rope": of("image")},
            attention={"self_attention": ("image",), "cross_attention": CROSS},
            per_call=("visual_modulation",),
        ),
    ),
    inputs=(
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "visual_rope_pos",
        "text_rope_pos",
        "scale_factor",
    ),
    unbatched_inputs=("visual_rope_pos", "text_rope_pos", "scale_factor"),
    guidance="calls",
    embed="visual_embeddings",
    per_call=("time_embeddings", "text_transformer_blocks.*"),
    per_request={"text_embeddings": ("encoder_hidden_states",), "pooled_text_embeddings": ("pooled_projections",)},
)
