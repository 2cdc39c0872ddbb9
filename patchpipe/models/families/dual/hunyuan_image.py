"""HunyuanImage 2.1 (``HunyuanImageTransformer2DModel``): HunyuanVideo's blocks, and two texts."""

from patchpipe.models.families.clips.hunyuan_video import TIMED_TEXT, both_lists
from patchpipe.models.plan import ModelPlan

HUNYUAN_IMAGE = ModelPlan(
    model="HunyuanImageTransformer2DModel",
    blocks=both_lists("image", rotary="image_rotary_emb"),
    inputs=("timestep_r", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2", "guidance"),
    guidance="calls",
    per_call=TIMED_TEXT,
    per_request={"context_embedder_2": ("encoder_hidden_states_2",)},
)
