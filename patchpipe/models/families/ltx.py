"""LTX-Video (``LTXVideoTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states",)

LTX = ModelPlan(
    model="LTXVideoTransformer3DModel",
    pipelines=("LTXPipeline",),
    grid=Latent(
        "bnc", cut="f", sizes=lambda _, call: {"f": call["num_frames"], "h": call["height"], "w": call["width"]}
    ),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows=dict.fromkeys(("hidden_states", "image_rotary_emb", "temb"), of("image")),
            attention={"attn1": ("image",), "attn2": CROSS},
            per_request={"attn2.to_k": TEXT, "attn2.to_v": TEXT},
        ),
    ),
    inputs=(*TEXT, "timestep", "encoder_attention_mask", "num_frames", "height", "width", "rope_interpolation_scale"),
    ignored_inputs=("attention_kwargs",),
    unbatched_inputs=("rope_interpolation_scale",),
    embed="proj_in",
    tail="proj_out",
    tail_dims={"timestep": 1},
    per_call=("time_embed",),
    per_request={"caption_projection": TEXT, "rope": ("hidden_states", "rope_interpolation_scale")},
    frames_per_second=24,
)
