"""A delta combined with its base without writing a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint, check_exact, open_checkpoint
from ..files import metadata
from ..files.quantised import FLOAT_DTYPES
from ..files.safetensors_header import CheckpointError
from ..files.tensor_io import ByteCounter, ChunkReader, ProgressCallback
from ..model import key_shapes
from . import low_rank as lora
from .low_rank import LowRank
from .unchanged_tensors import UnchangedTensor, digest_of, parse_unchanged


@dataclass(frozen=True)
class Merged:
    """A delta on its base; nothing has been read yet except the adapters.

    Attributes:
        checkpoint: the trained model in two places, without the adapters in its adapted weights.
        kept: the tensors of the base.
        adapters: to be added, by the layer whose weight they adapt.
    """

    checkpoint: Checkpoint
    kept: dict[str, UnchangedTensor]
    adapters: dict[str, LowRank]

    @property
    def trained(self) -> tuple[str, ...]:
        """The tensors that training changed."""
        return tuple(name for name in self.checkpoint.tensors if name not in self.kept or self.adapter(name))

    @property
    def untouched(self) -> tuple[str, ...]:
        """The unchanged tensors of the base."""
        return tuple(name for name in self.kept if not self.adapter(name))

    def adapter(self, name: str) -> LowRank | None:
        """The adapter of a weight, if any."""
        return self.adapters.get(name.removesuffix(".weight"))


def open_merged(delta: str | Path, base: str | Path) -> Merged:
    """Open a delta and its base, whose content is not yet checked; see `verify`.

    Raises:
        CheckpointError: if the delta is not one or is damaged, or the base lacks a tensor.
    """
    new, old = open_checkpoint(delta), open_checkpoint(base)
    if not new.is_delta:
        raise CheckpointError(f"{delta} is not an L2P delta: give a file that was saved as a delta.")
    check_exact(old, key_shapes(old.plain_config()))
    kept = parse_unchanged(new)
    for name, entry in kept.items():
        if name not in old.tensors:
            raise other_base(delta, base, f"it has no '{name}'")
        if old.tensors[name].shape != entry.shape:
            raise other_base(delta, base, f"its '{name}' has the shape {old.tensors[name].shape}, not {entry.shape}")
    adapters = _read_adapters(new, kept)
    full = {name: stored for name, stored in new.tensors.items() if not lora.is_adapter(name)}
    tensors = {name: old.tensors[name].as_dtype(entry.dtype) for name, entry in kept.items()} | full
    adapted = [f"{layer}.weight" for layer in adapters]
    about = {name: value for name, value in new.metadata.items() if name != metadata.KEPT}
    about |= {
        metadata.KIND: metadata.MERGED,
        metadata.COPIED: metadata.grouped_json(kept.keys() - set(adapted)),
        metadata.TRAINED: metadata.grouped_json([*full, *adapted]),
    }
    checkpoint = Checkpoint(new.path, (*old.files, *new.files), tensors, (), about)
    check_exact(checkpoint, key_shapes(checkpoint.pixel_config()))
    return Merged(checkpoint, kept, adapters)


def verify(merged: Merged, progress: ProgressCallback | None = None) -> None:
    """Check that the base's tensors are those that the delta was made for.

    Args:
        progress: called with (bytes done, total bytes); an exception from it stops the work.

    Raises:
        CheckpointError: if they are not.
    """
    held = {name: merged.checkpoint.tensors[name] for name in merged.kept}
    counter = ByteCounter(sum(stored.nbytes for stored in held.values()), progress)
    for name, stored in held.items():
        if digest_of(stored) != merged.kept[name].digest:
            raise other_base(merged.checkpoint.path, stored.pieces[0].path, f"its '{name}' has other values")
        counter.advance(stored.nbytes)


def _read_adapters(delta: Checkpoint, kept: Mapping[str, UnchangedTensor]) -> dict[str, LowRank]:
    """Load the delta's adapters; they are small."""
    parts = {name: stored for name, stored in delta.tensors.items() if lora.is_adapter(name)}
    if any(stored.dtype not in FLOAT_DTYPES for stored in parts.values()):
        raise CheckpointError(f"{delta.path} is damaged: its low-rank adapters are not floating-point numbers.")
    try:
        with ChunkReader() as reader:
            adapters = lora.paired({name: reader.read(stored) for name, stored in parts.items()})
    except ValueError as error:
        raise CheckpointError(f"{delta.path} is damaged: {error}.") from error
    for layer, adapter in adapters.items():
        if f"{layer}.weight" not in kept:
            raise CheckpointError(f"{delta.path} is damaged: it adapts '{layer}', which it does not keep.")
        if kept[f"{layer}.weight"].shape != (len(adapter.up), adapter.down.shape[1]):
            raise CheckpointError(f"{delta.path} is damaged: the adapter of '{layer}' does not fit its weight.")
    return adapters


def other_base(delta: str | Path, base: str | Path, reason: str) -> CheckpointError:
    """The error for a base that the delta was not made for."""
    return CheckpointError(f"{delta} was made for another base than {base}: {reason}.")
