"""Lumina Image 2.0 (``Lumina2Transformer2DModel``): refiners for picture and text, then blocks on both as one."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states", "encoder_attention_mask")

LUMINA2 = ModelPlan(
    model="Lumina2Transformer2DModel",
    pipelines=("Lumina2Pipeline",),
    grid=Latent("bchw"),
    blocks=tuple(
        BlockList(
            path=path,
            count=count,
            streams=("hidden_states",),
            rows=dict.fromkeys(("hidden_states", "image_rotary_emb"), of(*rows)),
            attention={"attn": rows},
            per_call=("norm1.linear",),
        )
        for path, count, rows in (
            ("noise_refiner", "num_refiner_layers", ("image",)),
            ("layers", "num_layers", ("text", "image")),
        )
    ),
    inputs=(*TEXT, "timestep"),
    ignored_inputs=("attention_kwargs",),
    lengths=("encoder_attention_mask",),
    same_lengths=True,
    guidance="calls",
    embed="x_embedder",
    tail="norm_out",
    per_call=("time_caption_embed.timestep_embedder",),
    per_request={"time_caption_embed.caption_embedder": TEXT, "context_refiner.*": TEXT},
)
