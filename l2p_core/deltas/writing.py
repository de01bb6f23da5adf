"""Writes a model, whole or a delta on its base, as one new file: as it is, or with its weights rounded on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..files import metadata
from ..files.eight_bit_formats import EightBits, adaptable
from ..files.model_file import model_file, refuse_own_source
from ..files.quantised import METADATA, layer_of
from ..files.tensor_io import ByteCounter, ChunkReader, ProgressCallback, Stored
from ..model import key_shapes
from .delta_on_base import Merged, other_base
from .unchanged_tensors import DIGEST_LENGTH, UnchangedTensor, unchanged_text
from .weight_writers import Plain, Quantised, Rounded, WeightWriter, not_finite


@dataclass(frozen=True)
class Rounding:
    """How the weights of a new file are rounded.

    Attributes:
        layers: the keys of weights to store in 8 bits.
        eight_bits: in which format; None if there are none.
        dtype: of all other weights. Layers that are already quantised in the base stay so.
    """

    layers: frozenset[str]
    eight_bits: EightBits | None
    dtype: str


def write_model(
    merged: Merged,
    target: Path,
    about: Mapping[str, str],
    rounding: Rounding | None = None,
    *,
    layout: str = "comfy",
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> str | None:
    """Write the model; with a rounding, its metadata list the tensors that were rounded (`metadata.ORIGINALS`).

    Returns:
        The first tensor with NaN or infinity in it, if any; never with a rounding, which refuses it.

    Raises:
        CheckpointError: if the base is not the delta's, a weight to be rounded is not finite, or the target is one of
            the sources or cannot be written.
        ValueError: for a layout that does not exist, or that quantised layers do not have.
    """
    checkpoint = merged.checkpoint
    config = checkpoint.config()
    if layout != "comfy" and merged.kept_layers:
        raise ValueError(
            "A quantised model can be written only in the ComfyUI layout, in which q, k and v share their scales."
        )
    refuse_own_source(target, checkpoint.paths)
    weights = [_weight(checkpoint.tensors[name], merged, rounding) for name in key_shapes(config)]
    weights.sort(key=lambda weight: weight.stored.place)
    about = {name: text for name, text in about.items() if name != METADATA}  # every layer gets its own marker
    longest = about
    if rounding:
        unknown = {weight.stored.name: _original(weight.stored, "0" * DIGEST_LENGTH) for weight in weights}
        longest = _with_originals(about, unknown)
    specs = [spec for weight in weights for spec in weight.specs()]
    counter = ByteCounter(sum(weight.stored.nbytes for weight in weights), progress)
    originals: dict[str, UnchangedTensor] = {}
    expected = {} if merged.is_quantised else merged.unchanged
    with (
        model_file(target, specs, config, longest, layout, overwrite) as (writer, places),
        ChunkReader() as reader,
    ):
        for weight in weights:
            name = weight.stored.name
            digest = weight.write(reader, writer, places)
            if rounding and writer.broken:
                raise not_finite(weight.stored)
            if digest and name in expected and digest != expected[name].digest:
                base = weight.stored.pieces[0].path
                raise other_base(checkpoint.path, base, f"its '{name}' has other values")
            if digest and not merged.adapter(name):
                originals[name] = _original(weight.stored, digest)
            counter.advance(weight.stored.nbytes)
        writer.finish(_with_originals(about, originals) if rounding else about)
    return writer.broken


def _weight(stored: Stored, merged: Merged, rounding: Rounding | None) -> WeightWriter:
    """The writer for a weight."""
    layer, adapter = layer_of(stored.name), merged.adapter(stored.name)
    settings = merged.kept_layers.get(layer) if stored.name == f"{layer}.weight" else None
    if settings is None:
        if rounding and rounding.eight_bits and stored.name in rounding.layers:
            return Rounded(stored, rounding.eight_bits, adapter)
        is_hashed = rounding is not None or stored.name in merged.unchanged
        return Plain(stored, rounding.dtype if rounding else None, adapter, is_hashed)
    if adapter is None:
        return Quantised(stored, merged.scales(layer), settings)
    eight_bits = adaptable(stored.pieces[0].path, layer, settings)
    return Rounded(stored, eight_bits, adapter, merged.checkpoint.tensors[f"{layer}.weight_scale"])


def _original(stored: Stored, digest: str) -> UnchangedTensor:
    return UnchangedTensor(stored.dtype, stored.shape, digest)


def _with_originals(about: Mapping[str, str], originals: Mapping[str, UnchangedTensor]) -> dict[str, str]:
    return {**about, metadata.ORIGINALS: unchanged_text(dict(sorted(originals.items())))}
