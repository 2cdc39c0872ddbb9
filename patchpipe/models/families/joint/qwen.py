"""Qwen-Image (``QwenImageTransformer2DModel``): dual-stream blocks, padded text under a mask."""

from patchpipe.models.latent import Latent, sizes_by_shapes
from patchpipe.models.plan import BlockList, ModelPlan, of

PICTURES = ("image", "reference")

QWEN_IMAGE = ModelPlan(
    model="QwenImageTransformer2DModel",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    grid=Latent("bnc", sizes=sizes_by_shapes("img_shapes"), references=True),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("encoder_hidden_states", "hidden_states"),
            rows={
                "encoder_hidden_states": of("text"),
                "hidden_states": of(*PICTURES),
                "encoder_hidden_states_mask": of("text"),
                "image_rotary_emb": (of(*PICTURES, dim=0), of("text", dim=0)),
                "modulate_index": of(*PICTURES),
            },
            attention={"attn": ("text", *PICTURES)},
            mask="encoder_hidden_states_mask",
            text_parameters=("txt_", "add_", "_added_"),
            per_call=("img_mod", "txt_mod"),
        ),
    ),
    inputs=("encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes"),
    ignored_inputs=("attention_kwargs",),
    residuals={"controlnet_block_samples": of(*PICTURES)},
    unbatched_inputs=("img_shapes",),
    guidance="calls",
    tensor="class",
    embed="img_in",
    tail="proj_out",
    per_call=("time_text_embed", "norm_out.linear"),
    per_request={"txt_in": ("encoder_hidden_states",), "pos_embed": ("img_shapes", "encoder_hidden_states")},
    refused_settings=("use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"),
)
