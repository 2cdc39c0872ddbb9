"""Cosmos 1, 2 and 2.5 (``CosmosTransformer3DModel``): clips; self-attention on them, cross-attention to text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states",)

COSMOS = ModelPlan(
    model="CosmosTransformer3DModel", pipelines=("CosmosTextToWorldPipeline", "Cosmos2_5_PredictBasePipeline"),
    grid=Latent("bcfhw", cut="f"), guidance="calls", frames_per_second=30,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=("hidden_states",),
        rows={
            **dict.fromkeys(("hidden_states", "extra_pos_emb"), of("image")), "image_rotary_emb": of("image", dim=0),
            **dict.fromkeys(("embedded_timestep", "temb"), of("image", ndim=3)),
        },
        attention={"attn1": ("image",), "attn2": CROSS}, per_request={"attn2.to_k": TEXT, "attn2.to_v": TEXT},
    ),),
    inputs=(*TEXT, "timestep", "attention_mask", "fps", "condition_mask", "padding_mask"),
    unbatched_inputs=("padding_mask",), embed="patch_embed", tail="proj_out", tail_dims={"timestep": 1},
    per_call=("time_embed",), per_request={"crossattn_proj": TEXT},
)  # fmt: skip
