"""CogVideoX 1.0 and 1.5 (``CogVideoXTransformer3DModel``): clips; blocks on text and clip in two kept tensors."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

STREAMS = {"hidden_states": of("image"), "encoder_hidden_states": of("text")}

COGVIDEOX = ModelPlan(
    model="CogVideoXTransformer3DModel", pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline"),
    grid=Latent("bfchw", cut="f"), frames_per_second=8,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=tuple(STREAMS),
        rows={**STREAMS, "image_rotary_emb": of("image", dim=0)},
        attention={"attn1": ("text", "image")}, per_call=("norm1.linear", "norm2.linear"),
    ),),
    inputs=("encoder_hidden_states", "timestep", "ofs", "image_rotary_emb"), ignored_inputs=("attention_kwargs",),
    unbatched_inputs=("ofs", "image_rotary_emb"), embed="patch_embed.proj", tail="proj_out",
    per_call=("time_embedding", "norm_out.linear"), per_request={"patch_embed.text_proj": ("encoder_hidden_states",)},
)  # fmt: skip
