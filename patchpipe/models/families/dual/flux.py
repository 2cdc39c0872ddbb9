"""FLUX.1 (``FluxTransformer2DModel``): dual-stream blocks, then single-stream blocks on two kept tensors."""

from patchpipe.models.blocks import of
from patchpipe.models.families.dual.lists import ADAPTERS, DUAL, IDS, SINGLE, WITH_REFERENCES
from patchpipe.models.families.kinds import variants
from patchpipe.models.plan import ModelPlan

PLAIN = ("", "Img2Img", "Inpaint", "Fill")
CONTROLS = ("Control", "ControlImg2Img", "ControlInpaint")
CONTROLNETS = ("ControlNet", "ControlNetImg2Img", "ControlNetInpaint")

FLUX = ModelPlan(
    model="FluxTransformer2DModel",
    pipelines=variants("Flux", *PLAIN, *CONTROLS, *CONTROLNETS, "Kontext", "KontextInpaint"),
    grid=WITH_REFERENCES,
    blocks=(DUAL, SINGLE),
    inputs=("pooled_projections", "guidance", "controlnet_blocks_repeat", *IDS),
    residuals=dict.fromkeys(("controlnet_block_samples", "controlnet_single_block_samples"), of("image", "reference")),
    adapters=ADAPTERS,
    guidance="calls",
    tensor="class",
)
