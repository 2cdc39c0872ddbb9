"""Bria FIBO (``BriaFiboTransformer2DModel``): half the channels of the text are replaced before every block."""

from dataclasses import replace

from patchpipe.models.families.dual.lists import DUAL, JOINT, MERGED, PACKED
from patchpipe.models.plan import ModelPlan, of

MASK = "joint_attention_kwargs"  # which may hold one

BRIA_FIBO = ModelPlan(
    model="BriaFiboTransformer2DModel",
    pipelines=("BriaFiboPipeline",),
    grid=PACKED,
    blocks=tuple(
        replace(blocks, rows={**blocks.rows, MASK: of(*JOINT, dim=3)}, mask=MASK, whole_between=True)
        for blocks in (DUAL, MERGED)
    ),
    inputs=("encoder_hidden_states", "text_encoder_layers", "timestep", "img_ids", "txt_ids", MASK),
    ignored_inputs=("joint_attention_kwargs",),
    unbatched_inputs=("img_ids", "txt_ids"),
    batch_dims={"text_encoder_layers": 1},
    embed="x_embedder",
    per_call=("time_embed", "norm_out.linear"),
    per_request={
        "pos_embed": ("img_ids", "txt_ids"),
        "context_embedder": ("encoder_hidden_states",),
        "caption_projection.*": ("text_encoder_layers",),
    },
)
