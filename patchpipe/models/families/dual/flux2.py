"""FLUX.2 (``Flux2Transformer2DModel``): dual-stream blocks, then single-stream blocks on text and picture as one."""

from patchpipe.models.families.dual.lists import DUAL, IDS, MERGED, WITH_REFERENCES
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

FLUX2 = ModelPlan(
    model="Flux2Transformer2DModel",
    pipelines=variants("Flux2", "", "Klein", "KleinInpaint"),
    grid=WITH_REFERENCES,
    blocks=(DUAL, MERGED),
    inputs=("guidance", *IDS),
    guidance="calls",
    per_call=("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"),
)
