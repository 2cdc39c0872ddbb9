"""PixArt-α and PixArt-Σ (``PixArtTransformer2DModel``): self-attention on the image, cross-attention to text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

PIXART = ModelPlan(
    model="PixArtTransformer2DModel",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of("image")},
            attention={"attn1": ("image",), "attn2": CROSS},
            per_request={"attn2.to_k": ("encoder_hidden_states",), "attn2.to_v": ("encoder_hidden_states",)},
        ),
    ),
    inputs=("encoder_hidden_states", "timestep", "added_cond_kwargs", "encoder_attention_mask"),
    ignored_inputs=("cross_attention_kwargs",),
    embed="pos_embed",
    tail="proj_out",
    per_call=("adaln_single",),
    per_request={"caption_projection": ("encoder_hidden_states",)},
    tensor={
        "transformer_blocks.*.attn1.to_q": "colwise",
        "transformer_blocks.*.attn1.to_k": "colwise",
        "transformer_blocks.*.attn1.to_v": "colwise",
        "transformer_blocks.*.attn1.to_out.0": "rowwise",
        "transformer_blocks.*.attn2.to_q": "colwise",
        "transformer_blocks.*.attn2.to_k": "colwise",
        "transformer_blocks.*.attn2.to_v": "colwise",
        "transformer_blocks.*.attn2.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
    },
)
