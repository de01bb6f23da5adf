"""Deltas: the weights that training changed, for sharing and for merging into their base.

Shallow training leaves over half of the weights unchanged (arXiv 2605.12013 section 3.2). A delta holds the changed
weights, and the dtype, shape and hash of each unchanged one. It therefore merges into any file with the same unchanged
weights, the pixel initialisation or the latent source, in any layout and sharding, and refuses all others. The merged
model equals the trained one bit for bit. Low-rank adapters of the policy "lora" are stored beside the full tensors and
added to the base's weights (see `deltas.low_rank`); the results equal the trained weights up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, check_complete, check_exact, open_checkpoint
from .config import ModelConfig, PixelConfig
from .deltas import low_rank as lora
from .deltas.delta_on_base import open_merged, verify
from .deltas.unchanged_tensors import UnchangedTensor, digest_if_equal, digest_of, parse_unchanged, unchanged_text
from .deltas.writing import write_model
from .files import metadata
from .files.about import inherited
from .files.atomic import check_target
from .files.model_file import refuse_own_source
from .files.quantised import FLOAT_DTYPES
from .files.safetensors_header import CheckpointError, TensorSpec
from .files.tensor_file import new_file
from .files.tensor_io import DTYPE_NAMES, ByteCounter, ChunkReader, ProgressCallback, Stored, copy_tensor
from .model import L2PModel, key_shapes

_INHERITED = (metadata.SOURCE_SHA256, metadata.SEED, metadata.INIT)


@dataclass(frozen=True)
class DeltaReport:
    """Which tensors (ComfyUI keys) were trained and which are the base's.

    `broken` is the first tensor written with values that are not finite numbers.
    """

    target: Path
    trained: tuple[str, ...]
    unchanged: tuple[str, ...]
    broken: str | None = None

    def summary(self) -> str:
        """One line of text for each."""
        parts = {"trained": self.trained, "unchanged from the base": self.unchanged}
        lines = [f"{len(names)} {how}: {metadata.grouped_text(names)}" for how, names in parts.items()]
        lines += [metadata.broken_text(self.broken)] if self.broken else []
        return "\n".join([f"{self.target}", *lines])


def extract(
    trained: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> DeltaReport:
    """Write the delta of a trained L2P model.

    Args:
        trained: the trained model, complete.
        base: the model it was trained from: its pixel initialisation, or the initialisation's latent source.
        target: the file to write.
        dtype: of the delta, such as bfloat16 for half of float32's size: what both models round to is compared, and
            the trained weights are written rounded; None keeps each weight's own.
        about: metadata beside what the two files say, see `files.about`.
        overwrite: whether an existing target may be replaced.
        progress: called with (bytes done, total bytes) of the trained model; an exception from it stops the work.

    Raises:
        CheckpointError: if a file is unsuitable, the two have no tensor in common, or nothing was trained.
    """
    target, new, old = Path(target), open_checkpoint(trained), open_checkpoint(base)
    config = new.pixel_config()
    check_exact(new, key_shapes(config))
    check_exact(old, key_shapes(old.plain_config()))
    if not any(old.shapes.get(name) == shape for name, shape in new.shapes.items()):
        raise CheckpointError(f"{trained} and {base} are models of different sizes: give the base it was trained from.")
    refuse_own_source(target, new.paths + old.paths)
    check_target(target, overwrite)
    if dtype is not None:
        rounded = {name: stored.as_dtype(DTYPE_NAMES[dtype]) for name, stored in new.tensors.items()}
        new = replace(new, tensors=rounded)
    about = _inherited(new.metadata, old.metadata) | dict(about or {})
    counter = ByteCounter(new.nbytes, progress)
    unchanged: dict[str, UnchangedTensor] = {}
    changed: list[Stored] = []
    with ChunkReader() as reader:
        # Compared first, so that disk space is checked for exactly what will be written; read sequentially.
        for stored in sorted((new.tensors[name] for name in key_shapes(config)), key=lambda stored: stored.place):
            digest = digest_if_equal(reader, stored, old.tensors.get(stored.name))
            if digest:
                unchanged[stored.name] = UnchangedTensor(stored.dtype, stored.shape, digest)
                counter.advance(stored.nbytes)
            else:
                changed.append(stored)
        if not changed:
            raise CheckpointError(f"{trained} is identical to {base}: there is nothing to store in a delta.")
        names = _write(target, changed, _describe(config, about, unchanged), overwrite, reader, counter, trained)
    return DeltaReport(target, names, tuple(unchanged))


def save(
    tensors: Mapping[str, Tensor],
    base: str | Path,
    target: str | Path,
    about: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write trained weights, given by ComfyUI keys, as a delta on `base`; all other weights are the base's.

    Adapter matrices, named as in `Trainer.trained`, are written under the names that ComfyUI's LoRA loader expects.
    `about` is further metadata. With a `dtype` the weights are rounded to it; the strength of adapters is not. The
    base is hashed the first time and again only when its files change.

    Raises:
        CheckpointError: if the tensors and the base do not make one L2P model, or the file cannot be written.
    """
    old = open_checkpoint(base)
    check_exact(old, key_shapes(old.plain_config()))
    full = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not lora.is_adapter(name)}
    config = _config_with(old, full)
    expected = key_shapes(config)
    assert full.keys() <= expected.keys(), "tensors that the model does not have"
    unchanged = {
        name: UnchangedTensor(old.tensors[name].dtype, shape, digest_of(old.tensors[name]))
        for name, shape in expected.items()
        if name not in tensors
    }
    adapted = lora.layers_of(name for name in tensors if name not in full)
    assert all(f"{layer}.weight" in unchanged for layer in adapted), "adapters on what is trained in full"
    refuse_own_source(Path(target), old.paths)
    text = _describe(config, _inherited({}, old.metadata), unchanged) | dict(about or {})
    named = lora.in_files(tensors)
    dtypes = {} if dtype is None else {name: dtype for name in named if not name.endswith(lora.ALPHA)}
    checkpoints.save(named, target, text, overwrite, dtypes)


