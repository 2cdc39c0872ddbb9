"""Sana (``SanaTransformer2DModel``): linear attention, cross-attention to text, 3×3 convolutions."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states",)

SANA = ModelPlan(
    model="SanaTransformer2DModel",
    pipelines=("SanaPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of("image")},
            attention={"attn2": CROSS},
            sums=("attn1",),
            borders=("ff.conv_depth",),
            row_counts=("height",),
        ),
    ),
    inputs=(*TEXT, "encoder_attention_mask", "timestep"),
    ignored_inputs=("attention_kwargs",),
    embed="patch_embed",
    tail="proj_out",
    per_call=("time_embed",),
    per_request={"caption_projection": TEXT},
)
