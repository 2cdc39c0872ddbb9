"""Relatives of Wan, alike but for a few arguments: ChronoEdit, AnyFlow, SkyReels V2, VACE, Animate."""

from dataclasses import replace

from patchpipe.models.blocks import of
from patchpipe.models.families.kinds import FRAMES_FIRST, variants
from patchpipe.models.families.wan import WAN

BLOCKS = WAN.blocks[0]
BETWEEN = replace(BLOCKS, whole_between=True)

CHRONO_EDIT = replace(WAN, model="ChronoEditTransformer3DModel", pipelines=("ChronoEditPipeline",))

ANYFLOW = replace(
    WAN,
    model="AnyFlowTransformer3DModel",
    pipelines=("AnyFlowPipeline",),
    grid=FRAMES_FIRST,
    blocks=(replace(BLOCKS, rows={"rotary_emb": of("image", dim=2), "temb": of("image")}),),
    inputs=(*WAN.inputs, "r_timestep"),
    guidance="batch",
    tail="",
    per_call=("rope",),
)

SKYREELS_V2 = replace(
    WAN,
    model="SkyReelsV2Transformer3DModel",
    pipelines=variants("SkyReelsV2", "", "ImageToVideo"),
    blocks=(replace(BLOCKS, rows={"rotary_emb": of("image"), "temb": of("image", dim=2, ndim=4)}),),
    frames_per_second=24,
)

WAN_VACE = replace(
    WAN,
    model="WanVACETransformer3DModel",
    pipelines=("WanVACEPipeline",),
    blocks=(
        replace(
            BLOCKS,
            path="vace_blocks",
            count="vace_layers",
            streams=("control_hidden_states",),
            passes=("hidden_states",),
            emits=("conditioning_states",),
        ),
        BETWEEN,
    ),
    inputs=(*WAN.inputs, "control_hidden_states", "control_hidden_states_scale"),
    unbatched_inputs=("control_hidden_states_scale",),
)

WAN_ANIMATE = replace(
    WAN,
    model="WanAnimateTransformer3DModel",
    pipelines=("WanAnimatePipeline",),
    blocks=(BETWEEN,),
    inputs=(*WAN.inputs, "pose_hidden_states", "face_pixel_values", "motion_encode_batch_size"),
    between=("face_adapter.*",),
    sections=True,
)
