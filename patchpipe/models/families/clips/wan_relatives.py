"""Relatives of Wan, alike but for a few arguments: ChronoEdit, AnyFlow, SkyReels V2, VACE, Animate."""

from dataclasses import replace

from patchpipe.models.families.wan import CONTEXT, WAN
from patchpipe.models.latent import Latent
from patchpipe.models.plan import of

BLOCKS = WAN.blocks[0]
ROWS = {"hidden_states": of("image"), "rotary_emb": of("image")}
BETWEEN = replace(BLOCKS, whole_between=True)

CHRONO_EDIT = replace(WAN, model="ChronoEditTransformer3DModel", pipelines=("ChronoEditPipeline",))

ANYFLOW = replace(
    WAN, model="AnyFlowTransformer3DModel", pipelines=("AnyFlowPipeline",), grid=Latent("bfchw", cut="f"),
    blocks=(replace(BLOCKS, rows={**ROWS, "rotary_emb": of("image", dim=2), "temb": of("image")}),),
    inputs=("timestep", "r_timestep", *CONTEXT), guidance="batch", tail="", per_request={},
    per_call=("condition_embedder", "rope"),
)  # fmt: skip

SKYREELS_V2 = replace(
    WAN, model="SkyReelsV2Transformer3DModel", pipelines=("SkyReelsV2Pipeline",), frames_per_second=24,
    blocks=(replace(BLOCKS, rows={**ROWS, "temb": of("image", dim=2, ndim=4)}),),
)  # fmt: skip

WAN_VACE = replace(
    WAN, model="WanVACETransformer3DModel", pipelines=("WanVACEPipeline",),
    blocks=(
        replace(
            BLOCKS, path="vace_blocks", count="vace_layers", streams=("control_hidden_states",),
            rows={**BLOCKS.rows, "control_hidden_states": of("image")},
            passes=("hidden_states",), emits=("conditioning_states",),
        ),
        BETWEEN,
    ),
    inputs=(*WAN.inputs, "control_hidden_states", "control_hidden_states_scale"),
    unbatched_inputs=("control_hidden_states_scale",), tail="",
)  # fmt: skip

WAN_ANIMATE = replace(
    WAN, model="WanAnimateTransformer3DModel", pipelines=("WanAnimatePipeline",), blocks=(BETWEEN,),
    inputs=(*WAN.inputs, "pose_hidden_states", "face_pixel_values", "motion_encode_batch_size"),
    between=("face_adapter.*",), sections=True, tail="",
)  # fmt: skip
