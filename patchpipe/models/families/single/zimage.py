"""Z-Image (``ZImageTransformer2DModel``): refiners for picture and text, then blocks on both as one."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import variants
from patchpipe.models.latent import Latent
from patchpipe.models.plan import ModelPlan

PICTURE = ("image", "pad")  # filled up to a multiple of 32 tokens
LISTS = {("noise_refiner", "n_refiner_layers"): PICTURE, ("layers", "n_layers"): (*PICTURE, "text")}

Z_IMAGE = ModelPlan(
    model="ZImageTransformer2DModel",
    pipelines=variants("ZImage", "", "Img2Img", "Inpaint"),
    grid=Latent("bc1hw", name="x", listed=True),
    blocks=tuple(
        BlockList(
            path=path,
            count=count,
            streams=("x",),
            rows=dict.fromkeys(("x", "freqs_cis", "attn_mask"), of(*rows)),
            attention={"attention": rows},
            mask="attn_mask",
        )
        for (path, count), rows in LISTS.items()
    ),
    refused_settings=("siglip_feat_dim",),
    time="t",
    text="cap_feats",
    embed="all_x_embedder.2-1",
    tail="all_final_layer.2-1",
    per_call=("all_final_layer.2-1.adaLN_modulation",),
    per_request={"cap_embedder": ("cap_feats",), "context_refiner.*": ("cap_feats",)},
)
