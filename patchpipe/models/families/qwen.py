"""Qwen-Image (``QwenImageTransformer2DModel``): dual-stream blocks, padded text under a mask."""

from patchpipe.models.plan import TEXT_ROWS, BlockList, ModelPlan, PackedShapes, SlicedResult

QWEN_IMAGE = ModelPlan(
    model="QwenImageTransformer2DModel",
    pipelines=("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
    grid=PackedShapes(),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=("encoder_hidden_states", "hidden_states"),
            attention={"attn": "joint"},
            text_parameters=("txt_", "add_", "_added_"),
            conditioning=("img_mod", "txt_mod"),
        ),
    ),
    text_inputs={"encoder_hidden_states": 1},
    text_mask="encoder_hidden_states_mask",
    shared_inputs=("timestep", "img_shapes"),
    ignored_inputs=("attention_kwargs",),
    unbatched_inputs=("img_shapes",),
    guidance="calls",
    tensor="class",
    embed="img_in",
    head=("norm_out", "proj_out"),
    conditioning=("time_text_embed", "norm_out.linear"),
    constant={"txt_in": ("encoder_hidden_states",)},
    sliced={
        "pos_embed": SlicedResult(
            arguments={"video_fhw": "img_shapes", "max_txt_seq_len": TEXT_ROWS}, rows=("image", "text")
        )
    },
    refused_settings=("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"),
)
