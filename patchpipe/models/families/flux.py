"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.plan import BlockList, ModelPlan, PackedTokens

STREAMS = ("encoder_hidden_states", "hidden_states")

FLUX = ModelPlan(
    model="FluxTransformer2DModel",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxKontextPipeline",
    ),
    grid=PackedTokens(ids="img_ids", column=1),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=STREAMS,
            attention={"attn": "joint"},
            text_parameters=("context", "add_", "_added_"),
            conditioning=("norm1.linear", "norm1_context.linear"),
        ),
        BlockList(
            path="single_transformer_blocks",
            count="num_single_layers",
            streams=STREAMS,
            attention={"attn": "joint"},
            conditioning=("norm.linear",),
        ),
    ),
    cut_inputs={"img_ids": 0},
    text_inputs={"encoder_hidden_states": 1, "txt_ids": 0},
    shared_inputs=("pooled_projections", "timestep", "guidance"),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    tensor="class",
    embed="x_embedder",
    head=("norm_out", "proj_out"),
    conditioning=("time_text_embed", "norm_out.linear"),
    constant={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
