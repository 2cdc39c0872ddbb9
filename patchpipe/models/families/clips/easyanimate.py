"""EasyAnimate (``EasyAnimateTransformer3DModel``): clips; dual-stream blocks, then blocks of shared matrices."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

STREAMS = {"hidden_states": of("image"), "encoder_hidden_states": of("text")}
TEXT = {"text_proj": ("encoder_hidden_states",), "text_proj_t5": ("encoder_hidden_states_t5",)}

EASY_ANIMATE = ModelPlan(
    model="EasyAnimateTransformer3DModel", pipelines=("EasyAnimatePipeline",),
    grid=Latent("bcfhw", cut="f"), frames_per_second=8,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=tuple(STREAMS),
        rows={**STREAMS, "image_rotary_emb": of("image", dim=0)},
        attention={"attn1": ("text", "image")}, per_call=("norm1.linear", "norm2.linear"),
    ),),
    inputs=("encoder_hidden_states", "encoder_hidden_states_t5", "timestep", "inpaint_latents", "control_latents"),
    embed="proj", tail="proj_out", per_call=("time_embedding", "norm_out.linear"),
    per_request={"rope_embedding": ("hidden_states",), **TEXT},
)  # fmt: skip
