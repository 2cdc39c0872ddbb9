"""HiDream-I1 (``HiDreamImageTransformer2DModel``): a text of its own joins every block; pictures are filled up."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

PICTURE = ("image", "pad")  # filled up where it is not square
ALL = (*PICTURE, "text")
TEXTS = ("encoder_hidden_states_t5", "encoder_hidden_states_llama3")

HIDREAM = ModelPlan(
    model="HiDreamImageTransformer2DModel",
    pipelines=("HiDreamImagePipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="double_stream_blocks",
            count="num_layers",
            streams=("hidden_states", "encoder_hidden_states"),
            rows={
                "hidden_states": of(*PICTURE),
                "encoder_hidden_states": of("text"),
                "hidden_states_masks": of(*PICTURE),
                "image_rotary_emb": of(*ALL),
            },
            attention={"block.attn1": ALL},
            whole_between=True,
            text_parameters=("_t.", "norm1_t", "norm3_t", "ff_t"),
            per_call=("block.adaLN_modulation",),
        ),
        BlockList(
            path="single_stream_blocks",
            count="num_single_layers",
            streams=("hidden_states",),
            rows=dict.fromkeys(("hidden_states", "hidden_states_masks", "image_rotary_emb"), of(*ALL)),
            attention={"block.attn1": ALL},
            whole_between=True,
            per_call=("block.adaLN_modulation",),
        ),
    ),
    inputs=(*TEXTS, "timesteps", "pooled_embeds"),
    ignored_inputs=("attention_kwargs",),
    batch_dims={"encoder_hidden_states_llama3": 1},
    time="timesteps",
    text="encoder_hidden_states_t5",
    embed="x_embedder",
    per_call=("t_embedder", "final_layer.adaLN_modulation"),
    per_request={"p_embedder": ("pooled_embeds",), "caption_projection.*": TEXTS},
)
