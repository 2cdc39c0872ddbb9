"""CogView3-Plus (``CogView3PlusTransformer2DModel``): blocks that share their matrices between text and picture."""

from patchpipe.models.families.kinds import JOINT, SIZES
from patchpipe.models.plan import ModelPlan

COGVIEW3_PLUS = ModelPlan(
    model="CogView3PlusTransformer2DModel",
    blocks=(JOINT,),
    inputs=SIZES,
    embed="patch_embed.proj",
)
