"""The Pixel Sampler: conditioning in, image out."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import AS_TYPED, FROM_MODEL, PUBLISHED, steps_problem
from .pixel_nodes import aspect_input, width_and_height


class PixelSampler(io.ComfyNode):
    """Text to image, image to image and inpainting without a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPixelSampler",
            display_name="Pixel Sampler",
            category="L2P",
            description="Generates images with an L2P model directly in pixels, without a VAE. Connect an image to "
            "start from it, and a mask to repaint only a part of it; the rest stays exactly unchanged.",
            search_aliases=[
                "ksampler",
                "sampler",
                "l2p",
                "text to image",
                "image to image",
                "inpaint",
                "pixel space",
                "文生图",
                "图生图",
                "局部重绘",
            ],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="An L2P model, from L2P Loader or L2P Demo."),
                io.Conditioning.Input("positive", tooltip="What the image should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; not used when cfg is 1."),
                *width_and_height("0 is the size that the model was trained at. A connected image sets it instead."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many images to generate at once."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise.",
                ),
                io.Int.Input(
                    "steps",
                    default=FROM_MODEL,
                    min=FROM_MODEL,
                    max=10000,
                    tooltip="Sampling steps; -1 uses the model's published value (1k: 30, larger: 50).",
                ),
                io.Float.Input(
                    "cfg",
                    default=FROM_MODEL,
                    min=FROM_MODEL,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance; -1 uses the model's published value (1k: 2, larger: 4). 1 disables guidance "
                    "and is twice as fast.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The sampler; L2P was published with euler.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[PUBLISHED, *comfy.samplers.SCHEDULER_NAMES],
                    default=PUBLISHED,
                    tooltip="The noise levels of the steps; the first choice is L2P's own schedule.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="With an image: how much of it is regenerated. 1 keeps only what the mask protects.",
                ),
                io.Image.Input("image", optional=True, tooltip="An image to start from, in its own size."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White is repainted, black stays exactly unchanged. The same size as the image.",
                ),
                aspect_input(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The finished images; they need no VAE Decode.")],
        )

    @classmethod
    def validate_inputs(cls, steps: int | None = None) -> bool | str:
        # The host repeats the sentence for every input named here, so the others are asked about by their limits.
        return (None if steps is None else steps_problem(steps)) or True

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        model: io.Model.Type,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        width: int,
        height: int,
        batch_size: int,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        image: io.Image.Type | None = None,
        mask: io.Mask.Type | None = None,
        aspect: str = AS_TYPED,
    ) -> io.NodeOutput:
        from .sampling import SamplerSettings, sample_image

        settings = SamplerSettings(seed, steps, cfg, sampler_name, scheduler, denoise)
        return io.NodeOutput(
            sample_image(
                model,
                positive,
                negative,
                settings,
                width=width,
                height=height,
                batch=batch_size,
                aspect=aspect,
                image=image,
                mask=mask,
                tell=tell_at(cls.hidden.unique_id),
            )
        )
