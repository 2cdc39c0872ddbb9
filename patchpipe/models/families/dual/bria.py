"""Bria 3.2 (``BriaTransformer2DModel``)."""

from patchpipe.models.families.dual.lists import DUAL, IDS, PACKED, SINGLE
from patchpipe.models.plan import ModelPlan

BRIA = ModelPlan(model="BriaTransformer2DModel", grid=PACKED, blocks=(DUAL, SINGLE), inputs=IDS)