def _config_with(old: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> PixelConfig:
    """The configuration of the model that a base becomes with weights of these shapes, which must be complete."""
    # Where the data lies does not matter here, only the shapes.
    trained = {name: Stored(name, "F32", shape, ()) for name, shape in shapes.items()}
    whole = replace(old, tensors=old.tensors | trained)
    config = whole.pixel_config()
    check_complete(whole, key_shapes(config))
    return config


def merge(
    delta: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    layout: str = "comfy",
    unchecked_base: bool = False,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> DeltaReport:
    """Write the trained model: the delta's tensors and the base's remaining ones, with adapters added.

    Args:
        delta: a file written by `extract` or `save`.
        base: the pixel initialisation or the latent source that it was made for, or that file in fewer bits: its layers
            then stay so.
        target: the file to write.
        layout: of the keys written, "comfy" or "diffusers".
        unchecked_base: see `open_merged`.
        about: metadata beside what the delta says, see `files.about`.
        overwrite: whether an existing target may be replaced.
        progress: called with (bytes done, total bytes); an exception from it stops the work.

    Raises:
        CheckpointError: if the delta was made for another base, or a file is unsuitable or cannot be written.
        ValueError: for an unknown layout.
    """
    merged = open_merged(delta, base, unchecked_base)
    about = {**merged.checkpoint.metadata, **(about or {})}
    broken = write_model(merged, Path(target), about, layout=layout, overwrite=overwrite, progress=progress)
    return DeltaReport(Path(target), merged.trained, merged.untouched, broken)


def cast(
    delta: str | Path,
    target: str | Path,
    dtype: torch.dtype,
    *,
    about: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> tuple[str, ...]:
    """Write a delta in another dtype, for the same base.

    Args:
        delta: a file written by `extract` or `save`.
        target: the file to write.
        dtype: of the trained weights; the strength of low-rank adapters keeps its own.
        about: metadata beside what the delta says, see `files.about`.
        overwrite: whether an existing target may be replaced.
        progress: called with (bytes done, total bytes); an exception from it stops the work.

    Returns:
        The keys of the tensors written.

    Raises:
        CheckpointError: if the delta is damaged or not finite, or the file cannot be written.
    """
    target, old = Path(target), open_checkpoint(delta)
    assert old.is_delta, "only deltas have no whole model to be checked against"
    parse_unchanged(old)
    refuse_own_source(target, old.paths)
    order = [
        stored if name.endswith(lora.ALPHA) else stored.as_dtype(DTYPE_NAMES[dtype])
        for name, stored in old.tensors.items()
    ]
    if any(stored.stored_dtype not in FLOAT_DTYPES for stored in order):
        raise CheckpointError(f"{delta} is damaged: not all of its tensors are floating-point numbers.")
    counter = ByteCounter(sum(stored.nbytes for stored in order), progress)
    with ChunkReader() as reader:
        return _write(target, order, {**old.metadata, **(about or {})}, overwrite, reader, counter, delta)


def load_model(
    delta: str | Path,
    base: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: ProgressCallback | None = None,
    checking: ProgressCallback | None = None,
) -> L2PModel:
    """Load the trained model without writing a merged file; other arguments as `checkpoint.load_model`.

    Args:
        checking: called with (bytes read, total bytes) during the initial check that the base is the right one.

    Raises:
        CheckpointError: as `merge`.
    """
    merged = open_merged(delta, base)
    verify(merged, checking)
    model = checkpoints.load_model(merged.checkpoint, dtype, device, progress)
    with torch.no_grad():
        for layer, adapter in merged.adapters.items():
            weight = model.get_parameter(f"{layer}.weight")
            weight.copy_(adapter.added_to(weight))
    return model


def _write(
    target: Path,
    tensors: Iterable[Stored],
    text: Mapping[str, str],
    overwrite: bool,
    reader: ChunkReader,
    counter: ByteCounter,
    trained: str | Path | None = None,
) -> tuple[str, ...]:
    """Write tensors as one file with the metadata `text`, and return their keys; `trained` is the file that is refused
    if a value is not finite."""
    held = {stored.name: stored for stored in tensors}
    specs = [TensorSpec(stored.name, stored.dtype, stored.shape) for stored in held.values()]
    with new_file(target, specs, text, overwrite) as writer:
        for name, place in writer.places.items():
            copy_tensor(reader, held[name], writer, place)
            if writer.broken and trained:
                raise CheckpointError(
                    f"{trained} is broken: '{name}' has values that are not finite numbers, so its images would be "
                    "black. Use an earlier save of the training, or download the file again."
                )
            counter.advance(held[name].nbytes)
        writer.finish(text)
    return tuple(writer.places)


def _inherited(trained: Mapping[str, str], base: Mapping[str, str]) -> dict[str, str]:
    """Metadata inherited from the files that a delta is made from: source, seed and initialisation, and what they say
    for people."""
    known = {name: text for about in (base, trained) for name, text in about.items() if name in _INHERITED}
    return known | inherited(base) | inherited(trained, same_model=True)


def _describe(
    config: ModelConfig, about: Mapping[str, str], unchanged: Mapping[str, UnchangedTensor]
) -> dict[str, str]:
    return {**metadata.describe(metadata.DELTA, config), **about, metadata.KEPT: unchanged_text(unchanged)}
