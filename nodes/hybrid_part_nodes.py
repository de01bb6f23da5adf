"""The parts of sampling in both spaces, for graphs of the host's samplers."""

from __future__ import annotations

from comfy_api.latest import io

from .limited import within_limits
from .messages.errors import plain_errors
from .messages.progress import tell_at
from .options import MAX_SIDE

CATEGORY = "L2P/hybrid"
ALIASES = [
    "hires fix",
    "high res fix",
    "refiner",
    "second pass",
    "two stage",
    "upscale",
    "l2p hybrid",
    "放大",
    "两阶段",
]


def _steps(default: int = 20) -> io.Int.Input:
    return io.Int.Input("steps", default=default, min=1, max=10000, tooltip="Sampling steps of the part that follows.")


def _end() -> io.Float.Input:
    return io.Float.Input(
        "stop_at",
        default=0.0,
        min=0.0,
        max=0.99,
        step=0.01,
        round=0.0001,
        tooltip="The noise level at which the part that follows stops: 0 is a finished image.",
    )


def _part_to_follow(name: str, tooltip: str) -> list[io.Output]:
    sigmas = io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of the part that follows.")
    return [io.Latent.Output(display_name=name, tooltip=tooltip), sigmas]


def shift_input() -> io.Float.Input:
    return io.Float.Input(
        "shift",
        default=1.0,
        min=0.01,
        max=100.0,
        step=0.1,
        round=0.001,
        tooltip="Above 1 the pixels start at more noise than the latents stopped at, so that the pixel model decides "
        "more of the image anew; 1 keeps the noise level.",
    )


def sides(what: str) -> list[io.Input]:
    return [
        io.Int.Input(name, default=0, min=0, max=MAX_SIDE, tooltip=f"{name.capitalize()} in pixels; {what}")
        for name in ("width", "height")
    ]


def _stopped() -> io.Sigmas.Input:
    return io.Sigmas.Input(
        "sigmas", tooltip="The SIGMAS of the sampling that stopped half-way; the last is the noise level it stopped at."
    )


def _handed_over(model: str) -> list[io.Input]:
    """What both directions take, and the model to hand over to."""
    return [
        io.Latent.Input("denoised", tooltip="denoised_output of the sampler that stopped half-way."),
        io.Vae.Input("vae", tooltip="The latent model's VAE."),
        _stopped(),
        io.Model.Input("model", tooltip=model),
        shift_input(),
        _steps(),
        _end(),
    ]


class LatentToPixels(io.ComfyNode):
    """Hands a half-finished latent sampling over to a pixel model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PLatentToPixels",
            display_name="Latent to Pixels (mid-sampling)",
            category=CATEGORY,
            description="Hands a latent model's half-finished image to an L2P model: the VAE decodes the latent "
            "sampler's estimate of the image, and the next sampler adds the noise that is left, with Random Noise.",
            search_aliases=ALIASES,
            inputs=[
                *_handed_over("The L2P model that samples next."),
                *sides("0 is the size of the latents' image."),
            ],
            outputs=_part_to_follow("pixels", "The pixels that the next sampler starts from."),
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        denoised: io.Latent.Type,
        vae: io.Vae.Type,
        sigmas: io.Sigmas.Type,
        model: io.Model.Type,
        shift: float,
        steps: int,
        stop_at: float,
        width: int,
        height: int,
    ) -> io.NodeOutput:
        from .hybrid import latent_to_pixels

        return io.NodeOutput(
            *latent_to_pixels(
                denoised, vae, sigmas, model, shift=shift, steps=steps, end=stop_at, width=width, height=height
            )
        )


class PixelsToLatent(io.ComfyNode):
    """Hands a half-finished pixel sampling over to a latent model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPixelsToLatent",
            display_name="Pixels to Latent (mid-sampling)",
            category=CATEGORY,
            description="Hands an L2P model's half-finished image to a latent model, which finishes it; the next "
            "sampler adds the noise that is left, with Random Noise.",
            search_aliases=ALIASES,
            inputs=[
                *_handed_over("The latent model that samples next."),
            ],
            outputs=_part_to_follow("latent", "The latent that the next sampler starts from."),
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        denoised: io.Latent.Type,
        vae: io.Vae.Type,
        sigmas: io.Sigmas.Type,
        model: io.Model.Type,
        shift: float,
        steps: int,
        stop_at: float,
    ) -> io.NodeOutput:
        from .hybrid import pixels_to_latent

        return io.NodeOutput(*pixels_to_latent(denoised, vae, sigmas, model, shift=shift, steps=steps, end=stop_at))


class GrowPixels(io.ComfyNode):
    """A half-finished image at a larger size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PGrowPixels",
            display_name="Grow Pixels",
            category=CATEGORY,
            description="Enlarges an L2P model's half-finished image without a VAE: what is decided stays, and the "
            "sampling that follows makes the new fine detail. Connect Disable Noise there: the image already contains "
            "noise.",
            search_aliases=ALIASES,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input("pixels", tooltip="output of the sampler that stopped half-way."),
                _stopped(),
                io.Model.Input("model", tooltip="The L2P model that samples next: the same, or one for larger images."),
                *sides("larger than now, in the same aspect ratio. 0 doubles it."),
                _steps(),
                _end(),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The seed of the noise in the new fine detail.",
                ),
            ],
            outputs=_part_to_follow("pixels", "The pixels that the next sampler starts from."),
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(
        cls,
        pixels: io.Latent.Type,
        sigmas: io.Sigmas.Type,
        model: io.Model.Type,
        width: int,
        height: int,
        steps: int,
        stop_at: float,
        seed: int,
    ) -> io.NodeOutput:
        from .hybrid import grow_pixels

        grown, following, late = grow_pixels(
            pixels, sigmas, model, width=width, height=height, steps=steps, end=stop_at, seed=seed
        )
        tell_at(cls.hidden.unique_id)(late)
        return io.NodeOutput(grown, following)


class PartSigmas(io.ComfyNode):
    """The noise levels of a part of a sampling."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="L2PPartSigmas",
            display_name="Sigmas of a Part",
            category=CATEGORY,
            description="The noise levels of a sampling that starts or stops half-way, on the model's own schedule.",
            search_aliases=["split sigmas", "basic scheduler", "noise levels", *ALIASES],
            inputs=[
                io.Model.Input("model", tooltip="The model that samples: a latent one or an L2P model."),
                io.Float.Input(
                    "start_at",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.0001,
                    tooltip="The noise level at which the part starts: 1 is noise alone.",
                ),
                _end(),
                _steps(),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of this part.")],
        )

    @classmethod
    @plain_errors()
    @within_limits
    def execute(cls, model: io.Model.Type, start_at: float, stop_at: float, steps: int) -> io.NodeOutput:
        from .hybrid import schedule

        return io.NodeOutput(schedule(model, start_at, stop_at, steps))
