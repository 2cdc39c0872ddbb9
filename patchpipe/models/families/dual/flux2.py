"""FLUX.2 (``Flux2Transformer2DModel``): dual-stream blocks, then single-stream blocks on text and picture as one."""

from dataclasses import replace

from patchpipe.models.families.dual.lists import DUAL, MERGED, WITH_REFERENCES
from patchpipe.models.plan import ModelPlan

FLUX2 = ModelPlan(
    model="Flux2Transformer2DModel",
    pipelines=("Flux2KleinPipeline",),
    grid=WITH_REFERENCES,
    blocks=(replace(DUAL, per_call=()), replace(MERGED, per_call=())),  # modulated by what all blocks share
    inputs=("encoder_hidden_states", "timestep", "img_ids", "txt_ids", "guidance"),
    ignored_inputs=("joint_attention_kwargs",),
    guidance="calls",
    embed="x_embedder",
    per_call=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "norm_out.linear",
    ),
    per_request={"context_embedder": ("encoder_hidden_states",)},
)
