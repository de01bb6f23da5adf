"""The formats that quantised files are written in: two of ComfyUI's own, which its loaders read without this pack.

Files in these formats, from this pack or others, can also be read outside ComfyUI; files in its other formats cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..ops import eight_bit
from .quantised import FLOAT_DTYPES, MARKER, LayerSettings, layer_of, marker
from .safetensors_header import CheckpointError, TensorSpec
from .tensor_io import TORCH_DTYPES, ChunkReader, Stored

_SCALES = ("weight_scale", "scale_weight")
"""The names of a weight's factors, the older one last."""


@dataclass(frozen=True)
class EightBits:
    """A format of linear layers.

    Attributes:
        dtype: of the stored weight.
        settings: the content of a layer's marker.
        by_row: whether every row has its own factor.
        rounded: turns a weight (rows, columns) into elements and factors, () or (rows, 1).
    """

    dtype: str
    settings: Mapping[str, object]
    by_row: bool
    rounded: Callable[[Tensor], tuple[Tensor, Tensor]]

    def specs(self, key: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        """The tensors that a file holds for the layer whose weight has this key and shape; `tensors` returns their
        values."""
        layer = layer_of(key)
        return [
            TensorSpec(key, self.dtype, shape),
            TensorSpec(f"{layer}.weight_scale", "F32", (shape[0], 1) if self.by_row else ()),
            TensorSpec(f"{layer}.{MARKER}", "U8", tuple(marker(self.settings).shape)),
        ]

    def tensors(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        """The layer's tensors, by their keys."""
        elements, scale = self.rounded(weight)
        layer = layer_of(key)
        return {key: elements, f"{layer}.weight_scale": scale, f"{layer}.{MARKER}": marker(self.settings)}


EIGHT_BITS = {
    # Weights are widened for the product: rounding activations to float8 too would cost more than rounding the weights.
    "float8_e4m3fn": EightBits(
        "F8_E4M3",
        {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
        by_row=False,
        rounded=partial(eight_bit.quantised, by_row=False),
    ),
    "int8_tensorwise": EightBits("I8", {"format": "int8_tensorwise"}, by_row=True, rounded=eight_bit.integers),
}
"""The formats by the host's names."""


def simple_format(settings: Mapping[str, object]) -> EightBits | None:
    """The format that a layer's marker names, if it is one of these and the weight is simply elements times factors;
    ComfyUI also reads rotated weights (`convrot`)."""
    row = EIGHT_BITS.get(str(settings.get("format")))
    params = settings.get("params")
    rotated = settings.get("convrot") or (isinstance(params, Mapping) and params.get("convrot"))
    return replace(row, settings=settings) if row and not rotated else None


def adaptable(path: Path | str, layer: str, settings: Mapping[str, object]) -> EightBits:
    """The format of a layer that a low-rank adapter is to be added to.

    Raises:
        CheckpointError: if only ComfyUI reads it.
    """
    eight_bits = simple_format(settings)
    if eight_bits is None:
        raise CheckpointError(
            f"A low-rank adapter cannot be added to '{layer}' of {path}, which is quantised as {settings['format']}: "
            "use the bf16, fp16 or fp32 file as the base."
        )
    return eight_bits


def check_readable(path: Path | str, quantisation: str | None, settings: LayerSettings) -> None:
    """Refuse a quantised file whose weights only ComfyUI can read.

    Args:
        path: its name in the message.
        quantisation: the format of its weights, None for plain floating-point weights.
        settings: of its quantised layers.

    Raises:
        CheckpointError: naming its format.
    """
    if quantisation and not (settings and all(map(simple_format, settings.values()))):
        raise CheckpointError(
            f"{path} is quantised ({quantisation}). ComfyUI can sample from it, but of such formats only "
            f"{' and '.join(EIGHT_BITS)} are read here: use the bf16, fp16 or fp32 file of the same model."
        )


def read_weight(reader: ChunkReader, tensors: Mapping[str, Stored], key: str, dtype: str) -> Tensor:
    """A weight as `dtype`, dequantised if its layer is in one of these formats."""
    stored = tensors[key]
    if stored.stored_dtype in FLOAT_DTYPES:
        return reader.read(stored.as_dtype(dtype))
    layer = layer_of(key)
    scale = next(tensors[name] for leaf in _SCALES if (name := f"{layer}.{leaf}") in tensors)
    return eight_bit.dequantised(reader.read(stored), reader.read(scale), TORCH_DTYPES[dtype])
