"""Mochi (``MochiTransformer3DModel``): clips; dual-stream blocks whose attention takes entries one by one."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states", "encoder_attention_mask")

MOCHI = ModelPlan(
    model="MochiTransformer3DModel", pipelines=("MochiPipeline",),
    grid=Latent("bcfhw", cut="f"), frames_per_second=30,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=("hidden_states", "encoder_hidden_states"),
        rows={"hidden_states": of("image"), **dict.fromkeys(TEXT, of("text")), "image_rotary_emb": of("image", dim=0)},
        attention={"attn1": ("image", "text")}, mask="encoder_attention_mask", drops_masked=True,
    ),),
    inputs=(*TEXT, "timestep"), ignored_inputs=("attention_kwargs",),
    embed="patch_embed", tail="proj_out", per_call=("time_embed", "rope", "norm_out.linear"),
)  # fmt: skip
