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


class Slot(NamedTuple):
    """A tensor to write, by its ComfyUI key."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@contextmanager
def model_file(
    target: Path,
    slots: Iterable[Slot],
    config: ModelConfig,
    metadata: Mapping[str, str],
    layout: str = "comfy",
    overwrite: bool = False,
) -> Iterator[tuple[TensorWriter, dict[str, int]]]:
    """A writer, and the position in it of every slot; `atomic_file` describes when the file appears.

    A slot's bytes are those of the ComfyUI layout in either layout of the file, because q, k and v are rows of their
    stack. `metadata` is at least as long as the metadata that the writer will be finished with.
    """
    slots = aligned(slots)
    shapes = {slot.name: target_shapes(slot.name, slot.shape, layout, config) for slot in slots}
    room = header_room(
        ((key, slot.dtype, shape) for slot in slots for key, shape in shapes[slot.name].items()), metadata
    )
    size = room + sum(nbytes(slot.dtype, slot.shape) for slot in slots)
    with atomic_file(target, size, overwrite) as file:
        writer = TensorWriter(file, room)
        yield writer, {slot.name: writer.add(shapes[slot.name], slot.dtype) for slot in slots}


def aligned(slots: Iterable[Slot]) -> list[Slot]:
    """Slots with wider elements first, as in the format's own writer, so that every tensor is aligned for any
    reader."""
    return sorted(slots, key=lambda slot: -itemsize(slot.dtype))


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
