"""DiT (``DiTTransformer2DModel``): pictures of a class, with no text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

DIT = ModelPlan(
    model="DiTTransformer2DModel",
    pipelines=("DiTPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of("image")},
            attention={"attn1": ("image",)},
            per_call=("norm1.emb", "norm1.linear"),
        ),
    ),
    inputs=("timestep", "class_labels"),
    text="class_labels",
    embed="pos_embed",
    tail="proj_out_2",
    shared_parts=("transformer_blocks.0.norm1.emb",),
)
