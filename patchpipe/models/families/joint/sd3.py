"""Stable Diffusion 3 and 3.5 (``SD3Transformer2DModel``): joint attention, dual attention in 3.5."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

SD3 = ModelPlan(
    model="SD3Transformer2DModel",
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("encoder_hidden_states", "hidden_states"),
            rows={"encoder_hidden_states": of("text"), "hidden_states": of("image")},
            attention={"attn": ("image", "text"), "attn2": ("image",)},
            text_parameters=("context", "add_", "_added_"),
            per_call=("norm1.linear", "norm1_context.linear"),
        ),
    ),
    inputs=("encoder_hidden_states", "pooled_projections", "timestep"),
    ignored_inputs=("joint_attention_kwargs",),
    residuals={"block_controlnet_hidden_states": of("image")},
    embed="pos_embed",
    tail="proj_out",
    per_call=("time_text_embed", "norm_out.linear"),
    per_request={"context_embedder": ("encoder_hidden_states",)},
    tensor={
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.add_q_proj": "colwise",
        "transformer_blocks.*.attn.add_k_proj": "colwise",
        "transformer_blocks.*.attn.add_v_proj": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.attn.to_add_out": "rowwise",
        "transformer_blocks.*.attn2.to_q": "colwise",
        "transformer_blocks.*.attn2.to_k": "colwise",
        "transformer_blocks.*.attn2.to_v": "colwise",
        "transformer_blocks.*.attn2.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": "colwise",
        "transformer_blocks.*.ff.net.2": "rowwise",
        "transformer_blocks.*.ff_context.net.0.proj": "colwise",
        "transformer_blocks.*.ff_context.net.2": "rowwise",
    },
)
