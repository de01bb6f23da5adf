"""Hybrid Sampler's work: the stages of a task, one after the other, through the host's samplers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..l2p_core.hybrid import resized, stage_seed
from ..l2p_core.sources import sampling_of
from .hybrid import HostLatent, grow_pixels, images, latent_to_pixels, schedule
from .hybrid_checks import (
    HybridSettings,
    Models,
    Prompts,
    check_latents,
    check_models,
    check_prompts,
    check_room,
    check_settings,
    far_grown,
)
from .hybrid_tasks import Asked, PlannedStage, in_words, stages
from .options import FROM_MODEL
from .pixels import image_to_pixels, keep_unmasked, pixels_to_image
from .previews import Previews
from .sizes import own_side

LATENT_STEPS, LATENT_CFG = 30, 4.0
"""Settings for a latent source that states none: those that Z-Image was published with."""


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

    Stage i, counted from 0, draws its noise with seed + i, see `stage_seed`.

    Raises:
        ValueError: for models, prompts, images or a size that do not fit the task or each other.
    """
    check_settings(settings, width, height)
    check_models(models)
    planned = stages(_asked(task, models, settings, (height, width), image, mask))
    size = planned[-1].size
    check_latents(models, planned)
    check_prompts(models, prompts, planned)
    check_room(models, planned, 1 if image is None else image.shape[0])
    planned = [_of_whole_cells(stage, models) for stage in planned]
    cfgs = [_cfg(stage, models, settings) for stage in planned]
    far = far_grown(models, planned)
    tell(_joined(f"Plan: {in_words(planned, cfgs)}", far))
    run = _Run(models, prompts, settings, sum(stage.steps for stage in planned), image, mask)
    for number, (stage, cfg) in enumerate(zip(planned, cfgs, strict=True)):
        run.sample(stage, cfg, stage_seed(settings.seed, number))
    tell(_joined(f"Done: {in_words(planned, cfgs, run.evaluations)}", far, *run.late))
    if planned[-1].space == "latent":
        decoded = image_to_pixels(images(models.vae.decode(run.output["samples"])))
        return pixels_to_image({"samples": resized(decoded["samples"], size)})
    result = pixels_to_image(run.output)
    return result if image is None or mask is None else keep_unmasked(result, image, mask)


def _joined(*sentences: str) -> str:
    return " ".join(filter(None, sentences))


class _Guider(comfy.samplers.CFGGuider):
    """The host's guidance, which counts: some samplers evaluate the model more than once a step."""

    evaluations = 0

    def predict_noise(self, *given: Any, **named: Any) -> Any:
        self.evaluations += 1 if self.cfg == 1.0 else 2
        return super().predict_noise(*given, **named)


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
        self.evaluations = 0
        self.late: list[str] = []
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
        guider = _Guider(model)
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
        self.evaluations += guider.evaluations

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
            grown, sigmas, late = grow_pixels(
                self.output,
                self._sigmas,
                model,
                width=width,
                height=height,
                steps=stage.steps,
                end=stage.end,
                seed=seed,
            )
            self.late += [late]
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


def _of_whole_cells(stage: PlannedStage, models: Models) -> PlannedStage:
    """The stage as it is sampled: latents may cover a few pixels more than requested."""
    cell = models.of(stage).get_model_object("latent_format").spacial_downscale_ratio
    height, width = (-(-side // cell) * cell for side in stage.size)
    return replace(stage, size=(height, width))


def _empty(stage: PlannedStage, model: Any) -> Tensor:
    """Zeros for a sampling from noise alone."""
    shape = model.get_model_object("latent_format")
    cells = [side // shape.spacial_downscale_ratio for side in stage.size]
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
