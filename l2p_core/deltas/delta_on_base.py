"""A delta combined with its base without writing a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint import Checkpoint, check_exact, open_checkpoint
from ..files import metadata
from ..files.about import ARCHITECTURE, inherited
from ..files.quantised import FLOAT_DTYPES, LEAVES, METADATA, LayerSettings, layer_of, leaf_of, settings_text
from ..files.safetensors_header import CheckpointError
from ..files.tensor_io import ByteCounter, ChunkReader, ProgressCallback, Stored
from ..model import key_shapes
from . import low_rank as lora
from .low_rank import LowRank
from .quantised_base import check_originals, taken
from .unchanged_tensors import UnchangedTensor, digest_of, parse_unchanged


@dataclass(frozen=True)
class Merged:
    """A delta on its base; nothing has been read yet except the adapters.

    Attributes:
        checkpoint: the trained model in two places, without the adapters in its adapted weights.
        unchanged: the tensors of the base.
        adapters: to be added, by the layer whose weight they adapt.
        kept_layers: layers that are quantised in the base and stay so.
        is_quantised: whether the base has such layers; its tensors then cannot be compared with the delta's hashes.
    """

    checkpoint: Checkpoint
    unchanged: dict[str, UnchangedTensor]
    adapters: dict[str, LowRank]
    kept_layers: LayerSettings = field(default_factory=dict)
    is_quantised: bool = False

    @property
    def trained(self) -> tuple[str, ...]:
        """The tensors that training changed."""
        tensors = [name for name in self.checkpoint.tensors if name not in self.unchanged or self.adapter(name)]
        return tuple(name for name in tensors if layer_of(name) not in self.kept_layers or leaf_of(name) not in LEAVES)

    @property
    def untouched(self) -> tuple[str, ...]:
        """The unchanged tensors of the base."""
        return tuple(name for name in self.unchanged if not self.adapter(name))

    def scales(self, layer: str) -> list[Stored]:
        """The tensors beside the weight of a layer that is quantised in the base."""
        tensors = self.checkpoint.tensors
        return [tensors[key] for leaf in sorted(LEAVES) if (key := f"{layer}.{leaf}") in tensors]

    def adapter(self, name: str) -> LowRank | None:
        """The adapter of a weight, if any."""
        return self.adapters.get(name.removesuffix(".weight"))


def open_merged(delta: str | Path, base: str | Path, unchecked_base: bool = False) -> Merged:
    """Open a delta and its base, whose content is not yet checked; see `verify`.

    Args:
        delta: a file of trained weights.
        base: the file it was made for, or that file in 8 bits. A file that `quantise` wrote states what it was made
            from.
        unchecked_base: whether to accept a quantised base that does not state what it was made from.

    Raises:
        CheckpointError: if the delta is not one or is damaged, or the base lacks a tensor or is not known to be right.
    """
    new, old = open_checkpoint(delta), open_checkpoint(base)
    if not new.is_delta:
        raise CheckpointError(f"{delta} is not an L2P delta: give a file that was saved as a delta.")
    shapes = key_shapes(old.config())
    check_exact(old, shapes)
    unchanged = parse_unchanged(new)
    for name, entry in unchanged.items():
        if name not in shapes:
            raise other_base(delta, base, f"it has no '{name}'")
        if shapes[name] != entry.shape:
            raise other_base(delta, base, f"its '{name}' has the shape {shapes[name]}, not {entry.shape}")
    if old.quantisation:
        wrong = check_originals(old, delta, unchanged, unchecked_base)
        if wrong:
            raise other_base(delta, base, f"its '{wrong}' was made from other values")
    of_base, kept_layers = taken(old, unchanged)
    adapters = _read_adapters(new, unchanged)
    full = {name: stored for name, stored in new.tensors.items() if not lora.is_adapter(name)}
    tensors = of_base | full
    adapted = [f"{layer}.weight" for layer in adapters]
    said = {name: value for name, value in new.metadata.items() if name not in (metadata.KEPT, ARCHITECTURE)}
    about = inherited(old.metadata) | said
    about |= {METADATA: settings_text(kept_layers)} if kept_layers else {}
    about |= {
        metadata.KIND: metadata.MERGED,
        metadata.COPIED: metadata.grouped_json(unchanged.keys() - set(adapted)),
        metadata.TRAINED: metadata.grouped_json([*full, *adapted]),
    }
    checkpoint = Checkpoint(new.path, (*old.files, *new.files), tensors, (), about)
    config = checkpoint.pixel_config(plain=False)
    check_exact(checkpoint, key_shapes(config))
    checkpoint.metadata.update({**metadata.modelspec(config), **checkpoint.metadata})
    return Merged(checkpoint, unchanged, adapters, kept_layers, is_quantised=old.quantisation is not None)


def verify(merged: Merged, progress: ProgressCallback | None = None) -> None:
    """Check that the base's tensors are those that the delta was made for; `open_merged` has checked a quantised base.

    Args:
        progress: called with (bytes done, total bytes); an exception from it stops the work.

    Raises:
        CheckpointError: if they are not.
    """
    if merged.is_quantised:
        return
    held = {name: merged.checkpoint.tensors[name] for name in merged.unchanged}
    counter = ByteCounter(sum(stored.nbytes for stored in held.values()), progress)
    for name, stored in held.items():
        if digest_of(stored) != merged.unchanged[name].digest:
            raise other_base(merged.checkpoint.path, stored.pieces[0].path, f"its '{name}' has other values")
        counter.advance(stored.nbytes)


def _read_adapters(delta: Checkpoint, unchanged: Mapping[str, UnchangedTensor]) -> dict[str, LowRank]:
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
        if f"{layer}.weight" not in unchanged:
            raise CheckpointError(f"{delta.path} is damaged: it adapts '{layer}', which is not a layer of its base.")
        if unchanged[f"{layer}.weight"].shape != (len(adapter.up), adapter.down.shape[1]):
            raise CheckpointError(f"{delta.path} is damaged: the adapter of '{layer}' does not fit its weight.")
    return adapters


def other_base(delta: str | Path, base: str | Path, reason: str) -> CheckpointError:
    """The error for a base that the delta was not made for."""
    return CheckpointError(
        f"{delta} was made for another base than {base}: {reason}. Choose the base that it was made for."
    )
