"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.latent import Latent, sizes_by_ids
from patchpipe.models.plan import BlockList, ModelPlan, of

STREAMS = ("encoder_hidden_states", "hidden_states")
ROWS = {
    "encoder_hidden_states": of("text"),
    "hidden_states": of("image"),
    "image_rotary_emb": of("text", "image", dim=0),
}
JOINT = ("text", "image")

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
    grid=Latent("bnc", sizes=sizes_by_ids("img_ids", column=1)),
    blocks=(
        BlockList(
            path="transformer_blocks",
            count="num_layers",
            streams=STREAMS,
            rows=ROWS,
            attention={"attn": JOINT},
            text_parameters=("context", "add_", "_added_"),
            per_call=("norm1.linear", "norm1_context.linear"),
        ),
        BlockList(
            path="single_transformer_blocks",
            count="num_single_layers",
            streams=STREAMS,
            rows=ROWS,
            attention={"attn": JOINT},
            per_call=("norm.linear",),
        ),
    ),
    inputs=("encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids"),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    guidance="calls",
    tensor="class",
    embed="x_embedder",
    tail="proj_out",
    per_call=("time_text_embed", "norm_out.linear"),
    per_request={"pos_embed": ("img_ids", "txt_ids"), "context_embedder": ("encoder_hidden_states",)},
)
