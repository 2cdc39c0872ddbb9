"""CogVideoX (``CogVideoXTransformer3DModel``) and ConsisID: clips; blocks on text and clip in two kept tensors."""

from dataclasses import replace

from patchpipe.models.families.kinds import FRAMES_FIRST, JOINT_WITH_ROTARY, variants
from patchpipe.models.plan import ModelPlan

COGVIDEOX = ModelPlan(
    model="CogVideoXTransformer3DModel",
    pipelines=variants("CogVideoX", "", "ImageToVideo", "VideoToVideo", "FunControl"),
    grid=FRAMES_FIRST,
    blocks=(JOINT_WITH_ROTARY,),
    inputs=("ofs", "image_rotary_emb"),
    unbatched_inputs=("ofs",),
    embed="patch_embed.proj",
    frames_per_second=8,
)

FACE = ("id_cond", "id_vit_hidden")

CONSISID = replace(
    COGVIDEOX,
    model="ConsisIDTransformer3DModel",
    pipelines=("ConsisIDPipeline",),
    inputs=("image_rotary_emb", *FACE),
    unbatched_inputs=FACE,
    tail="",  # what follows the blocks counts the rows of text
    between=("perceiver_cross_attention.*",),
    per_request={"local_facial_extractor": FACE},
)
