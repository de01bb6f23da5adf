"""What a run starts from: an L2P file, or a latent source or smaller variant that becomes one."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .. import convert
from ..checkpoint import check_complete, check_exact, open_checkpoint
from ..config import VARIANTS, ModelConfig, variant_row
from ..files.safetensors_header import nbytes, read_header
from ..files.shards import files_of
from ..files.tensor_io import ProgressCallback
from ..model import key_shapes
from ..tiny.bundled import resolve
from .recipe import ModelSection

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def initialisation(model: ModelSection, target: Path, progress: ProgressCallback | None = None) -> Path:
    """The L2P file that training starts from.

    A latent source, or a smaller variant than is asked for, is converted to `target` first, once: where that is there
    already, the source is not looked at.

    Args:
        model: with an absolute `base`.
        target: the file to convert to.
        progress: called with (bytes done, bytes in all) of the conversion.

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
        progress=progress,
    )
    return target


def pixel_config(model: ModelSection, target: Path | None) -> ModelConfig:
    """The configuration of what training will start from, without converting anything.

    Args:
        model: with an absolute `base`.
        target: what the base would be converted to, and may have been; None if what is there does not count.
    """
    made = target is not None and target.exists()
    config = open_checkpoint(target if target is not None and made else resolve(model.base)).config()
    converted = not made and _is_converted(config, model)
    return config.with_head(model.variant, model.head_width) if converted else config


def check(model: ModelSection) -> None:
    """Whether the base can be trained or converted, asked before anything makes way for it.

    Raises:
        ValueError: if it is incomplete, quantised, or not to be converted in the way asked for.
    """
    convert.check_init(model.init)
    checkpoint = open_checkpoint(resolve(model.base))
    config = checkpoint.plain_config()
    hold = check_complete if _is_converted(config, model) else check_exact
    hold(checkpoint, key_shapes(config))


def bytes_to_convert(model: ModelSection) -> int:
    """What the initialisation will take on the disk; 0 where the base is trained as it is."""
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
    if config.head is None:
        return True
    return variant_row(model.variant).pixels > VARIANTS[str(config.variant)].pixels


def fingerprint(path: Path) -> str:
    """A hash of a model's headers and of 64 evenly spaced pieces of 64 KiB of each file, which takes no time."""
    digest = hashlib.sha256()
    for file in files_of(path):
        header, size = read_header(file), file.stat().st_size
        with file.open("rb") as content:
            digest.update(f"{size} ".encode() + content.read(header.data_start))
            for sample in range(_SAMPLES):
                content.seek(header.data_start + (size - header.data_start) * sample // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()
