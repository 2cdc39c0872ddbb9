"""AuraFlow (``AuraFlowTransformer2DModel``): dual-stream blocks, then single-stream ones; registers in the text."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

JOINT = ("text", "image")  # registers come first of all, and count as text

AURAFLOW = ModelPlan(
    model="AuraFlowTransformer2DModel",
    pipelines=("AuraFlowPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="joint_transformer_blocks",
            count="num_mmdit_layers",
            streams=("encoder_hidden_states", "hidden_states"),
            rows={"encoder_hidden_states": of("text"), "hidden_states": of("image")},
            attention={"attn": JOINT},
            text_parameters=("context", "add_", "_added_"),
            per_call=("norm1.linear", "norm1_context.linear"),
        ),
        BlockList(
            path="single_transformer_blocks",
            count="num_single_dit_layers",
            streams=("hidden_states",),
            rows={"hidden_states": of(*JOINT)},
            attention={"attn": JOINT},
            per_call=("norm1.linear",),
        ),
    ),
    inputs=("encoder_hidden_states", "timestep"),
    ignored_inputs=("attention_kwargs",),
    embed="pos_embed",
    per_call=("time_step_proj", "norm_out.linear"),
    per_request={"context_embedder": ("encoder_hidden_states",)},
)
