"""PRX (``PRXTransformer2DModel``): the picture attends to itself and to the text at once."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

TEXT = ("encoder_hidden_states",)

PRX = ModelPlan(
    model="PRXTransformer2DModel",
    pipelines=("PRXPipeline",),
    grid=Latent("bchw"),
    blocks=(
        BlockList(
            path="blocks",
            count="depth",
            streams=("hidden_states",),
            rows={
                "hidden_states": of("image"),
                "image_rotary_emb": of("image", dim=2),
                "encoder_hidden_states": of("text"),
                "attention_mask": of("text"),
            },
            attention={"attention": ("text", "image")},
            asking={"attention": ("image",)},
            mask="attention_mask",
            per_call=("modulation",),
        ),
    ),
    inputs=(*TEXT, "attention_mask", "timestep"),
    ignored_inputs=("attention_kwargs",),
    embed="img_in",
    tail="final_layer",
    per_call=("time_in", "final_layer.adaLN_modulation"),
    per_request={"txt_in": TEXT},
)
