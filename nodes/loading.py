"""From files in the host's models folders to an L2P MODEL."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ..l2p_core.checkpoint import Checkpoint, check_complete, open_checkpoint
from ..l2p_core.config import COMFY_PREFIX, ModelConfig
from ..l2p_core.layouts import comfy_sources
from ..l2p_core.lora import is_adapter
from ..l2p_core.merged import Merged, open_merged, verify
from ..l2p_core.model import key_shapes
from ..l2p_core.recognise import UNUSED_KEYS
from ..l2p_core.safetensors_header import CheckpointError
from ..l2p_core.shards import files_of
from ..l2p_core.tensor_io import TORCH_DTYPES
from ..l2p_core.verified import Verified
from . import files
from .host import WEIGHT_DTYPES, build_model
from .jobs import progress_bar

HEAD_TILES = {"auto": None, "whole": 0}
"""Words for the head's tile; a number of pixels is the third choice."""

MIN_TILE = 64

QUANTISATION_SUFFIXES = (
    ".comfy_quant",
    ".weight_scale",
    ".weight_scale_2",
    ".input_scale",
    ".scale_weight",
    ".scale_input",
)


def load_model(
    path: str,
    delta: str | None = None,
    weight_dtype: str = "default",
    head_tile: str = "auto",
    disable_dynamic: bool = False,
) -> Any:
    """Load an L2P file, or a delta on its base, as a ModelPatcher of the host.

    Args:
        path: an L2P model, or with `delta` the latent source or pixel initialisation that the delta was made for.
        delta: a file of trained weights.
        weight_dtype: a key of `host.WEIGHT_DTYPES`.
        head_tile: see `parse_head_tile`.
        disable_dynamic: the host's, for clones that are compiled or trained.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind, with what to do instead.
    """
    tile = parse_head_tile(head_tile)
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"There is no weight type {weight_dtype!r}; choose one of {', '.join(WEIGHT_DTYPES)}.")
    state, metadata = read_state(path, delta)
    patcher = build_model(state, metadata, weight_dtype=weight_dtype, head_tile=tile, disable_dynamic=disable_dynamic)
    # The host loads the model anew from this when it compiles, trains, or runs on several GPUs.
    patcher.cached_patcher_init = (load_model, (path, delta, weight_dtype, head_tile))
    return patcher


def read_state(path: str, delta: str | None) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """The weights in ComfyUI layout without prefix (memory-mapped where the host does so), with what describes them.

    Raises:
        ValueError: as `load_model`.
    """
    if delta is not None:
        return _read_merged(path, delta)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config()
    if config.head is None:
        raise ValueError(
            f"{Path(path).name} is a latent Z-Image model, which has no Detailer Head: make an L2P model of it with "
            "Convert to L2P, or give the delta that was trained on it."
        )
    _check_complete(checkpoint, config)
    return _read(path)


def _read_merged(base: str, delta: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """What merging the two would write, without writing it."""
    merged = open_merged(delta, base)
    _verify_once(merged)
    of_base, _ = _read(base)
    state, metadata = _read(delta)
    state = {name: tensor for name, tensor in state.items() if not is_adapter(name)}
    state |= {name: of_base[name].to(TORCH_DTYPES[entry.dtype]) for name, entry in merged.kept.items()}
    for layer, adapter in merged.adapters.items():
        state[f"{layer}.weight"] = adapter.added_to(state[f"{layer}.weight"])
    return state, metadata


def _verify_once(merged: Merged) -> None:
    """Check the base's numbers, with the host's progress bar, unless these files have passed before."""
    verified = Verified(files.private("verified.json"))
    if merged in verified:
        return
    verify(merged, progress_bar())
    try:
        verified.add(merged)
    except CheckpointError as error:
        logging.warning("L2P: the next start has to check the delta's base again: %s", error)


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    state: dict[str, Tensor] = {}
    metadata = None
    for file in files_of(Path(path)):
        part, of_file = comfy.utils.load_torch_file(str(file), return_metadata=True)
        state |= part
        metadata = metadata or of_file
    plan = comfy_sources(_inside(state))
    for name in UNUSED_KEYS:
        plan.pop(name, None)
    # Popping lets go of q, k and v as soon as they are stacked.
    return {name: _joined([state.pop(key) for key in keys]) for name, keys in plan.items()}, metadata


def parse_head_tile(text: str) -> int | None:
    """The head's tile: None for "auto", 0 for "whole", else pixels.

    Raises:
        ValueError: for anything else, or a tile too small to be of use.
    """
    if text in HEAD_TILES:
        return HEAD_TILES[text]
    if not text.isdecimal() or int(text) < MIN_TILE:
        raise ValueError(f"The head tile is {text!r}: choose auto, whole, or a number of pixels from {MIN_TILE}.")
    return int(text)


def _check_complete(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Refuse missing weights: the host would only log them, and sample noise."""
    expected = key_shapes(config)
    if any(is_quantisation_key(name) for name in checkpoint.tensors):
        # Quantised weights come with scales beside them and may be packed, so only their presence can be asked for.
        missing = [name for name in expected if name not in checkpoint.tensors]
        if missing:
            raise ValueError(f"{checkpoint.path.name} is incomplete: {missing[0]} is missing.")
    else:
        check_complete(checkpoint, expected)


def is_quantisation_key(name: str) -> bool:
    """Whether a key holds the scales or the format of a quantised layer (comfy/quant_ops.py)."""
    return name == "scaled_fp8" or name.endswith(QUANTISATION_SUFFIXES)


def _inside(keys: Iterable[str]) -> list[str]:
    """The diffusion model's keys, where a file holds more than that."""
    keys = list(keys)
    return [key for key in keys if key.startswith(COMFY_PREFIX)] or keys


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
