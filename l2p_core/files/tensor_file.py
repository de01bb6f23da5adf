"""Safetensors files as dictionaries of tensors under their own names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .atomic import atomic_file
from .safetensors_header import CheckpointError, TensorSpec, header_room, nbytes, read_header, shown
from .tensor_io import DTYPE_NAMES, TORCH_DTYPES, ChunkReader, TensorWriter, as_bytes, itemsize, joined


@contextmanager
def new_file(
    target: Path, specs: Iterable[TensorSpec], metadata: Mapping[str, str], overwrite: bool
) -> Iterator[TensorWriter]:
    """A writer of these tensors; `atomic_file` describes when the file appears.

    Wider elements come first, as in the format's own writer, so that every tensor is aligned for any reader. `metadata`
    is at least as long as the metadata that the writer will be finished with.
    """
    specs = sorted(specs, key=lambda spec: -itemsize(spec.dtype))
    room = header_room(specs, metadata)
    size = room + sum(nbytes(spec.dtype, spec.shape) for spec in specs)
    with atomic_file(target, size, overwrite) as file:
        yield TensorWriter(file, specs, room)


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
    names = writing_order(tensors)
    specs = [TensorSpec(name, DTYPE_NAMES[written[name]], tuple(tensors[name].shape)) for name in names]
    with new_file(Path(target), specs, metadata, overwrite) as writer:
        for name, place in writer.places.items():
            writer.write(place, as_bytes(tensors[name].detach().cpu().to(written[name]).contiguous()))
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
            tensors[name] = reader.read(joined(name, [entry]))
    return tensors, header.metadata
