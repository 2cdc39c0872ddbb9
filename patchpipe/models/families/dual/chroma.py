"""Chroma (``ChromaTransformer2DModel``): a mask by query and key over text and picture, which no patch cuts."""

from dataclasses import replace

from patchpipe.models.families.dual.lists import ADAPTERS, DUAL, IDS, MERGED, PACKED
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

CHROMA = ModelPlan(
    model="ChromaTransformer2DModel",
    pipelines=variants("Chroma", "", "Img2Img"),
    grid=PACKED,
    blocks=tuple(replace(blocks, mask="attention_mask") for blocks in (DUAL, MERGED)),
    inputs=("attention_mask", *IDS),
    adapters=ADAPTERS,
    guidance="calls",
    per_call=("distilled_guidance_layer",),
)
