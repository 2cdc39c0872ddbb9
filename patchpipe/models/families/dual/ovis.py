"""Ovis-Image (``OvisImageTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, IDS, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

OVIS_IMAGE = ModelPlan(
    model="OvisImageTransformer2DModel",
    grid=PACKED,
    blocks=(DUAL, SINGLE),
    inputs=IDS,
    guidance="calls",
)
