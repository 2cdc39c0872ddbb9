"""Z-Image (``ZImageTransformer2DModel``): refiners for picture and text, then blocks on both as one."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

PICTURE = ("image", "pad")  # filled up to a multiple of 32 tokens
ALL = (*PICTURE, "text")

Z_IMAGE = ModelPlan(
    model="ZImageTransformer2DModel",
    pipelines=("ZImagePipeline",),
    grid=Latent("bc1hw", name="x", listed=True),
    blocks=tuple(
        BlockList(
            path=path,
            count=count,
            streams=("x",),
            rows={"x": of(*rows), "freqs_cis": of(*rows), "attn_mask": of(*rows)},
            attention={"attention": rows},
            mask="attn_mask",
            per_call=("adaLN_modulation",),
        )
        for path, count, rows in (("noise_refiner", "n_refiner_layers", PICTURE), ("layers", "n_layers", ALL))
    ),
    inputs=("t", "cap_feats"),
    ignored_inputs=("joint_attention_kwargs",),
    refused_settings=("siglip_feat_dim",),
    time="t",
    text="cap_feats",
    embed="all_x_embedder.2-1",
    tail="all_final_layer.2-1",
    per_call=("t_embedder", "all_final_layer.2-1.adaLN_modulation"),
    per_request={"cap_embedder": ("cap_feats",), "context_refiner.*": ("cap_feats",)},
)
