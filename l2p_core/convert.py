"""Conversion: a latent source, or an L2P model of another variant, becomes a pixel initialisation.

As in the published code, tensors with equal name and shape are copied and the rest are drawn anew: the patch
embedder, whose published name holds the patch size, and the stages of the Detailer Head that the source lacks
(arXiv 2605.12013 section 3.2). The source is read once, front to back, copied and hashed at the same time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .checkpoint import Checkpoint, check_exact, open_checkpoint
from .config import ModelConfig, PixelConfig, variant_row
from .files import metadata
from .files.about import inherited
from .files.model_file import model_file, refuse_own_source
from .files.recognise import is_unused
from .files.safetensors_header import CheckpointError, Entry, Header, TensorSpec, nbytes
from .files.tensor_io import (
    DTYPE_NAMES,
    TORCH_DTYPES,
    ByteCounter,
    ChunkReader,
    ProgressCallback,
    Stored,
    TensorWriter,
    as_bytes,
    converted,
    itemsize,
)
from .initialise import FITTED, INITS, random_values
from .model import key_shapes
from .patch_pairs import FILE, PatchPairs, fit_embedder
from .ranges import HEAD_WIDTH, SEED, check_known
from .sources import source_of

_NO_HASH = "0" * 64


@dataclass(frozen=True)
class Fate:
    """What became of one key (ComfyUI layout), and how or why."""

    key: str
    fate: Literal["copied", "initialised", "dropped"]
    how: str


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did; every key of the source and of the result is once in `fates`.

    `broken` is the first tensor written with values that are not finite numbers.
    """

    source: Path
    target: Path
    variant: str
    seed: int
    source_sha256: str
    fates: tuple[Fate, ...]
    broken: str | None = None

    def keys(self, fate: str) -> list[str]:
        """The keys with this fate."""
        return [entry.key for entry in self.fates if entry.fate == fate]

    def summary(self) -> str:
        """A few lines of text: how many tensors of each part had which fate, and how."""
        lines = [
            f"{self.target} is a {self.variant} pixel model made from {self.source} (sha256 {self.source_sha256})."
        ]
        groups: dict[tuple[str, str], list[str]] = {}
        for entry in self.fates:
            groups.setdefault((entry.fate, entry.how), []).append(entry.key)
        for (fate, how), keys in groups.items():
            lines.append(f"{fate} {len(keys)} ({how}): {metadata.grouped_text(keys)}")
        lines += [metadata.broken_text(self.broken)] if self.broken else []
        return "\n".join(lines)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    variant: str = "1k",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    init: str = "random",
    head_width: float = 1.0,
    layout: str = "comfy",
    pairs: PatchPairs | None = None,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> ConversionReport:
    """Write the pixel initialisation of `variant`.

    Args:
        source: a latent model of a known source, or an L2P model of another variant: a file, or a folder of shards.
        target: the file to write.
        variant: a name of `config.VARIANTS`.
        seed: of the initialised weights; the same source and seed give the same file.
        dtype: of all weights; None keeps each copied weight's own and gives the new ones the patch embedder's.
        init: how new weights are made, see `initialise.INITS`; "random" as the published code.
        head_width: factor on the Detailer Head's widths, for models smaller than the published ones.
        layout: of the keys written, "comfy" or "diffusers".
        pairs: of images that the source made, for the init "fitted".
        about: metadata beside what the source says, see `files.about`.
        overwrite: whether an existing target may be replaced.
        progress: called with (bytes done, bytes in all); what it raises stops the conversion.

    Raises:
        CheckpointError: if the source is unsuitable or damaged, or the target cannot be written.
        ValueError: for an unknown variant, init or layout, a number outside its range (see `ranges`), or pairs that
            cannot be fitted to.
    """
    source, target = Path(source), Path(target)
    SEED.check("seed", seed)
    HEAD_WIDTH.check("head_width", head_width)
    check_known("initialisation", init, INITS)
    variant_row(variant)
    checkpoint = open_checkpoint(source)
    source_config = checkpoint.plain_config()
    if isinstance(source_config, PixelConfig) and source_config.variant == variant:
        raise CheckpointError(f"{source} is a {variant} pixel model already: there is nothing to convert.")
    check_exact(checkpoint, key_shapes(source_config))
    refuse_own_source(target, checkpoint.paths)

    config = source_config.with_head(variant, head_width)
    fitted, fit = fitted_embedder(checkpoint, config, pairs) if init == FITTED else ({}, "")
    fates = _fates(checkpoint, source_config, config, f"{init}, seed {seed}", dict.fromkeys(fitted, fit))
    shapes = key_shapes(config)
    specs = _specs(checkpoint, fates, shapes, DTYPE_NAMES[dtype] if dtype else None)
    report = ConversionReport(source, target, variant, seed, _NO_HASH, fates)
    about = _metadata(config, report, init) | inherited(checkpoint.metadata) | dict(about or {})
    with (
        model_file(target, specs.values(), config, about, layout, overwrite) as (writer, places),
        ChunkReader() as reader,
    ):
        new = [specs[key] for key in report.keys("initialised")]
        to_make = sum(nbytes(spec.dtype, spec.shape) for spec in new)
        counter = ByteCounter(checkpoint.bytes_on_disk + to_make, progress)
        copies = _copies(checkpoint, specs, places, report.keys("copied"))
        hashes = [_copy_file(header, copies, reader, writer, counter) for header in checkpoint.files]
        for spec in new:
            known = fitted.get(spec.name)
            chunks = random_values(spec.name, shapes, seed, init) if known is None else [known]
            _write_new(spec, places[spec.name], chunks, writer, counter)
        report = replace(report, source_sha256=_combined(hashes), broken=writer.broken)
        writer.finish(about | {metadata.SOURCE_SHA256: report.source_sha256})
    return report


