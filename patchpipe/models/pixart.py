"""PixArt-α and PixArt-Σ (``PixArtTransformer2DModel``): self-attention on the image, cross-attention to text."""

from patchpipe.models.plan import BlockList, ImageRows, ModelPlan

PIXART = ModelPlan(
    model="PixArtTransformer2DModel",
    grid=ImageRows(),
    blocks=(
        BlockList(
            path="transformer_blocks",
            streams=("hidden_states",),
            attention={"attn1": "image", "attn2": "cross"},
        ),
    ),
    shared_inputs=("encoder_hidden_states", "timestep", "added_cond_kwargs", "encoder_attention_mask"),
    ignored_inputs=("cross_attention_kwargs",),
    embed="pos_embed",
    head=("proj_out",),
    conditioning=("adaln_single", "caption_projection"),
    patch_embed="pos_embed",
)
