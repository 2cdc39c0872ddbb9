"""CogView4 (``CogView4Transformer2DModel``): dual-stream blocks that share their matrices between text and picture."""

from patchpipe.models.families.kinds import JOINT_WITH_ROTARY, SIZES, variants
from patchpipe.models.plan import ModelPlan

COGVIEW4 = ModelPlan(
    model="CogView4Transformer2DModel",
    pipelines=variants("CogView4", "", "Control"),
    blocks=(JOINT_WITH_ROTARY,),
    inputs=SIZES,
    guidance="calls",
    embed="patch_embed.proj",
)
