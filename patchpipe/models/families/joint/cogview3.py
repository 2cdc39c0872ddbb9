"""CogView3-Plus (``CogView3PlusTransformer2DModel``): blocks that share their matrices between text and picture."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

COGVIEW3_PLUS = ModelPlan(
    model="CogView3PlusTransformer2DModel",
    pipelines=("CogView3PlusPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states", "encoder_hidden_states"),
            rows={"hidden_states": of("image"), "encoder_hidden_states": of("text")},
            attention={"attn1": ("text", "image")},
            per_call=("norm1.linear",),
        ),
    ),
    inputs=("encoder_hidden_states", "timestep", "original_size", "target_size", "crop_coords"),
    embed="patch_embed.proj",
    tail="proj_out",
    per_call=("time_condition_embed", "norm_out.linear"),
    per_request={"patch_embed.text_proj": ("encoder_hidden_states",)},
)
