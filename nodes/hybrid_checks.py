"""What Hybrid Sampler is given, and what it refuses or warns about before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .hybrid import check_vae, require_l2p
from .hybrid_tasks import PlannedStage
from .model.dual import works_on_pixels
from .model.limits import check_caption, check_memory
from .options import FROM_MODEL, cfg_problem, steps_problem
from .sizes import check_sides, far_from_trained

LARGE_MODEL = "Connect a model for larger images as large_model."


@dataclass(frozen=True)
class Models:
    """The models; each may be missing. `large` samples sizes above those that `pixels` was trained at."""

    latent: Any = None
    vae: Any = None
    pixels: Any = None
    large: Any = None

    def of(self, stage: PlannedStage) -> Any:
        if stage.space == "latent":
            return self.latent
        return self.large if stage.large else self.pixels


@dataclass(frozen=True)
class Prompts:
    """Conditionings; the latent model's own are None where both models read the same."""

    positive: Any
    negative: Any
    latent_positive: Any = None
    latent_negative: Any = None

    def of(self, stage: PlannedStage) -> tuple[Any, Any]:
        if stage.space == "pixels":
            return self.positive, self.negative
        return self.latent_positive or self.positive, self.latent_negative or self.negative


@dataclass(frozen=True)
class HybridSettings:
    """How to sample; steps and cfg may be FROM_MODEL, the switch None for the task's own."""

    seed: int
    steps: int = FROM_MODEL
    cfg: float = FROM_MODEL
    latent_steps: int = FROM_MODEL
    latent_cfg: float = FROM_MODEL
    switch: float | None = None
    shift: float = 1.0
    sampler: str = "euler"


def check_settings(settings: HybridSettings, width: int, height: int) -> None:
    """Raises ValueError for steps, guidance or sides that no task takes."""
    problem = (
        steps_problem(settings.steps)
        or steps_problem(settings.latent_steps, "latent_steps")
        or cfg_problem(settings.cfg)
        or cfg_problem(settings.latent_cfg, "latent_cfg")
    )
    if problem:
        raise ValueError(problem)
    check_sides(width, height, "the task's own size")


def check_models(models: Models) -> None:
    """Raises ValueError for models in the wrong place."""
    for model in (models.pixels, models.large):
        if model is not None:
            require_l2p(model)
    if models.latent is not None and works_on_pixels(models.latent):
        raise ValueError("The latent model is an L2P pixel model: connect it as pixel_model, and its source here.")


def check_latents(models: Models, planned: Sequence[PlannedStage]) -> None:
    """Raises ValueError if latents are planned without a VAE of theirs."""
    if any(stage.space == "latent" for stage in planned):
        if models.vae is None:
            raise ValueError("A latent model needs its VAE: connect it, or disconnect the latent model.")
        check_vae(models.vae, models.latent.get_model_object("latent_format").latent_channels)


def check_prompts(models: Models, prompts: Prompts, planned: Sequence[PlannedStage]) -> None:
    """Raises ValueError if a model cannot read its prompts."""
    for stage in planned:
        model = models.of(stage).model
        for features in (entry[0] for conditioning in prompts.of(stage) for entry in conditioning):
            if stage.space == "pixels":
                check_caption(features, model.l2p)
                continue
            width = _caption_width(model)
            if features is not None and width not in (None, features.shape[-1]):
                raise ValueError(
                    f"The prompt has {features.shape[-1]} values per token, and the latent model takes {width}: the "
                    "two models have different text encoders. Connect prompts of the latent model's CLIP as "
                    "latent_positive and latent_negative."
                )


def _caption_width(model: Any) -> int | None:
    """What a latent model's captions have per token: one of our own states its sizes, the host's does so partly."""
    sizes = getattr(model, "l2p", None) or getattr(model, "sizes", None)
    width: int | None = sizes.caption_dim if sizes else model.model_config.unet_config.get("cap_feat_dim")
    return width


def check_room(models: Models, planned: Sequence[PlannedStage], batch: int) -> None:
    """Raises ValueError for a size that memory does not hold."""
    for stage in planned:
        if stage.space == "pixels":
            instead = "" if models.large else ", or connect a model for larger images as large_model"
            check_memory(models.of(stage), batch, *stage.size, instead=instead)


def far_grown(models: Models, planned: Sequence[PlannedStage]) -> str:
    """A warning for growth to more than twice the size that the last model was trained at, otherwise empty.

    A sampling that starts at much noise brings the model's own warning.
    """
    last = planned[-1]
    if last.begins != "growth":
        return ""
    config, (height, width) = models.of(last).model.l2p, last.size
    if not far_from_trained(config, width - 1, height - 1):
        return ""
    said = far_from_trained(config, width, height)
    return said if models.large else f"{said} {LARGE_MODEL}"
