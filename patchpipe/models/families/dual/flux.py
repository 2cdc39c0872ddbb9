"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.families.dual.lists import DUAL, IDS, SINGLE, WITH_REFERENCES
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

FLUX = ModelPlan(
    model="FluxTransformer2DModel",
    pipelines=variants("Flux", "", "Img2Img", "Inpaint", "Fill", "Control", "Kontext"),
    grid=WITH_REFERENCES,
    blocks=(DUAL, SINGLE),
    inputs=("pooled_projections", "guidance", *IDS),
    guidance="calls",
    tensor="class",
)
