"""A delta on its base in 8 bits: the layers that it keeps stay as they are, with their scales.

The delta recognises its base by hashes of weights, which rounding changes. A file that `quantise` wrote lists these
hashes of its original; a file from another program does not, so its user must confirm that it is the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..checkpoint import Checkpoint
from ..files.quantised import LEAVES, MARKER, OLD_NAMES, LayerSettings, layer_of
from ..files.safetensors_header import CheckpointError
from ..files.tensor_io import ChunkReader, Stored
from .unchanged_tensors import UnchangedTensor, parse_originals

_UNKNOWN = "is quantised and does not state what it was made from"


def taken(base: Checkpoint, unchanged: Mapping[str, UnchangedTensor]) -> tuple[dict[str, Stored], LayerSettings]:
    """What a delta takes from its base, by its keys.

    Returns:
        The tensors: of a plain base in the dtypes that the delta has noted; of a quantised one as they are stored, the
        scales of its layers by the newest names. And these layers' settings, which stand for their markers.
    """
    settings = {layer: values for layer, values in base.layer_settings.items() if f"{layer}.weight" in unchanged}
    tensors: dict[str, Stored] = {}
    for name, entry in unchanged.items():
        stored, layer = base.tensors[name], layer_of(name)
        tensors[name] = stored if base.quantisation else stored.as_dtype(entry.dtype)
        if layer in settings and name == f"{layer}.weight":
            tensors |= _scales(base, layer)
    return tensors, settings


def _scales(base: Checkpoint, layer: str) -> dict[str, Stored]:
    """The tensors beside a quantised weight, by the newest names; sorted, so that files are reproducible."""
    found: dict[str, Stored] = {}
    for leaf in sorted(LEAVES - {MARKER}):
        stored = base.tensors.get(f"{layer}.{leaf}")
        # Like the host: an old input scale of 1 has no effect.
        if stored is not None and not (leaf == "scale_input" and _is_one(stored)):
            name = f"{layer}.{OLD_NAMES.get(leaf, leaf)}"
            found[name] = replace(stored, name=name)
    return found


def _is_one(stored: Stored) -> bool:
    with ChunkReader() as reader:
        return bool((reader.read(stored) == 1).all())


def check_originals(
    base: Checkpoint, delta: str | Path, unchanged: Mapping[str, UnchangedTensor], unchecked: bool
) -> str | None:
    """The first tensor that a quantised base was made from and that is not the one which the delta was made for.

    Args:
        base: quantised.
        delta: its name in the message.
        unchanged: the tensors that the delta takes from its base.
        unchecked: whether to accept a base that does not state what it was made from.

    Raises:
        CheckpointError: if the base does not say so, and may not be taken unchecked.
    """
    originals = parse_originals(base)
    for name, entry in unchanged.items():
        known = originals.get(name)
        if known and known.dtype == entry.dtype:
            if known.digest != entry.digest:
                return name
        elif not unchecked:
            why = f"was quantised from {known.dtype} weights, not {entry.dtype}" if known else _UNKNOWN
            raise CheckpointError(
                f"{base.path} {why}, so whether {delta} was made for it cannot be checked: use the bf16, fp16 or fp32 "
                "file as the base, or allow an unchecked base if you know that it is the right one."
            )
    return None
