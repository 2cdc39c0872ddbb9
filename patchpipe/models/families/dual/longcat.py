"""LongCat-Image (``LongCatImageTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, IDS, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

LONGCAT_IMAGE = ModelPlan(
    model="LongCatImageTransformer2DModel",
    grid=PACKED,
    blocks=(DUAL, SINGLE),
    inputs=IDS,
    guidance="calls",
)
