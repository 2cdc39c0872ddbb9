"""Ideogram 4 (``Ideogram4Transformer2DModel``): the latent begins with room for the text; another model guides."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.latent import Latent, sizes_by_roles
from patchpipe.models.plan import ModelPlan

ALL = ("text", "image")

IDEOGRAM4 = ModelPlan(
    model="Ideogram4Transformer2DModel",
    grid=Latent("bnc", sizes=sizes_by_roles("indicator", picture=2), room=True),
    blocks=(
        BlockList(
            path="layers",
            rows=dict.fromkeys(("hidden_states", "image_rotary_emb"), of(*ALL)),
            attention={"attention": ALL},
            mask="attention_mask",
            per_call=("adaln_modulation",),
        ),
    ),
    inputs=("position_ids", "segment_ids", "indicator"),
    beside="unconditional_transformer",
    guidance="calls",
    embed="input_proj",
    tail="final_layer",
    per_call=("t_embedding", "adaln_proj", "final_layer.adaln_modulation", "llm_cond_norm"),
    per_request={"llm_cond_proj": ("encoder_hidden_states", "indicator"), "rotary_emb": ("position_ids",)},
)
