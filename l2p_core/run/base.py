"""The model that a run starts from: an L2P file, or a latent source or smaller variant to be converted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import convert, head_fit
from ..checkpoint import check_complete, check_exact, open_checkpoint
from ..config import VARIANTS, ModelConfig, PixelConfig, variant_row
from ..files import metadata
from ..files.safetensors_header import nbytes
from ..files.sampled_hash import add_samples
from ..files.shards import files_of
from ..files.tensor_io import ProgressCallback
from ..initialise import FITTED, INITS
from ..model import key_shapes
from ..patch_pairs import PatchPairs, file_in
from ..ranges import check_known
from ..tiny.bundled import resolve
from .recipe import ModelSection, Recipe


def initialisation(
    model: ModelSection,
    target: Path,
    progress: ProgressCallback | None = None,
    pairs: Callable[[], PatchPairs] | None = None,
) -> Path:
    """The L2P file that training starts from.

    A latent source, or a smaller variant than requested, is first converted to `target`, once: if that exists,
    the source is not read.

    Args:
        model: with an absolute `base`.
        target: the file to convert to.
        progress: called with (bytes done, total bytes) of the conversion.
        pairs: finds those of a model that starts "fitted".

    Raises:
        ValueError: if the base cannot be read or converted.
    """
    if target.exists():
        return target
    base = resolve(model.base)
    if not _is_converted(open_checkpoint(base).config(), model):
        return base
    convert.convert(
        base,
        target,
        variant=model.variant,
        seed=model.seed,
        init=model.init,
        head_width=model.head_width,
        pairs=pairs() if pairs and model.init == FITTED else None,
        progress=progress,
    )
    return target


def pixel_config(model: ModelSection, target: Path | None) -> PixelConfig:
    """The configuration of the model that training will start from, without converting anything.

    Args:
        model: with an absolute `base`.
        target: the file that the base would be, or has been, converted to; None ignores an existing one.
    """
    made = target is not None and target.exists()
    config = open_checkpoint(target if target is not None and made else resolve(model.base)).config()
    if isinstance(config, PixelConfig) and (made or not _is_converted(config, model)):
        return config
    return config.with_head(model.variant, model.head_width)


def check(model: ModelSection, pairs: Callable[[], PatchPairs] | None = None) -> None:
    """Check that the base can be trained or converted, before anything is moved for it.

    Args:
        model: with an absolute `base`.
        pairs: finds those of a model that starts "fitted"; None if they are still to be made.

    Raises:
        ValueError: if it is incomplete, quantised, or cannot be converted as requested.
    """
    check_known("initialisation", model.init, INITS)
    checkpoint = open_checkpoint(resolve(model.base))
    config = checkpoint.plain_config()
    hold = check_complete if _is_converted(config, model) else check_exact
    hold(checkpoint, key_shapes(config))
    if model.init == FITTED and _is_converted(config, model):
        target = config.with_head(model.variant, model.head_width)
        convert.check_fits(config, target, VARIANTS["1k"].patch_size)
        if pairs:
            convert.fitted_embedder(checkpoint, target, pairs())


def starts_fitted(base: Path) -> bool:
    """Whether a model is an untrained conversion with the init "fitted", whose head is still to be fitted."""
    known = open_checkpoint(base).metadata
    return known.get(metadata.KIND) == metadata.PIXEL_INIT and known.get(metadata.INIT) == FITTED


def warmed_up(recipe: Recipe) -> Recipe:
    """A recipe with the warm-up that a fitted head needs."""
    steps = max(recipe.training.warmup_steps, head_fit.WARM_UP)
    return replace(recipe, training=replace(recipe.training, warmup_steps=steps))


def bytes_to_convert(model: ModelSection) -> int:
    """Bytes on disk of the initialisation; 0 if the base is trained without conversion."""
    checkpoint = open_checkpoint(resolve(model.base))
    config = checkpoint.config()
    if not _is_converted(config, model):
        return 0
    new = checkpoint.input_dtype
    shapes = key_shapes(config.with_head(model.variant, model.head_width))
    return sum(
        nbytes(checkpoint.tensors[name].dtype if checkpoint.shapes.get(name) == shape else new, shape)
        for name, shape in shapes.items()
    )


def _is_converted(config: ModelConfig, model: ModelSection) -> bool:
    return not isinstance(config, PixelConfig) or (variant_row(model.variant).pixels > VARIANTS[config.variant].pixels)


def source_fingerprint(model: ModelSection, pairs: Path | None) -> str | None:
    """A fingerprint of what an initialisation is converted from.

    Args:
        model: with an absolute `base`.
        pairs: their place, for a model that starts "fitted"; None if the recipe determines them.

    Returns:
        Empty if the base needs no conversion; None if it is not there.
    """
    base = resolve(model.base)
    if not base.exists():
        return None
    if not _is_converted(open_checkpoint(base).config(), model):
        return ""
    files = [base] if pairs is None or model.init != FITTED else [base, file_in(pairs)]
    return "+".join(fingerprint(path) for path in files)


def fingerprint(path: Path) -> str:
    """A fast hash of a model's headers and of 64 evenly spaced pieces of each file, 64 KiB each."""
    digest = hashlib.sha256()
    for file in files_of(path):
        add_samples(digest, file)
    return digest.hexdigest()
