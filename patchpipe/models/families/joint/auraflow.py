"""AuraFlow (``AuraFlowTransformer2DModel``): dual-stream blocks, then single-stream ones; registers in the text."""

from dataclasses import replace

from patchpipe.models.families.kinds import JOINT, MERGED
from patchpipe.models.plan import ModelPlan

DUAL = replace(  # registers come first of all, and count as text
    JOINT,
    path="joint_transformer_blocks",
    count="num_mmdit_layers",
    streams=JOINT.streams[::-1],
    attention=MERGED.attention,
)

AURAFLOW = ModelPlan(
    model="AuraFlowTransformer2DModel",
    blocks=(DUAL, replace(MERGED, count="num_single_dit_layers")),
)
