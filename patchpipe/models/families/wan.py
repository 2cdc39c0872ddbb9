"""Wan 2.1 and 2.2 (``WanTransformer3DModel``): clips; self-attention on them, cross-attention to text and pictures."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

CONTEXT = ("encoder_hidden_states", "encoder_hidden_states_image")

WAN = ModelPlan(
    model="WanTransformer3DModel",
    pipelines=("WanPipeline", "WanImageToVideoPipeline"),
    grid=Latent("bcfhw", cut="f"),
    blocks=(
        BlockList(
            path="blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of("image"), "rotary_emb": of("image"), "temb": of("image", ndim=4)},
            attention={"attn1": ("image",), "attn2": CROSS},
            per_request=dict.fromkeys(("attn2.to_k", "attn2.to_v", "attn2.add_k_proj", "attn2.add_v_proj"), CONTEXT),
        ),
    ),
    inputs=("timestep", *CONTEXT),
    ignored_inputs=("attention_kwargs",),
    guidance="calls",
    embed="patch_embedding",
    tail="proj_out",
    tail_dims={"timestep": 1},
    per_call=("condition_embedder",),
    per_request={"rope": ("hidden_states",)},
)
