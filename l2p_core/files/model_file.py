"""A new model file: its tensors, and the space reserved for each."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..config import ModelConfig
from ..layouts import target_shapes
from .safetensors_header import SUFFIXES, CheckpointError, TensorSpec
from .tensor_file import new_file
from .tensor_io import TensorWriter


@contextmanager
def model_file(
    target: Path,
    specs: Collection[TensorSpec],
    config: ModelConfig,
    metadata: Mapping[str, str],
    layout: str = "comfy",
    overwrite: bool = False,
) -> Iterator[tuple[TensorWriter, dict[str, int]]]:
    """`new_file` in a layout, and the position in it of every tensor, by its ComfyUI key.

    A tensor's bytes are those of the ComfyUI layout in either layout of the file, because q, k and v are rows of
    their stack.
    """
    shapes = {spec.name: target_shapes(spec.name, spec.shape, layout, config) for spec in specs}
    written = [TensorSpec(key, spec.dtype, shape) for spec in specs for key, shape in shapes[spec.name].items()]
    with new_file(target, written, metadata, overwrite) as writer:
        yield writer, {name: writer.places[next(iter(keys))] for name, keys in shapes.items()}


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
