"""FLUX.2 (``Flux2Transformer2DModel``): dual-stream blocks, then single-stream blocks on text and picture as one."""

from patchpipe.models.latent import Latent, sizes_by_ids
from patchpipe.models.plan import BlockList, ModelPlan, of

JOINT = ("text", "image")
ROTARY = of(*JOINT, dim=0)

FLUX2 = ModelPlan(
    model="Flux2Transformer2DModel",
    pipelines=("Flux2KleinPipeline",),
    grid=Latent("bnc", sizes=sizes_by_ids("img_ids", column=1)),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("encoder_hidden_states", "hidden_states"),
            rows={"encoder_hidden_states": of("text"), "hidden_states": of("image"), "image_rotary_emb": ROTARY},
            attention={"attn": JOINT},
            text_parameters=("context", "add_", "_added_"),
        ),
        BlockList(
            path="single_transformer_blocks",
            count="num_single_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of(*JOINT), "image_rotary_emb": ROTARY},
            attention={"attn": JOINT},
        ),
    ),
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance"),
    ignored_inputs=("joint_attention_kwargs",),
    guidance="calls",
    embed="x_embedder",
    per_call=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "norm_out.linear",
    ),
    per_request={"context_embedder": ("encoder_hidden_states",)},
)
