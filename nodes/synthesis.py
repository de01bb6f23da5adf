"""Generating training images with a source model and the host's sampler: the Synthesize node's work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..l2p_core.config import VARIANTS
from ..l2p_core.dataset.images import as_pixels, load
from ..l2p_core.dataset.kept_pairs import KeptPairs, pair_earlier_images
from ..l2p_core.dataset.pictures import picture
from ..l2p_core.dataset.synthesis import GENERATES, FolderSettings, PlannedImage, SynthesisFolder
from ..l2p_core.files.lock import LOCK, held
from ..l2p_core.files.units import counted
from ..l2p_core.ops.finite import check_finite
from ..l2p_core.patch_pairs import PatchPairs
from ..l2p_core.run.metrics import duration
from .messages.progress import warn_where_running
from .model.content import content_digest
from .model.host import PixelFormat
from .pixels import pixels_to_image
from .previews import Preview, Previews

ENCODED = 256
"""Prompts encoded at a time: their features take some 200 MB, and text encoder and model rarely swap places."""
SHOWN = 4
"""Images that the node returns."""

CELL = 8
"""Pixels of a side of a latent cell, in all sources that convert."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class TextToImage:
    """The models that generate the images, and their settings.

    Attributes:
        model: any MODEL of images.
        clip: its CLIP.
        vae: its VAE; None for an L2P MODEL, which generates pixels.
        width, height: of the images in pixels.
        negative: the prompt to guide away from.
        batch: images of a prompt generated at once.
    """

    model: Any
    clip: Any
    vae: Any
    width: int
    height: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    negative: str
    batch: int

    def check(self) -> None:
        """Raise ValueError if something needed to generate images is missing."""
        if self.clip is None:
            raise ValueError("The CLIP is empty: connect the text encoder of this model; a checkpoint may have none.")
        if self.vae is None and not self.makes_pixels:
            raise ValueError("This model makes latents: connect its VAE. Only an L2P model needs none.")

    @property
    def makes_pixels(self) -> bool:
        """Whether the model is L2P."""
        return isinstance(self.model.get_model_object("latent_format"), PixelFormat)

    def settings(self) -> FolderSettings:
        """The settings of the images besides prompt and seed."""
        shift = getattr(self.model.get_model_object("model_sampling"), "shift", "")
        return {
            "steps": self.steps,
            "cfg": self.cfg,
            "sampler": self.sampler,
            "scheduler": self.scheduler,
            "shift": shift,
            "width": self.width,
            "height": self.height,
            "negative": self.negative,
            "model": model_name(self.model),
        }

    def conditioning(self, prompt: str) -> Any:
        """The CLIP's conditioning for a prompt."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt), show_pbar=False)

    def images(
        self, seeds: Sequence[int], positive: Any, negative: Any, callback: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Images (B, H, W, 3) in [0, 1] of B seeds, each from its own noise; `callback` gets (step, x0)."""
        return self.decoded(self.sampled(seeds, positive, negative, callback))

    def sampled(
        self, seeds: Sequence[int], positive: Any, negative: Any, callback: Callable[[int, Tensor], None]
    ) -> Tensor:
        """The samples to be decoded: latents, or pixels; arguments as for `images`."""
        latent = self._empty(len(seeds))
        noise = torch.cat([comfy.sample.prepare_noise(latent[i : i + 1], seed) for i, seed in enumerate(seeds)])
        samples = comfy.sample.sample(
            self.model,
            noise,
            self.steps,
            self.cfg,
            self.sampler,
            self.scheduler,
            positive,
            negative,
            latent,
            callback=lambda step, x0, x, total: callback(step, x0),
            disable_pbar=True,
            seed=seeds[0],
        )
        check_finite(samples)
        return samples

    def read(self, samples: Tensor) -> Tensor:
        """Latents as the model reads them."""
        scaled: Tensor = self.model.model.process_latent_in(samples)
        return scaled

    def encoded(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] as the latents that the model reads."""
        return self.read(self.vae.encode(((pixels + 1) / 2).movedim(1, -1)))

    def no_pairs(self) -> PatchPairs | None:
        """Patch pairs to begin with; None for a model of other latents than those of known sources."""
        form = self.model.get_model_object("latent_format")
        if self.makes_pixels or form.latent_dimensions != 2 or form.spacial_downscale_ratio != CELL:
            return None
        return PatchPairs(VARIANTS["1k"].patch_size, form.latent_channels)

    def _empty(self, count: int) -> Tensor:
        form = self.model.get_model_object("latent_format")
        ratio = form.spacial_downscale_ratio
        # A side that the ratio does not divide is rounded up, and cropped after decoding.
        sides = -(-self.height // ratio), -(-self.width // ratio)
        return comfy.sample.fix_empty_latent_channels(
            self.model, torch.zeros(count, form.latent_channels, *sides), ratio
        )

    def decoded(self, samples: Tensor) -> Tensor:
        """Images (B, H, W, 3) in [0, 1].

        Raises:
            ValueError: if the VAE makes something else of them.
        """
        images = pixels_to_image({"samples": samples}) if self.makes_pixels else self.vae.decode(samples)
        images = images.reshape(-1, *images.shape[-3:])[:, : self.height, : self.width, :3]
        if images.shape[1:] != (self.height, self.width, 3):
            raise ValueError(
                f"The VAE returns images of the shape {tuple(images.shape[1:])}, not of {self.width}x{self.height} "
                "pixels: connect the VAE that belongs to the model."
            )
        if not bool(images.isfinite().all()):
            raise ValueError(
                "An image came out of the VAE with values that are not finite numbers and would be black: the VAE is "
                "broken or overflows in its number type, so load it in bf16 or fp32."
            )
        return images


def synthesize(folder: Path, wanted: Sequence[PlannedImage], pipeline: TextToImage, say: Say) -> SynthesisFolder:
    """Generate the missing images; each is written as soon as it is finished.

    Args:
        folder: of the data set.
        wanted: the images of the data set.
        pipeline: generates them.
        say: shows the progress, with the time left.

    Raises:
        ValueError: for an incomplete pipeline, or a folder with other images of that name or in use by another process.
        InterruptProcessingException: the host's, when the user stops it; finished images stay.
    """
    pipeline.check()
    with held(folder, LOCK, GENERATES, warn_where_running):
        return _synthesize(SynthesisFolder(folder, wanted, pipeline.settings()), pipeline, say)


def _synthesize(made: SynthesisFolder, pipeline: TextToImage, say: Say) -> SynthesisFolder:
    todo = made.todo
    try:
        _pair_earlier_images(made, pipeline, say)
        with _kept_pairs(made.folder, pipeline) if todo else nullcontext() as pairs:
            work = _Synthesis(made, pipeline, len(todo), say, pairs) if todo else None
            for part in _by_prompts(todo, ENCODED):
                assert work is not None
                work.make(part)
    except BaseException as error:
        how = "Stopped" if isinstance(error, comfy.model_management.InterruptProcessingException) else "Failed"
        say(f"{how} with {len(made.done)} of {len(made.wanted)} images; run it again to make the rest.")
        raise
    say(f"{counted(len(made.wanted), 'image')}, {len(todo)} of them made now")
    return made


def _kept_pairs(folder: Path, pipeline: TextToImage) -> AbstractContextManager[KeptPairs | None]:
    empty = pipeline.no_pairs()
    return KeptPairs(folder, empty) if empty else nullcontext()


def _pair_earlier_images(made: SynthesisFolder, pipeline: TextToImage, say: Say) -> None:
    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        say(f"Pairing earlier images with their latents: {done} of {total}")

    if (pairs := pipeline.no_pairs()) is not None:
        pair_earlier_images(made, pairs, pipeline.encoded, pipeline.batch, progress)


class _Synthesis:
    """One run of the work: its progress, and the state shared by its parts."""

    def __init__(self, made: SynthesisFolder, pipeline: TextToImage, count: int, say: Say, pairs: KeptPairs | None):
        self._made, self._pipeline, self._say, self._pairs = made, pipeline, say, pairs
        self._count, self._done, self._seconds = count, 0, 0.0
        self._negative: Any = None
        model = pipeline.model
        self._bar = comfy.utils.ProgressBar(count * pipeline.steps)
        self._previews = Previews(model)

    def make(self, part: Sequence[PlannedImage]) -> None:
        """Encode the prompts of some images and generate them."""
        encoded = self._encode([item.prompt for item in part])
        for prompt, images in itertools.groupby(part, key=lambda item: item.prompt):
            of_prompt = list(images)
            for start in range(0, len(of_prompt), self._pipeline.batch):
                self._sample(of_prompt[start : start + self._pipeline.batch], encoded[prompt])

    def _encode(self, prompts: Sequence[str]) -> dict[str, Any]:
        if self._negative is None:
            self._negative = self._pipeline.conditioning(self._pipeline.negative)
        encoded: dict[str, Any] = {}
        different = list(dict.fromkeys(prompts))
        for number, prompt in enumerate(different, start=1):
            comfy.model_management.throw_exception_if_processing_interrupted()
            self._say(f"Encoding prompts: {number} of {len(different)}")
            encoded[prompt] = self._pipeline.conditioning(prompt)
        return encoded

    def _sample(self, batch: Sequence[PlannedImage], positive: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        begun = time.perf_counter()

        def step_done(step: int, x0: Tensor) -> None:
            steps = self._done * self._pipeline.steps + (step + 1) * len(batch)
            self._show(steps, self._previews.of_samples(x0))

        samples = self._pipeline.sampled([item.seed for item in batch], positive, self._negative, step_done)
        images = self._pipeline.decoded(samples)
        pixels = images.movedim(-1, 1).float() * 2 - 1
        pictures = [picture(image) for image in pixels]
        for item, made in zip(batch, pictures, strict=True):
            self._made.write(item, made)
        if self._pairs:
            self._pairs.add(pixels, self._pipeline.read(samples))
        self._done += len(batch)
        # The node finally shows a finished image, not the last preview.
        self._show(self._done * self._pipeline.steps, self._previews.of_image(pictures[-1]))
        self._seconds += time.perf_counter() - begun
        left = self._seconds / self._done * (self._count - self._done)
        there = len(self._made.wanted) - self._count + self._done
        self._say(f"{there} of {len(self._made.wanted)} images, about {duration(left)} left")

    def _show(self, steps: int, preview: Preview | None) -> None:
        self._bar.update_absolute(steps, self._count * self._pipeline.steps, preview)


def examples(made: SynthesisFolder) -> Tensor:
    """The first images of a data set, (B, H, W, 3) in [0, 1]."""
    settings = made.settings
    paths = [made.path(item) for item in made.done[:SHOWN]]
    size = int(settings["width"]), int(settings["height"])
    images = torch.stack([as_pixels(load(path, *size)) for path in paths])
    return ((images + 1) / 2).movedim(1, -1).contiguous()


def model_name(model: Any) -> str:
    """The files that a MODEL was loaded from, if the host knows them, otherwise its kind; and a mark for its
    patches."""
    _, arguments = getattr(model, "cached_patcher_init", None) or (None, ())
    paths = [Path(value) for value in arguments if isinstance(value, str)]
    suffixes = (".safetensors", ".sft", ".gguf")
    names = [p.name for p in paths if p.suffix.lower() in suffixes or (p.is_absolute() and p.is_dir())]
    name = " + ".join(names) or type(model.model).__name__
    return f"{name}, patched {content_digest(model.patches)[:8]}" if model.patches else name


def _by_prompts(todo: Sequence[PlannedImage], count: int) -> Iterator[list[PlannedImage]]:
    """The items in groups with at most `count` prompts."""
    groups = [list(group) for _, group in itertools.groupby(todo, key=lambda item: item.prompt)]
    for start in range(0, len(groups), count):
        yield [item for group in groups[start : start + count] for item in group]
