"""GLM-Image (``GlmImageTransformer2DModel``): tokens of an earlier draft are added to the picture's."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

GLM_IMAGE = ModelPlan(
    model="GlmImageTransformer2DModel",
    pipelines=("GlmImagePipeline",),
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
    inputs=("encoder_hidden_states", "prior_token_id", "prior_token_drop", "timestep", "target_size", "crop_coords"),
    ignored_inputs=("attention_kwargs",),
    idle_inputs={"kv_caches": lambda caches: all(layer.mode is None for layer in caches.caches)},
    guidance="calls",
    embed="image_projector",
    tail="proj_out",
    per_call=("time_condition_embed", "norm_out.linear"),
    per_request={
        "glyph_projector": ("encoder_hidden_states",),
        "prior_projector": ("prior_token_id", "prior_token_drop"),
        "rope": ("hidden_states",),
    },
)
