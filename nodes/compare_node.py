"""Compare L2P: a source and its pixel model side by side in the graph."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import say_at, tell_at
from .options import FROM_MODEL, PUBLISHED
from .pixel_nodes import width_and_height


class CompareL2P(io.ComfyNode):
    """Draws the same prompts and seeds with both models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PCompare",
            display_name="Compare L2P",
            category="L2P",
            description="Generates images of the same prompts and seeds with a latent model and with its pixel model, "
            "and shows both in the node: side by side, with a slider, or as the difference image at true size.",
            search_aliases=[
                "image compare",
                "slider",
                "before and after",
                "difference",
                "a/b test",
                "side by side",
                "对比",
                "比较",
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "source", tooltip="The latent model that the pixel model was made from; any MODEL works."
                ),
                io.Model.Input("pixel", tooltip="The pixel model, from L2P Loader or L2P Demo."),
                io.Clip.Input("clip", tooltip="The text encoder, which both share. Every prompt is encoded once."),
                io.Vae.Input("vae", optional=True, tooltip="The source's VAE. A source that is L2P itself needs none."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    placeholder="one prompt per line",
                    tooltip="What the images should show, one prompt per line; each makes one pair.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="The first pair's seed; each further pair uses the next one. Both models use the same "
                    "seed, but latents and pixels have different noise, so details differ.",
                ),
                *width_and_height("0 is the pixel model's own size."),
                io.Int.Input(
                    "source_steps", default=30, min=1, max=10000, tooltip="Sampling steps that the source needs."
                ),
                io.Float.Input(
                    "source_cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of the source; 1 disables it.",
                ),
                io.Int.Input(
                    "pixel_steps",
                    default=FROM_MODEL,
                    min=FROM_MODEL,
                    max=10000,
                    tooltip="Sampling steps of the pixel model; -1 uses its published value.",
                ),
                io.Float.Input(
                    "pixel_cfg",
                    default=float(FROM_MODEL),
                    min=float(FROM_MODEL),
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of the pixel model; -1 uses its published value.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The sampler of both models.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="simple",
                    tooltip="The noise levels of the source's steps; the pixel model takes its published ones.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    tooltip="A prompt to guide all images away from; not used if cfg is 1.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="source", tooltip="The source's images, for Evaluate L2P or Save Image."),
                io.Image.Output(display_name="pixel", tooltip="The pixel model's images, in the same order."),
                io.Image.Output(display_name="difference", tooltip="The absolute difference of each pair."),
            ],
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        source: io.Model.Type,
        pixel: io.Model.Type,
        clip: io.Clip.Type,
        prompts: str,
        seed: int,
        width: int,
        height: int,
        source_steps: int,
        source_cfg: float,
        pixel_steps: int,
        pixel_cfg: float,
        sampler_name: str,
        scheduler: str,
        negative: str,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        from .comparison import compare, shown, size_of
        from .sampling import SamplerSettings
        from .synthesis import TextToImage

        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        size = size_of(pixel, width, height)
        latent = TextToImage(source, clip, vae, *size, source_steps, source_cfg, sampler_name, scheduler, negative, 1)
        settings = SamplerSettings(seed, pixel_steps, pixel_cfg, sampler_name, PUBLISHED)
        node = cls.hidden.unique_id
        compared = compare(latent, pixel, lines, settings, say_at(node), tell_at(node))
        return io.NodeOutput(*compared, ui=shown(compared, lines, seed, cls))
