"""CogVideoX 1.0 and 1.5 (``CogVideoXTransformer3DModel``): clips; blocks on text and clip in two kept tensors."""

from patchpipe.models.families.kinds import FRAMES_FIRST, JOINT_WITH_ROTARY, variants
from patchpipe.models.plan import ModelPlan

COGVIDEOX = ModelPlan(
    model="CogVideoXTransformer3DModel",
    pipelines=variants("CogVideoX", "", "ImageToVideo"),
    grid=FRAMES_FIRST,
    blocks=(JOINT_WITH_ROTARY,),
    inputs=("ofs", "image_rotary_emb"),
    unbatched_inputs=("ofs",),
    embed="patch_embed.proj",
    frames_per_second=8,
)
