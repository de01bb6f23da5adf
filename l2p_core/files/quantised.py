"""Quantised weights: which formats ComfyUI reads, and what each needs beside its weights.

A quantised linear layer keeps its scales under its own name (``X.weight_scale``) and says its format in a marker: JSON
in ``X.comfy_quant``, the header's ``_quantization_metadata``, or the older ``scaled_fp8`` beside ``X.scale_weight``.
Formats and names are those of comfy/quant_ops.py and comfy/ops.py (`_load_quantized_module`). The host uses a weight
unscaled if its scale is missing, and only logs a scale that belongs to nothing, so both are checked here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import COMFY_PREFIX
from ..sources.recognition import nearest_source
from ..sources.source import Source
from .recognise import ATTENTION_SETTING
from .safetensors_header import CheckpointError, parse_json, shown
from .tensor_io import ChunkReader, Stored, as_bytes

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
FLOAT8_FORMATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

MARKER = "comfy_quant"
OLD_MARKER = "scaled_fp8"
METADATA = "_quantization_metadata"
OLD_NAMES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""The older spelling of scales, {old: new}; comfy/utils.py, convert_old_quants."""

_MAX_MARKER_BYTES = 1 << 16


@dataclass(frozen=True)
class Format:
    """How a layer's weight (N, K) is stored.

    Attributes:
        dtypes: of the stored weight.
        scales: tensors beside it, without which its values have no meaning.
        optional: tensors that may be beside it.
        shared: tensors that either all layers of a file have beside their weights, or no layer.
        packed: elements that a stored value holds, along K.
        block: N and K are filled up to multiples of this.
        scale_sizes: how many elements `weight_scale` has, "1", or "1 or N"; None where blocks have their own.
    """

    dtypes: tuple[str, ...]
    scales: tuple[str, ...]
    optional: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    packed: int = 1
    block: int = 1
    scale_sizes: str | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """All tensors that may be beside the weight."""
        return *self.scales, *self.optional, *self.shared

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape in the file of a weight (N, K)."""
        rows, columns = (-(-side // self.block) * self.block for side in shape)
        return rows, columns // self.packed


FORMATS = {
    "float8_e4m3fn": Format(("F8_E4M3",), ("weight_scale",), ("input_scale",), scale_sizes="1"),
    "float8_e5m2": Format(("F8_E5M2",), ("weight_scale",), ("input_scale",), scale_sizes="1"),
    "mxfp8": Format(("F8_E4M3",), ("weight_scale",), ("input_scale",), block=32),
    "nvfp4": Format(
        ("U8",), ("weight_scale", "weight_scale_2"), ("input_scale", "pre_quant_scale"), packed=2, block=16
    ),
    "int8_tensorwise": Format(("I8",), ("weight_scale",), scale_sizes="1 or N"),
    "convrot_w4a4": Format(("I8",), ("weight_scale",), packed=2),
    "asym_w4a8_int8": Format(("I8",), ("weight_s_rel", "weight_s_channel"), shared=("weight_codebook",), packed=2),
    # Not in 0.33: newer hosts read it.
    "awq_w4a16": Format(("I8", "U8"), ("weight_scale", "weight_zeros"), ("pre_quant_scale",), packed=2),
}

LEAVES = frozenset({MARKER, *OLD_NAMES, *(name for row in FORMATS.values() for name in row.leaves)})
"""The endings of the keys that quantised layers have beside `weight` and `bias`."""

# Scales of other programs' files, which the host does not read.
_FOREIGN_LEAVES = frozenset({"weight_scale_inv", "scale", "qweight", "qzeros", "scales", "absmax", "quant_map", "SCB"})

LayerSettings = dict[str, dict[str, Any]]
"""{layer: what its marker says}, with the format under "format"; layers by their ComfyUI names."""


def is_quantisation_key(key: str) -> bool:
    """Whether a key holds the scales or the format of a quantised layer."""
    return key == OLD_MARKER or leaf_of(key) in LEAVES | _FOREIGN_LEAVES


def layer_settings(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> LayerSettings:
    """The quantised layers of a file and the format of each, however the file states it.

    Raises:
        CheckpointError: if what it says is not valid.
    """
    found: LayerSettings = {}
    with ChunkReader() as reader:
        for key, stored in tensors.items():
            if leaf_of(key) == MARKER:
                is_marker = stored.dtype == "U8" and stored.nbytes <= _MAX_MARKER_BYTES
                found[layer_of(key)] = read_marker(path, key, reader.read(stored) if is_marker else None)
    if METADATA in metadata:
        found |= _from_metadata(path, metadata[METADATA], nearest_source(tensors))
    return found | unmarked_settings(tensors, found)


def unmarked_settings(tensors: Mapping[str, Stored], marked: Collection[str]) -> LayerSettings:
    """Float8 layers with one scale and no marker: in the older spelling, or with their marker lost."""
    found: LayerSettings = {}
    # An old marker of two elements asks for exact products.
    exact = OLD_MARKER not in tensors or tensors[OLD_MARKER].numel == 2
    products = {"full_precision_matrix_mult": True} if exact else {}
    for key, scale in tensors.items():
        weight = tensors.get(f"{layer_of(key)}.weight")
        if weight is None or leaf_of(key) not in ("scale_weight", "weight_scale") or layer_of(key) in marked:
            continue
        if weight.stored_dtype in FLOAT8_FORMATS and scale.numel == 1:
            found[layer_of(key)] = {"format": FLOAT8_FORMATS[weight.stored_dtype], **products}
    return found


def formats(settings: LayerSettings) -> dict[str, str]:
    """{layer: the name of its format}."""
    return {layer: str(values.get("format")) for layer, values in settings.items()}


def summary(tensors: Mapping[str, Stored], settings: LayerSettings) -> str | None:
    """The formats of a quantised file in a few words, such as "nvfp4"; None for plain floating-point numbers."""
    if settings:
        return " and ".join(sorted(set(formats(settings).values())))
    for stored in tensors.values():
        if stored.stored_dtype in FLOAT8_FORMATS:
            return f"{FLOAT8_FORMATS[stored.stored_dtype]} without scales"
    if any(is_quantisation_key(key) for key in tensors):
        return "in a format that it does not name"
    weights = [stored for key, stored in tensors.items() if not key.endswith(ATTENTION_SETTING)]
    others = {piece.dtype for stored in weights for piece in stored.pieces} - {*FLOAT_DTYPES}
    return f"{min(others)} without scales" if others else None


def unpacked(shapes: Mapping[str, tuple[int, ...]], settings: LayerSettings) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's weights, padded as stored; a stored value may hold several elements."""
    result = dict(shapes)
    for layer, name in formats(settings).items():
        key = f"{layer}.weight"
        if name in FORMATS and len(result.get(key, ())) == 2:
            rows, columns = result[key]
            result[key] = rows, columns * FORMATS[name].packed
    return result


