"""Copies single weights from a model's files into a new one: as they are, rounded, or already quantised."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..files.eight_bit_formats import EightBits
from ..files.quantised import MARKER, marker
from ..files.safetensors_header import CheckpointError, TensorSpec
from ..files.tensor_io import STORED_DTYPES, ChunkReader, Stored, TensorWriter, as_bytes, copy_tensor
from ..ops.eight_bit import dequantised
from ..ops.finite import is_finite
from .low_rank import LowRank
from .unchanged_tensors import short_digest

Places = Mapping[str, int]
"""The position of each tensor in the file."""


class Plain:
    """A plain floating-point weight.

    Args:
        stored: where it is.
        dtype: to store it in; by default its own.
        adapter: to be added to it.
        is_hashed: whether the digest is needed.
    """

    def __init__(
        self, stored: Stored, dtype: str | None = None, adapter: LowRank | None = None, is_hashed: bool = True
    ):
        self.stored, self.dtype, self.adapter, self.is_hashed = stored, dtype or stored.dtype, adapter, is_hashed

    def specs(self) -> list[TensorSpec]:
        """The tensors that the file will hold for it."""
        return [TensorSpec(self.stored.name, self.dtype, self.stored.shape)]

    def write(self, reader: ChunkReader, writer: TensorWriter, places: Places) -> str | None:
        """Write it; returns the digest of the source weight, or None if that was quantised or no digest is needed.

        Raises:
            CheckpointError: if it is to be rounded and not finite.
        """
        digest = hashlib.sha256()
        place = places[self.stored.name]
        if self.adapter is None and self.dtype == self.stored.dtype:
            copy_tensor(reader, self.stored, writer, place, digest if self.is_hashed else None)
            return short_digest(digest) if self.is_hashed else None
        weight = reader.read(self.stored)
        reader.hash(digest, as_bytes(weight))
        writer.write(place, as_bytes(_adapted(weight, self.adapter).to(STORED_DTYPES[self.dtype])))
        reader.finish_hashing()
        return short_digest(digest)


class Rounded:
    """A weight (rows, columns), to be stored in 8 bits.

    Args:
        stored: where it is.
        eight_bits: the format.
        adapter: to be added to it before.
        scale: the factors of a weight that is stored in this format already, and is rounded a second time with its
            adapter; None for a plain floating-point weight.
    """

    def __init__(
        self, stored: Stored, eight_bits: EightBits, adapter: LowRank | None = None, scale: Stored | None = None
    ):
        self.stored, self.eight_bits, self.adapter, self.scale = stored, eight_bits, adapter, scale

    def specs(self) -> list[TensorSpec]:
        return self.eight_bits.specs(self.stored.name, self.stored.shape)

    def write(self, reader: ChunkReader, writer: TensorWriter, places: Places) -> str | None:
        digest = hashlib.sha256()
        weight = reader.read(self.stored)
        if self.scale:
            weight = dequantised(weight, reader.read(self.scale), torch.float32)
        else:
            reader.hash(digest, as_bytes(weight))
        rounded = _adapted(weight, self.adapter)
        if not is_finite(rounded):
            raise not_finite(self.stored)
        for key, tensor in self.eight_bits.tensors(self.stored.name, rounded).items():
            writer.write(places[key], as_bytes(tensor.contiguous()))
        reader.finish_hashing()
        return None if self.scale else short_digest(digest)


class Quantised:
    """A weight that is already quantised and stays so.

    Args:
        stored: where it is.
        scales: the tensors beside it.
        settings: the content of its layer's marker.
    """

    def __init__(self, stored: Stored, scales: list[Stored], settings: Mapping[str, object]):
        self.stored, self.scales, self.marker = stored, scales, marker(settings)
        self.marker_key = f"{stored.name.removesuffix('weight')}{MARKER}"

    def specs(self) -> list[TensorSpec]:
        parts = [TensorSpec(part.name, part.dtype, part.shape) for part in (self.stored, *self.scales)]
        return [*parts, TensorSpec(self.marker_key, "U8", tuple(self.marker.shape))]

    def write(self, reader: ChunkReader, writer: TensorWriter, places: Places) -> str | None:
        for part in (self.stored, *self.scales):
            copy_tensor(reader, part, writer, places[part.name])
        writer.write(places[self.marker_key], as_bytes(self.marker))
        return None


WeightWriter = Plain | Rounded | Quantised
"""One weight on its way into a file."""


def not_finite(stored: Stored) -> CheckpointError:
    """The error about a weight with NaN or infinity in it."""
    return CheckpointError(
        f"{stored.pieces[0].path} is broken: '{stored.name}' has values that are not finite numbers, so its images "
        "would be black. Download the file again, or use an earlier save of the training."
    )


def _adapted(weight: Tensor, adapter: LowRank | None) -> Tensor:
    return adapter.added_to(weight) if adapter else weight