def check_fits(source: ModelConfig, target: PixelConfig, side: int) -> None:
    """Check that an embedder can be fitted to pairs of patches of a side in pixels.

    Raises:
        ValueError: for an L2P model as the source, and for another patch size.
    """
    if isinstance(source, PixelConfig) or target.patch_size != side:
        raise ValueError(
            "A start fitted to a data set works only from a latent source to the variant 1k: convert the source to 1k, "
            f"train it, and convert the result to {target.variant} without a fit."
        )


def fitted_embedder(
    checkpoint: Checkpoint, target: PixelConfig, pairs: PatchPairs | None
) -> tuple[dict[str, Tensor], str]:
    """Fit the patch embedder of `target` to the checkpoint's own.

    Returns:
        Its weight and bias by their keys, and a clause on the fit.

    Raises:
        ValueError: without pairs, for pairs of another patch or latent space, or too few, and for an L2P model.
    """
    if pairs is None:
        raise ValueError(
            f"A fitted start needs the file {FILE} that Synthesize L2P Dataset leaves beside its images: choose that "
            "data set, or start without a fit."
        )
    source = checkpoint.plain_config()
    check_fits(source, target, pairs.side)
    row = source_of(source)
    if pairs.space[1:] != (source.in_channels, row.latent.patch_size, row.latent.order):
        raise ValueError("The data set's patches are of another latent space: use a data set made by this source.")
    with ChunkReader() as reader:
        weight, bias = (reader.read(checkpoint.tensors[f"{row.embedder}.{name}"]) for name in ("weight", "bias"))
    fit = fit_embedder(pairs, weight, bias)
    return {f"{row.embedder}.weight": fit.weight, f"{row.embedder}.bias": fit.bias}, fit.summary()