def check_layers(
    path: Path | str, tensors: Mapping[str, Stored], settings: LayerSettings, expected: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Check the quantised layers of a file against their formats.

    Returns:
        The keys that are accounted for: the layers' weights, and what lies beside them.

    Raises:
        CheckpointError: for a layer that the model does not have, a scale that is missing or belongs to nothing, and
            weights of another type or shape than their format has.
    """
    _refuse_parts(path, tensors, settings)
    accounted = {OLD_MARKER}
    for layer, name in formats(settings).items():
        accounted |= _check_layer(path, layer, name, tensors, expected)
        for leaf in FORMATS[name].shared:
            others = [other for other, its_name in formats(settings).items() if its_name == name]
            if f"{layer}.{leaf}" not in tensors and any(f"{other}.{leaf}" in tensors for other in others):
                raise CheckpointError(f"{path} is incomplete: '{layer}.{leaf}' is missing, which other layers have.")
    # Where some layers have scales, 8-bit weights without one have lost theirs.
    scaled = bool(settings) or OLD_MARKER in tensors
    for key, stored in tensors.items():
        if key in accounted or key == OLD_MARKER:
            continue
        if is_quantisation_key(key):
            raise CheckpointError(f"{path}: {shown(key)} does not belong to a layer of that format: {_ADVICE}")
        dtype = stored.stored_dtype
        if dtype not in FLOAT_DTYPES and (scaled or dtype not in FLOAT8_FORMATS) and key in expected:
            raise CheckpointError(f"{path}: {shown(key)} is {dtype}, but has no scale beside it: {_ADVICE}")
    return accounted


_ADVICE = "the file is damaged or made by an unknown program; download it again, or use the bf16, fp16 or fp32 file."


def _refuse_parts(path: Path | str, tensors: Mapping[str, Stored], settings: LayerSettings) -> None:
    """Refuse scales and markers of q, k and v before anything else, because other errors follow from them."""
    layout = nearest_source(tensors).layout
    for layer in [*settings, *(layer_of(key) for key in tensors if is_quantisation_key(key))]:
        if layout.to_comfy(f"{layer}.weight")[1] is not None:
            raise CheckpointError(
                f"{path} has q, k and v of its attention quantised separately ({shown(layer)}), but ComfyUI keeps them "
                "in one tensor: use a file that was quantised in the ComfyUI layout, or the bf16, fp16 or fp32 file."
            )


def _check_layer(
    path: Path | str, layer: str, name: str, tensors: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """The keys of one layer, which must match its format."""
    weight = f"{layer}.weight"
    if name not in FORMATS:
        raise CheckpointError(
            f"{path}: {shown(layer)} is quantised as {shown(name)}, an unknown format (known: "
            f"{', '.join(FORMATS)}): update this pack, or use the bf16, fp16 or fp32 file."
        )
    if len(expected.get(weight, ())) != 2 or weight not in tensors:
        raise CheckpointError(
            f"{path}: {shown(layer)} is marked as quantised, but this model has no such linear layer: {_ADVICE}"
        )
    row, stored, shape = FORMATS[name], tensors[weight], expected[weight]
    if stored.stored_dtype not in row.dtypes or stored.shape != row.stored_shape(shape):
        raise CheckpointError(
            f"{path}: {shown(weight)} is {stored.stored_dtype} of the shape {stored.shape}, but {row.dtypes[0]} of "
            f"{row.stored_shape(shape)} was expected of {name}: {_ADVICE}"
        )
    beside = {key: leaf for leaf in LEAVES if (key := f"{layer}.{leaf}") in tensors}
    scales = {key: OLD_NAMES.get(leaf, leaf) for key, leaf in beside.items() if leaf != MARKER}
    missing = [scale for scale in row.scales if scale not in scales.values()]
    if missing:
        raise CheckpointError(f"{path} is incomplete: '{layer}.{missing[0]}' is missing, the scale of {name} weights.")
    given = Counter(scales.values())
    sizes = (1, shape[0]) if row.scale_sizes == "1 or N" else (1,)
    for key, scale in scales.items():
        if scale not in row.leaves or given[scale] > 1:
            raise CheckpointError(f"{path}: {shown(key)} does not belong to {name} weights: {_ADVICE}")
        numel = tensors[key].numel
        if scale == "weight_scale" and row.scale_sizes and numel not in sizes:
            raise CheckpointError(f"{path}: {shown(key)} has {numel} elements, not {row.scale_sizes}.")
    return {weight, *beside}


def read_marker(path: Path | str, name: str, content: Tensor | None) -> dict[str, Any]:
    """What a layer's marker says.

    Raises:
        CheckpointError: if that is not a format.
    """
    try:
        text = "" if content is None else bytes(as_bytes(content)).decode("utf-8")
        values = parse_json(text, fractions=True)
    except ValueError:
        values = None
    return _checked(path, name, values)


def _from_metadata(path: Path, text: str, source: Source) -> LayerSettings:
    try:
        layers = parse_json(text, fractions=True)["layers"]
        named = {_comfy_layer(layer, source): _checked(path, layer, values) for layer, values in layers.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged: its metadata {METADATA!r} cannot be read.") from error
    return named


def _checked(path: Path | str, name: str, values: object) -> dict[str, Any]:
    if not isinstance(values, dict) or not isinstance(values.get("format"), str):
        raise CheckpointError(f"{path} is damaged: {shown(name)} does not say how its layer is quantised.")
    return values


def settings_text(settings: LayerSettings) -> str:
    """The layers and their settings as the header may hold them, under `METADATA`."""
    return json.dumps({"format_version": "1.0", "layers": settings}, separators=(",", ":"))


def marker(values: Mapping[str, Any]) -> Tensor:
    """A layer's settings as the tensor that marks it."""
    return torch.tensor(list(json.dumps(values).encode("utf-8")), dtype=torch.uint8)


def _comfy_layer(layer: str, source: Source) -> str:
    return layer_of(source.layout.renamed(f"{layer.removeprefix(COMFY_PREFIX)}.{MARKER}"))


def layer_of(key: str) -> str:
    """ "layers.0.attention.out" of "layers.0.attention.out.weight_scale"."""
    return key.rpartition(".")[0]


def leaf_of(key: str) -> str:
    """ "weight_scale" of "layers.0.attention.out.weight_scale"."""
    return key.rpartition(".")[2]
