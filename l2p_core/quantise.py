"""Small files: an L2P model, or its latent source, in 8 bits or in bfloat16.

The linear layers of the blocks, 97% of the weights, are stored in one of ComfyUI's own formats. The Detailer Head, in
which 8-bit convolutions would cause bands, the embedders, the norms and what else the source's row excludes stay in
bfloat16. The file lists the tensors that it was made from, so that a delta of the original knows it as its base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from . import delta as deltas
from .checkpoint import Checkpoint, check_exact, open_checkpoint
from .config import ModelConfig
from .deltas.delta_on_base import Merged, open_merged
from .deltas.writing import Rounding, write_model
from .files import metadata
from .files.about import inherited
from .files.eight_bit_formats import EIGHT_BITS
from .files.quantised import METADATA, layer_of
from .files.safetensors_header import CheckpointError, TensorSpec, nbytes
from .files.tensor_io import ProgressCallback
from .files.units import bytes_text
from .model import key_shapes
from .ranges import check_known
from .sources import source_of

BF16 = "bf16"
FORMATS = (*EIGHT_BITS, BF16)
"""The formats that a file can be written in."""

_DTYPE = "BF16"
"""The dtype of all weights that are not in 8 bits."""

_OF_BYTES = {"modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", METADATA, metadata.ORIGINALS}
"""Metadata about a file's own bytes, which do not hold for another file."""


@dataclass(frozen=True)
class QuantisationReport:
    """What was written.

    Attributes:
        target: the file.
        format: one of `FORMATS`.
        fates: {key of a weight: what it is stored in}.
        skipped: keys of the source that were not written, because no model of its kind uses them.
        bytes_before, bytes_after: of the files.
    """

    target: Path
    format: str
    fates: Mapping[str, str]
    skipped: tuple[str, ...]
    bytes_before: int
    bytes_after: int

    def summary(self) -> str:
        """A few lines of text: the size, and how many tensors of each part are stored in what."""
        share = self.bytes_after / self.bytes_before
        size = (
            f"{bytes_text(self.bytes_after)}, {share:.0%} of the {bytes_text(self.bytes_before)} that it was made from"
        )
        lines = [f"{self.target}: {size}"]
        for fate in dict.fromkeys(self.fates.values()):
            keys = [key for key, its_fate in self.fates.items() if its_fate == fate]
            lines.append(f"{len(keys)} in {fate}: {metadata.grouped_text(keys)}")
        if self.skipped:
            lines.append(
                f"{len(self.skipped)} skipped, which the model does not use: {metadata.grouped_text(self.skipped)}"
            )
        return "\n".join(lines)


def quantise(
    source: str | Path,
    target: str | Path,
    format: str,
    *,
    base: str | Path | None = None,
    unchecked_base: bool = False,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> QuantisationReport:
    """Write a model in fewer bits.

    Args:
        source: an L2P model or its latent source, a file or a folder of shards; or a delta.
        target: the file to write, in ComfyUI layout.
        format: one of `FORMATS`.
        base: what the delta was made for. Layers that it has in 8 bits stay as they are. A delta without it can be cast
            to bf16 and stays a delta.
        unchecked_base: see `open_merged`.
        about: metadata beside what the source says, see `files.about`.
        overwrite: whether an existing target may be replaced.
        progress: called with (bytes done, total bytes); an exception from it stops the work and leaves no file.

    Raises:
        CheckpointError: if a file is unsuitable, quantised already or not finite, or the target cannot be written.
        ValueError: for an unknown format.
    """
    check_known("format", format, FORMATS)
    target = Path(target)
    if base is None and format == BF16 and open_checkpoint(source).is_delta:
        before = open_checkpoint(source).bytes_on_disk
        names = deltas.cast(source, target, torch.bfloat16, about=about, overwrite=overwrite, progress=progress)
        return QuantisationReport(target, BF16, dict.fromkeys(names, BF16), (), before, target.stat().st_size)
    merged = _opened(source, base, unchecked_base)
    checkpoint = merged.checkpoint
    config = checkpoint.config()
    layers = _layers(config, format)
    rounding = Rounding(layers, EIGHT_BITS.get(format), _DTYPE)
    known = _about(checkpoint, config, format) | dict(about or {})
    write_model(merged, target, known, rounding, overwrite=overwrite, progress=progress)
    fates = {name: format if name in layers else BF16 for name in key_shapes(config)}
    fates |= {f"{layer}.weight": f"{values['format']}, as in the base" for layer, values in merged.kept_layers.items()}
    unused = [key for key in checkpoint.tensors if key not in fates and layer_of(key) not in merged.kept_layers]
    skipped = (*unused, *checkpoint.outside)
    return QuantisationReport(target, format, fates, skipped, checkpoint.bytes_on_disk, target.stat().st_size)


def planned_bytes(config: ModelConfig, format: str) -> int:
    """The size of a model's weights in a format, with their scales, from shapes alone."""
    layers, row = _layers(config, format), EIGHT_BITS.get(format)
    specs: list[TensorSpec] = []
    for name, shape in key_shapes(config).items():
        specs += row.specs(name, shape) if row and name in layers else [TensorSpec(name, _DTYPE, shape)]
    return sum(nbytes(spec.dtype, spec.shape) for spec in specs)


def _layers(config: ModelConfig, format: str) -> frozenset[str]:
    """The weights that are stored in 8 bits."""
    source = source_of(config)
    return frozenset(name for name in key_shapes(config) if format != BF16 and source.may_be_8_bit(name))


def _opened(source: str | Path, base: str | Path | None, unchecked_base: bool) -> Merged:
    """The model to be written, in which only layers of a delta's base may be quantised already."""
    opened = open_checkpoint(source)
    if opened.is_delta:
        if base is None:
            raise CheckpointError(
                f"{source} is an L2P delta, which is quantised together with its base: give the base too, or choose "
                "the format bf16, in which it stays a delta."
            )
        return open_merged(source, base, unchecked_base)
    if base is not None:
        raise CheckpointError(f"{source} is not a delta, so it has no base: give the delta, or remove the base.")
    if opened.quantisation:
        raise CheckpointError(
            f"{source} is quantised already ({opened.quantisation}): give the bf16, fp16 or fp32 file of the model."
        )
    check_exact(opened, key_shapes(opened.config()))
    return Merged(opened, {}, {})


def _about(checkpoint: Checkpoint, config: ModelConfig, format: str) -> dict[str, str]:
    """The file's metadata: its source's, with the entries about the weights brought up to date."""
    said = {name: text for name, text in checkpoint.metadata.items() if name not in _OF_BYTES}
    kind = checkpoint.metadata.get(metadata.KIND, metadata.QUANTISED)
    ours = metadata.describe(kind, config, format=format)
    return {**said, **ours, **inherited(checkpoint.metadata, same_model=True)}
