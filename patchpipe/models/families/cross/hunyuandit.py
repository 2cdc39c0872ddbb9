"""Hunyuan-DiT (``HunyuanDiT2DModel``): blocks of the second half take what one of the first half returned."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

HUNYUAN_DIT = ModelPlan(
    model="HunyuanDiT2DModel",
    pipelines=("HunyuanDiTPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="blocks",
            count="num_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of("image"), "image_rotary_emb": of("image", dim=0)},
            attention={"attn1": ("image",), "attn2": CROSS},
            links=("skip",),
            per_call=("norm1.linear",),
        ),
    ),
    inputs=(
        "encoder_hidden_states",
        "text_embedding_mask",
        "encoder_hidden_states_t5",
        "text_embedding_mask_t5",
        "image_meta_size",
        "style",
        "image_rotary_emb",
        "timestep",
    ),
    unbatched_inputs=("image_rotary_emb",),
    embed="pos_embed",
    tail="proj_out",
    per_call=("time_extra_emb", "norm_out.linear"),
    per_request={"text_embedder": ("encoder_hidden_states_t5",)},
)
