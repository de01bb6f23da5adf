"""A training run on disk: all tensors that the next step depends on, and the settings of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from ..distributed.sharding import fill
from ..files.metadata import KIND as KIND_KEY
from ..files.safetensors_header import CheckpointError, Header, read_header, shown
from ..files.tensor_file import save as save_tensors
from ..files.tensor_io import TORCH_DTYPES, ChunkReader, joined
from ..training_config import TrainingConfig

KIND = "training-state"
MAY_CHANGE = (
    "steps",
    "parallel",
    "lr",
    "stream",
    "step_early",
    "offload",
    "gradient_checkpointing",
    "keep_activations",
    "compile",
    "deterministic",
)
"""Settings that may change on resuming: a longer schedule, other machines, a continuation from before a divergence, and
settings about where weights are stored and what is recomputed."""


def save(path: str | Path, state: Mapping[str, Tensor], *, step: int, config: TrainingConfig) -> None:
    """Write a run's state beside `path` and rename it over, so that the last save survives any failure."""
    metadata = {KIND_KEY: KIND, "l2p.step": str(step), "l2p.training": json.dumps(asdict(config))}
    save_tensors(state, path, metadata, overwrite=True)


def saved_step(path: str | Path) -> int:
    """The step at which a run was saved; 0 without a file.

    Raises:
        CheckpointError: if the file is not a saved run.
    """
    return _step(read_header(Path(path))) if Path(path).exists() else 0


def _step(header: Header) -> int:
    if header.metadata.get(KIND_KEY) != KIND:
        raise CheckpointError(f"{header.path} is not a saved training run.")
    return int(header.metadata["l2p.step"])


@torch.no_grad()
def load(path: str | Path, state: Mapping[str, Tensor], *, config: TrainingConfig) -> int:
    """Fill the tensors of `state` from a file, one by one, and return the step at which it was saved.

    Raises:
        CheckpointError: if the file is not a saved run, or belongs to another model or other settings; `state` is
            unchanged in these cases.
    """
    header = read_header(Path(path))
    step = _step(header)
    _check_settings(path, json.loads(header.metadata["l2p.training"]), config)
    for name in sorted(set(state) ^ set(header.tensors)):
        raise CheckpointError(f"{path} belongs to another model or policy: {shown(name)} is only in one of the two.")
    for name, entry in header.tensors.items():
        if entry.shape != tuple(state[name].shape):
            raise CheckpointError(
                f"{path} belongs to another model: {shown(name)} has the shape {entry.shape}, "
                f"not {tuple(state[name].shape)}."
            )
    with ChunkReader() as reader:
        for name, entry in header.tensors.items():
            assert TORCH_DTYPES[entry.dtype] == state[name].dtype
            fill(state[name], reader.read(joined(name, [entry])))
    return step


def _check_settings(path: str | Path, saved: Mapping[str, object], config: TrainingConfig) -> None:
    for choice in fields(TrainingConfig):
        # A run saved by a version without this setting used its default.
        ours, theirs = getattr(config, choice.name), saved.get(choice.name, choice.default)
        if choice.name not in MAY_CHANGE and ours != theirs:
            raise CheckpointError(
                f"{path} was trained with {choice.name} = {theirs!r}, but now {ours!r} is set: set it back to resume, "
                "or begin the run anew."
            )
