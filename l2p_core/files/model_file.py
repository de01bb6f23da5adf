"""A new model file: its tensors, and the space reserved for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ..config import ModelConfig
from ..layouts import target_shapes
from .atomic import atomic_file
from .safetensors_header import SUFFIXES, CheckpointError, header_room, nbytes
from .tensor_io import TensorWriter, itemsize


class TensorSpec(NamedTuple):
    """A tensor to write, by its ComfyUI key."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def model_file(
    target: Path,
    specs: Iterable[TensorSpec],
    config: ModelConfig,
    metadata: Mapping[str, str],
    layout: str = "comfy",
    overwrite: bool = False,
) -> Iterator[tuple[TensorWriter, dict[str, int]]]:
    """A writer, and the position in it of every tensor; `atomic_file` describes when the file appears.

    A tensor's bytes are those of the ComfyUI layout in either layout of the file, because q, k and v are rows of
    their stack. `metadata` is at least as long as the metadata that the writer will be finished with.
    """
    specs = aligned(specs)
    shapes = {spec.name: target_shapes(spec.name, spec.shape, layout, config) for spec in specs}
    room = header_room(
        ((key, spec.dtype, shape) for spec in specs for key, shape in shapes[spec.name].items()), metadata
    )
    size = room + sum(nbytes(spec.dtype, spec.shape) for spec in specs)
    with atomic_file(target, size, overwrite) as file:
        writer = TensorWriter(file, room)
        yield writer, {spec.name: writer.add(shapes[spec.name], spec.dtype) for spec in specs}


def aligned(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors with wider elements first, as in the format's own writer, so that every tensor is aligned for any
    reader."""
    return sorted(specs, key=lambda spec: -itemsize(spec.dtype))


def check_name(target: Path) -> None:
    """Refuse a name that other programs would not recognise as a safetensors file; ComfyUI would not list it.

    Raises:
        CheckpointError: unless the name ends like a safetensors file. Problems of the folder are reported later.
    """
    if target.suffix.lower() not in SUFFIXES and not target.is_dir():
        raise CheckpointError(f"{target.name} is not the name of a safetensors file: end the name in {SUFFIXES[0]}.")


def refuse_own_source(target: Path, sources: Sequence[Path]) -> None:
    """Keep a file from overwriting one of its own sources.

    Raises:
        CheckpointError: if the target is one of the sources.
    """
    if target.exists() and any(os.path.samefile(target, source) for source in sources):
        raise CheckpointError(f"{target} is a source of the new file: choose another name for the result.")
