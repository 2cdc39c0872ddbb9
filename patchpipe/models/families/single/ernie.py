"""ERNIE-Image (``ErnieImageTransformer2DModel``): rows come first in its blocks, before the batch."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

ALL = ("image", "text")

ERNIE_IMAGE = ModelPlan(
    model="ErnieImageTransformer2DModel",
    pipelines=("ErnieImagePipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="layers",
            count="num_layers",
            streams=("x",),
            rows={
                "x": of(*ALL, dim=0),
                "rotary_pos_emb": of(*ALL),
                "temb": of(*ALL, dim=0),
                "attention_mask": of(*ALL, dim=3),
            },
            attention={"self_attention": ALL},
            mask="attention_mask",
        ),
    ),
    inputs=("text_bth", "text_lens", "timestep"),
    text="text_bth",
    embed="x_embedder",
    tail="final_linear",
    per_call=("time_embedding", "adaLN_modulation"),
    per_request={"text_proj": ("text_bth",)},
)
