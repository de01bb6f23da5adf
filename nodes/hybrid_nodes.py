"""Hybrid Sampler: sampling in both spaces in one node."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from .hybrid_part_nodes import ALIASES, shift_input, sides
from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import FROM_MODEL, HYBRID_TASKS

OF_TASK = -1.0
"""The value of the switch that stands for the task's own noise level."""


class HybridSampler(io.ComfyNode):
    """Samples in both spaces in one node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PHybridSampler",
            display_name="Hybrid Sampler",
            category="L2P",
            description="Samples in latent space where that is cheap and in pixels where it counts: a latent model and "
            "an L2P model of the same prompts share one image, and images grow up to 10K without a VAE in between.",
            search_aliases=["ksampler", "sampler", *ALIASES],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "task",
                    options=list(HYBRID_TASKS),
                    default=HYBRID_TASKS[0],
                    tooltip="fast: latents first, pixels finish. detail: pixels throughout; an image larger "
                    "than the model's size grows from there or from half its size. large: layout at the model's size, "
                    "then growth to the size typed. edit: repaints the mask and nothing else. restore: brings back "
                    "what a VAE lost in an image. upscale: an image to 4K. custom: fast with your switch. auto: chosen "
                    "by what is connected.",
                ),
                io.Conditioning.Input("positive", tooltip="What the image should show, for both models."),
                io.Conditioning.Input("negative", tooltip="What it should not show, for both models."),
                *sides("0 is the model's own size, twice that for large, the image's for restore, 4K for upscale."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the first part's noise; the second takes the next seed, and so on.",
                ),
                *_steps_and_cfg("", "the L2P model", "1k: 30, larger: 50", "1k: 2, larger: 4"),
                io.Float.Input(
                    "switch",
                    default=OF_TASK,
                    min=OF_TASK,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The noise level at which pixels take over or start: near 1 changes much, near 0 little. "
                    "-1 is the task's own (fast 0.65, restore 0.3, upscale 0.5, edit 1).",
                ),
                shift_input(),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="euler",
                    tooltip="The sampler of all parts.",
                ),
                io.Model.Input("pixel_model", optional=True, tooltip="An L2P model."),
                io.Model.Input("latent_model", optional=True, tooltip="Its latent source, or another flow model."),
                io.Vae.Input("vae", optional=True, tooltip="The latent model's VAE."),
                io.Model.Input(
                    "large_model",
                    optional=True,
                    tooltip="An L2P model for larger images (4k, 8k, 10k), which takes over at large sizes.",
                ),
                io.Conditioning.Input(
                    "latent_positive", optional=True, tooltip="For a latent model with a text encoder of its own."
                ),
                io.Conditioning.Input(
                    "latent_negative", optional=True, tooltip="For a latent model with a text encoder of its own."
                ),
                io.Image.Input("image", optional=True, tooltip="For edit, restore and upscale."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="For edit: white is repainted, black stays exactly unchanged."
                ),
                *_steps_and_cfg("latent_", "the latent model", "Z-Image: 30; set 8 for Turbo", "4; set 1 for Turbo"),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The finished images; they need no VAE Decode.")],
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        task: str,
        positive: io.Conditioning.Type,
        negative: io.Conditioning.Type,
        width: int,
        height: int,
        seed: int,
        steps: int,
        cfg: float,
        switch: float,
        shift: float,
        sampler_name: str,
        latent_steps: int,
        latent_cfg: float,
        pixel_model: io.Model.Type | None = None,
        latent_model: io.Model.Type | None = None,
        vae: io.Vae.Type | None = None,
        large_model: io.Model.Type | None = None,
        latent_positive: io.Conditioning.Type | None = None,
        latent_negative: io.Conditioning.Type | None = None,
        image: io.Image.Type | None = None,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        from .hybrid_checks import HybridSettings, Models, Prompts
        from .hybrid_sampling import sample_hybrid

        return io.NodeOutput(
            sample_hybrid(
                task,
                Models(latent_model, vae, pixel_model, large_model),
                Prompts(positive, negative, latent_positive, latent_negative),
                HybridSettings(
                    seed,
                    steps,
                    cfg,
                    latent_steps,
                    latent_cfg,
                    None if switch == OF_TASK else switch,
                    shift,
                    sampler_name,
                ),
                width=width,
                height=height,
                image=image,
                mask=mask,
                tell=tell_at(cls.hidden.unique_id),
            )
        )


def _steps_and_cfg(prefix: str, whose: str, steps: str, cfg: str) -> list[io.Input]:
    return [
        io.Int.Input(
            f"{prefix}steps",
            default=FROM_MODEL,
            min=FROM_MODEL,
            max=10000,
            tooltip=f"Sampling steps of a whole image with {whose}; each part takes its share. -1 uses the published "
            f"value ({steps}).",
        ),
        io.Float.Input(
            f"{prefix}cfg",
            default=FROM_MODEL,
            min=FROM_MODEL,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip=f"Guidance of {whose}; 1 disables it and is twice as fast. -1 uses the published value ({cfg}).",
        ),
    ]
