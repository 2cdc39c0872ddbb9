"""EasyAnimate (``EasyAnimateTransformer3DModel``): clips; dual-stream blocks, then blocks of shared matrices."""

from patchpipe.models.families.kinds import CLIP, JOINT_WITH_ROTARY
from patchpipe.models.plan import ModelPlan

EASY_ANIMATE = ModelPlan(
    model="EasyAnimateTransformer3DModel",
    grid=CLIP,
    blocks=(JOINT_WITH_ROTARY,),
    inputs=("encoder_hidden_states_t5", "inpaint_latents", "control_latents"),
    embed="proj",
    per_request={
        "rope_embedding": ("hidden_states",),
        "text_proj": ("encoder_hidden_states",),
        "text_proj_t5": ("encoder_hidden_states_t5",),
    },
    frames_per_second=8,
)
