"""CogView4 (``CogView4Transformer2DModel``): dual-stream blocks that share their matrices between text and picture."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

COGVIEW4 = ModelPlan(
    model="CogView4Transformer2DModel",
    pipelines=("CogView4Pipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states", "encoder_hidden_states"),
            rows={
                "hidden_states": of("image"),
                "encoder_hidden_states": of("text"),
                "image_rotary_emb": of("image", dim=0),
            },
            attention={"attn1": ("text", "image")},
            per_call=("norm1.linear",),
        ),
    ),
    inputs=("encoder_hidden_states", "timestep", "original_size", "target_size", "crop_coords"),
    ignored_inputs=("attention_kwargs",),
    guidance="calls",
    embed="patch_embed.proj",
    tail="proj_out",
    per_call=("time_condition_embed", "norm_out.linear"),
    per_request={"patch_embed.text_proj": ("encoder_hidden_states",), "rope": ("hidden_states",)},
)
