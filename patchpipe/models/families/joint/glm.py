"""GLM-Image (``GlmImageTransformer2DModel``): tokens of an earlier draft are added to the picture's."""

from patchpipe.models.families.kinds import JOINT_WITH_ROTARY
from patchpipe.models.plan import ModelPlan

DRAFT = ("prior_token_id", "prior_token_drop")

GLM_IMAGE = ModelPlan(
    model="GlmImageTransformer2DModel",
    blocks=(JOINT_WITH_ROTARY,),
    inputs=("target_size", "crop_coords", *DRAFT),
    idle_inputs={"kv_caches": lambda caches: all(layer.mode is None for layer in caches.caches)},
    guidance="calls",
    embed="image_projector",
    per_request={"glyph_projector": ("encoder_hidden_states",), "prior_projector": DRAFT},
)
