"""Safetensors files as dictionaries of tensors under their own names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .atomic import atomic_file
from .safetensors_header import CheckpointError, header_room, read_header, shown
from .tensor_io import DTYPE_NAMES, TORCH_DTYPES, ChunkReader, TensorWriter, as_bytes, joined


def save(
    tensors: Mapping[str, Tensor],
    target: str | Path,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors under their own names as one safetensors file, atomically; in other `dtypes` where these are given.

    Raises:
        CheckpointError: if the target exists and `overwrite` is false, or it cannot be written.
    """
    metadata = {"format": "pt", **(metadata or {})}
    written = {name: tensor.dtype for name, tensor in tensors.items()} | dict(dtypes or {})
    # Among tensors of one dtype the order stays, which sharded ones are gathered in.
    names = sorted(writing_order(tensors), key=lambda name: -written[name].itemsize)
    room = header_room(((name, DTYPE_NAMES[written[name]], tuple(tensors[name].shape)) for name in names), metadata)
    size = room + sum(tensor.numel() * written[name].itemsize for name, tensor in tensors.items())
    with atomic_file(Path(target), size, overwrite) as file:
        writer = TensorWriter(file, room)
        for name in names:
            tensor = tensors[name].detach()
            position = writer.add({name: tuple(tensor.shape)}, DTYPE_NAMES[written[name]])
            writer.write(position, as_bytes(tensor.cpu().to(written[name]).contiguous()))
        writer.finish(metadata)


def writing_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The order in which `save` reads and writes tensors.

    Wider elements come first, as in the format's own writer, so that every tensor is aligned.
    """
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one safetensors file under their own names, and its metadata.

    Raises:
        CheckpointError: if the file cannot be read or has a dtype that torch does not have.
    """
    header = read_header(Path(path))
    tensors: dict[str, Tensor] = {}
    with ChunkReader() as reader:
        for name, entry in header.tensors.items():
            if entry.dtype not in TORCH_DTYPES:
                raise CheckpointError(f"{path}: {shown(name)} is {entry.dtype}, a type that is not supported.")
            tensors[name] = reader.read(joined(name, [(header, entry)]))
    return tensors, header.metadata
