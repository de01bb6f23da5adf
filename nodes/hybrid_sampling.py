"""Hybrid Sampler's work: the stages of a task, one after the other, through the host's samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..l2p_core.hybrid import resized
from ..l2p_core.sources import sampling_of
from .hybrid import HostLatent, check_vae, grow_pixels, images, latent_to_pixels, require_l2p, schedule
from .hybrid_tasks import Asked, PlannedStage, in_words, stages
from .model.dual import works_on_pixels
from .model.limits import check_memory
from .options import FROM_MODEL, steps_problem
from .pixels import image_to_pixels, keep_unmasked, pixels_to_image
from .previews import Previews
from .sizes import own_side

LATENT_STEPS, LATENT_CFG = 30, 4.0
"""Settings for a latent source that states none: those that Z-Image was published with."""


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


def sample_hybrid(
    task: str,
    models: Models,
    prompts: Prompts,
    settings: HybridSettings,
    *,
    width: int,
    height: int,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    tell: Callable[[str], None],
) -> Tensor:
    """An IMAGE (B, H, W, 3) in [0, 1], made by the stages that `hybrid_tasks` plans.

    Stage i, counted from 0, draws its noise with seed + i.

    Raises:
        ValueError: for models, prompts, images or a size that do not fit the task or each other.
    """
    problem = steps_problem(settings.steps) or steps_problem(settings.latent_steps)
    if problem:
        raise ValueError(problem)
    _check_models(models)
    planned = stages(_asked(task, models, settings, (height, width), image, mask))
    _check_prompts(models, prompts, planned)
    batch = 1 if image is None else image.shape[0]
    for stage in planned:
        if stage.space == "pixels":
            check_memory(models.of(stage), batch, *stage.size)
    cfgs = [_cfg(stage, models, settings) for stage in planned]
    tell(f"Plan: {in_words(planned, cfgs)}")
    run = _Run(models, prompts, settings, sum(stage.steps for stage in planned), image, mask)
    for number, (stage, cfg) in enumerate(zip(planned, cfgs, strict=True)):
        run.sample(stage, cfg, settings.seed + number)
    tell(f"Done: {in_words(planned, cfgs)}")
    if planned[-1].space == "latent":
        decoded = image_to_pixels(images(models.vae.decode(run.output["samples"])))
        return pixels_to_image({"samples": resized(decoded["samples"], planned[-1].size)})
    result = pixels_to_image(run.output)
    return result if image is None or mask is None else keep_unmasked(result, image, mask)


class _Run:
    """The stages' common state: what the last one left, and one progress bar for all."""

    def __init__(
        self,
        models: Models,
        prompts: Prompts,
        settings: HybridSettings,
        steps: int,
        image: Tensor | None,
        mask: Tensor | None,
    ):
        self.models, self.prompts, self.settings = models, prompts, settings
        self.image, self.mask = image, mask
        self.output: HostLatent = {}
        self._denoised: HostLatent = {}
        self._sigmas = torch.empty(0)
        self._done, self._steps = 0, steps
        self._bar = comfy.utils.ProgressBar(steps)

    def sample(self, stage: PlannedStage, cfg: float, seed: int) -> None:
        """Sample a stage from what the one before left."""
        model = self.models.of(stage)
        latent, sigmas = self._entered(stage, model, seed)
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        # A grown image is noisy already.
        noise = torch.zeros_like(samples) if stage.begins == "growth" else comfy.sample.prepare_noise(samples, seed)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*self.prompts.of(stage))
        guider.set_cfg(cfg)
        clean: dict[str, Tensor] = {}
        result = guider.sample(
            noise,
            samples,
            comfy.samplers.sampler_object(self.settings.sampler),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=self._shown(model, clean),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        kept = {"noise_mask": latent["noise_mask"]} if "noise_mask" in latent else {}
        self.output = {"samples": result.to(comfy.model_management.intermediate_device()), **kept}
        self._denoised = {"samples": model.model.process_latent_out(clean["x0"].cpu()), **kept}
        self._sigmas = sigmas
        self._done += stage.steps

    def _entered(self, stage: PlannedStage, model: Any, seed: int) -> tuple[HostLatent, Tensor]:
        height, width = stage.size
        if stage.begins == "space":
            return latent_to_pixels(
                self._denoised,
                self.models.vae,
                self._sigmas,
                model,
                shift=self.settings.shift,
                steps=stage.steps,
                end=stage.end,
                width=width,
                height=height,
            )
        if stage.begins == "growth":
            grown, sigmas, _ = grow_pixels(
                self.output,
                self._sigmas,
                model,
                width=width,
                height=height,
                steps=stage.steps,
                end=stage.end,
                seed=seed,
            )
            return grown, sigmas
        sigmas = schedule(model, stage.start, stage.end, stage.steps)
        if stage.begins == "image":
            assert self.image is not None
            return image_to_pixels(self.image, self.mask, width, height), sigmas
        return {"samples": _empty(stage, model)}, sigmas

    def _shown(self, model: Any, clean: dict[str, Tensor]) -> Callable[..., None]:
        """The host's callback (`latent_preview.prepare_callback`), with one bar for all stages."""
        previews = Previews(model)
        done = self._done

        def callback(step: int, x0: Tensor, x: Tensor, total: int) -> None:
            clean["x0"] = x0
            self._bar.update_absolute(done + step + 1, self._steps, previews.of_samples(x0))

        return callback


def _empty(stage: PlannedStage, model: Any) -> Tensor:
    """Zeros for a sampling from noise alone; latents may cover a few pixels more than requested."""
    shape = model.get_model_object("latent_format")
    cells = [-(-side // shape.spacial_downscale_ratio) for side in stage.size]
    return torch.zeros(1, shape.latent_channels, *cells, device=comfy.model_management.intermediate_device())


def _asked(
    task: str,
    models: Models,
    settings: HybridSettings,
    size: tuple[int, int],
    image: Tensor | None,
    mask: Tensor | None,
) -> Asked:
    return Asked(
        task=task,
        latent=models.latent is not None,
        pixels=models.pixels is not None,
        own=_own_side(models),
        size=size,
        image=None if image is None else (image.shape[1], image.shape[2]),
        mask=mask is not None,
        steps=_steps(settings.steps, models.pixels),
        latent_steps=LATENT_STEPS if settings.latent_steps == FROM_MODEL else settings.latent_steps,
        switch=settings.switch,
        shift=settings.shift,
        large_own=own_side(models.large.model.l2p) if models.large is not None else 0,
        large_steps=_steps(settings.steps, models.large),
    )


def _own_side(models: Models) -> int:
    if models.pixels is not None:
        return own_side(models.pixels.model.l2p)
    return own_side(getattr(getattr(models.latent, "model", None), "sizes", None))


def _steps(asked: int, model: Any) -> int:
    return sampling_of(model.model.l2p).steps if asked == FROM_MODEL and model is not None else max(asked, 1)


def _cfg(stage: PlannedStage, models: Models, settings: HybridSettings) -> float:
    if stage.space == "latent":
        return LATENT_CFG if settings.latent_cfg == FROM_MODEL else settings.latent_cfg
    return sampling_of(models.of(stage).model.l2p).cfg if settings.cfg == FROM_MODEL else settings.cfg


def _check_models(models: Models) -> None:
    for model in (models.pixels, models.large):
        if model is not None:
            require_l2p(model)
    if models.latent is None:
        return
    if works_on_pixels(models.latent):
        raise ValueError("The latent model is an L2P pixel model: connect it as pixel_model, and its source here.")
    if models.vae is None:
        raise ValueError("A latent model needs its VAE: connect it, or disconnect the latent model.")
    check_vae(models.vae, models.latent.get_model_object("latent_format").latent_channels)


def _check_prompts(models: Models, prompts: Prompts, planned: list[PlannedStage]) -> None:
    """Raises ValueError if the latent model cannot read the prompts; a pixel model's are checked when it samples."""
    latents = [stage for stage in planned if stage.space == "latent"]
    if not latents:
        return
    width = models.latent.model.model_config.unet_config.get("cap_feat_dim")
    for conditioning in prompts.of(latents[0]):
        given = conditioning[0][0].shape[-1] if conditioning else width
        if width is not None and given != width:
            raise ValueError(
                f"The prompt has {given} values per token, and the latent model takes {width}: the two models have "
                "different text encoders. Connect prompts of the latent model's CLIP as latent_positive and "
                "latent_negative."
            )
