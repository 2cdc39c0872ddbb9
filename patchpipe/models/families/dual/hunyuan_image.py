"""HunyuanImage 2.1 (``HunyuanImageTransformer2DModel``): two streams in all blocks, padded text under a mask."""

from dataclasses import replace

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import JOINT, ROTARY
from patchpipe.models.plan import ModelPlan

DUAL = BlockList(
    count="num_layers",
    streams=JOINT.streams,
    rows={**ROTARY, "attention_mask": of("image", "text", dim=3)},
    attention={"attn": ("image", "text")},
    mask="attention_mask",
    never_empty=("encoder_hidden_states",),
)

HUNYUAN_IMAGE = ModelPlan(
    model="HunyuanImageTransformer2DModel",
    pipelines=("HunyuanImagePipeline",),
    blocks=(DUAL, replace(DUAL, path="single_transformer_blocks", count="num_single_layers")),
    inputs=("timestep_r", "encoder_attention_mask", "encoder_hidden_states_2", "encoder_attention_mask_2", "guidance"),
    guidance="calls",
    per_call=("context_embedder",),
    per_request={"context_embedder_2": ("encoder_hidden_states_2",)},
)
