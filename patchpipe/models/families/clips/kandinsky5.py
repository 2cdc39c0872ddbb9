"""Kandinsky 5 (``Kandinsky5Transformer3DModel``): clips, a picture being one of one frame; blocks on the text first."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

POSITIONS = ("visual_rope_pos", "text_rope_pos", "scale_factor")
TEXT = {"text_embeddings": ("encoder_hidden_states",), "pooled_text_embeddings": ("pooled_projections",)}

KANDINSKY5 = ModelPlan(
    model="Kandinsky5Transformer3DModel", pipelines=("Kandinsky5T2VPipeline", "Kandinsky5T2IPipeline"),
    grid=Latent("bfhwc", cut="f"), guidance="calls", frames_per_second=24,
    blocks=(BlockList(
        path="visual_transformer_blocks", count="num_visual_blocks", streams=("visual_embed",),
        rows={"visual_embed": of("image"), "rope": of("image")},
        attention={"self_attention": ("image",), "cross_attention": CROSS},
        per_call=("visual_modulation", "cross_attention.to_key", "cross_attention.to_value"),
    ),),
    inputs=("encoder_hidden_states", "timestep", "pooled_projections", *POSITIONS), unbatched_inputs=POSITIONS,
    embed="visual_embeddings", per_request=TEXT,
    per_call=("time_embeddings", "text_transformer_blocks.*", "out_layer.modulation"),
)  # fmt: skip