def _fates(
    checkpoint: Checkpoint, source: ModelConfig, target: PixelConfig, how: str, fitted: Mapping[str, str]
) -> tuple[Fate, ...]:
    """Every key's fate: first those of the result in its order, then what is left of the source; `how` new keys are
    made, but for those that are `fitted`."""
    held, wanted, row = checkpoint.shapes, key_shapes(target), source_of(source)
    # Published names hold the patch size: an embedder of another one is another layer, bias included.
    other_layer = (f"{row.embedder}.",) if source.patch_size != target.patch_size else ()
    copied = {key for key, shape in wanted.items() if held.get(key) == shape and not key.startswith(other_layer)}
    fates = []
    for key in wanted:
        if key in copied:
            fates.append(Fate(key, "copied", "equal name and shape"))
        elif key in fitted:
            fates.append(Fate(key, "initialised", fitted[key]))
        else:
            fates.append(
                Fate(key, "initialised", f"{how}; the source's has another patch size or shape" if key in held else how)
            )
    for key in held:
        if key not in wanted:
            unused = is_unused(key)
            reason = f"no {row.title} model uses it" if unused else f"a {target.variant} model has no such tensor"
            fates.append(Fate(key, "dropped", reason))
    fates += [Fate(key, "dropped", "outside the diffusion model") for key in checkpoint.outside]
    return tuple(fates)


def _specs(
    checkpoint: Checkpoint, fates: Iterable[Fate], shapes: Mapping[str, tuple[int, ...]], dtype: str | None
) -> dict[str, TensorSpec]:
    """The tensors to write: the copied ones in the order of the source's bytes, which keeps writing sequential."""
    new_dtype = dtype or checkpoint.input_dtype
    copied = [checkpoint.tensors[entry.key] for entry in fates if entry.fate == "copied"]
    copied.sort(key=lambda stored: stored.place)
    specs = [TensorSpec(stored.name, dtype or stored.dtype, stored.shape) for stored in copied]
    specs += [TensorSpec(entry.key, new_dtype, shapes[entry.key]) for entry in fates if entry.fate == "initialised"]
    return {spec.name: spec for spec in specs}


def _copies(
    checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], places: Mapping[str, int], keys: Iterable[str]
) -> dict[Entry, tuple[int, str]]:
    """Where the bytes of these tensors go: the position of each piece, and the dtype there."""
    copies = {}
    for key in keys:
        position, dtype = places[key], specs[key].dtype
        for piece in checkpoint.tensors[key].pieces:
            copies[piece] = position, dtype
            position += (piece.stop - piece.start) // itemsize(piece.dtype) * itemsize(dtype)
    return copies


def _copy_file(
    header: Header,
    copies: Mapping[Entry, tuple[int, str]],
    reader: ChunkReader,
    writer: TensorWriter,
    counter: ByteCounter,
) -> str:
    """Read one file of the source from its first byte to its last, copy what is wanted, and return its SHA-256."""
    digest = hashlib.sha256()
    start = Entry(header.path, "", "U8", (header.data_start,), 0, header.data_start)
    for piece in (start, *header.tensors.values()):
        position, dtype = copies.get(piece, (0, ""))
        size = piece.stop - piece.start
        for chunk in reader.chunks(Stored("", "U8", (size,), (replace(piece, dtype="U8"),))):
            reader.hash(digest, chunk)
            if dtype:
                data = converted(chunk, piece.dtype, dtype)
                writer.write(position, data)
                position += len(data)
            counter.advance(len(chunk))
    reader.finish_hashing()
    return digest.hexdigest()


def _write_new(
    spec: TensorSpec, position: int, chunks: Iterable[Tensor], writer: TensorWriter, counter: ByteCounter
) -> None:
    for values in chunks:
        data = as_bytes(values.to(TORCH_DTYPES[spec.dtype]))
        writer.write(position, data)
        position += len(data)
        counter.advance(len(data))


def _combined(hashes: list[str]) -> str:
    """The hash of a file; for shards, that of their hashes in the order of their names, one a line."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _metadata(config: ModelConfig, report: ConversionReport, init: str) -> dict[str, str]:
    return metadata.describe(
        metadata.PIXEL_INIT,
        config,
        source_sha256=report.source_sha256,
        seed=str(report.seed),
        init=init,
        copied=metadata.grouped_json(report.keys("copied")),
        initialised=metadata.grouped_json(report.keys("initialised")),
    )
