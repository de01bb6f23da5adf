"""Loads files from the host's models folders as an L2P MODEL."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import comfy.utils
import torch
from torch import Tensor

from ...l2p_core.checkpoint import check_exact, open_checkpoint
from ...l2p_core.config import COMFY_PREFIX, PixelConfig
from ...l2p_core.deltas.checked_bases import Verified
from ...l2p_core.deltas.delta_on_base import Merged, open_merged, verify
from ...l2p_core.deltas.low_rank import is_adapter
from ...l2p_core.files.eight_bit_formats import adaptable
from ...l2p_core.files.metadata import KIND, PIXEL_INIT
from ...l2p_core.files.quantised import LEAVES, layer_of, leaf_of
from ...l2p_core.files.safetensors_header import CheckpointError
from ...l2p_core.files.shards import files_of
from ...l2p_core.files.tensor_io import TORCH_DTYPES
from ...l2p_core.layouts import comfy_sources
from ...l2p_core.model import key_shapes
from ...l2p_core.ops.eight_bit import dequantised
from ...l2p_core.ops.head_tiles import LEAST_TILE
from ...l2p_core.sources import source_of
from ...l2p_core.tiny import SOURCE_PATH
from ..folders import files
from ..messages.jobs import progress_bar
from ..messages.sentences import by_listed_names
from ..options import WEIGHT_DTYPES
from .host import build_model
from .quantised import is_for_the_host, mark_layers

HEAD_TILES = {"auto": None, "whole": 0}
"""Names of the head's tile settings; the third choice is a number of pixels."""


@by_listed_names()
def load_model(
    path: str,
    delta: str | None = None,
    weight_dtype: str = "default",
    head_tile: str = "auto",
    unchecked_base: bool = False,
    disable_dynamic: bool = False,
) -> Any:
    """Load an L2P file, or a delta on its base, as a ModelPatcher of the host.

    Args:
        path: an L2P model, or with `delta` the latent source or pixel initialisation that the delta was made for.
        delta: a file of trained weights.
        weight_dtype: a key of `WEIGHT_DTYPES`.
        head_tile: see `parse_head_tile`.
        unchecked_base: whether a quantised base may be taken that does not say what it was made from.
        disable_dynamic: the host's, for clones that are compiled or trained.

    Raises:
        ValueError: for a file that is missing, damaged or of another kind, with what to do instead.
    """
    tile = parse_head_tile(head_tile)
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{weight_dtype!r} is not a weight type; choose one of {', '.join(WEIGHT_DTYPES)}.")
    state = read_state(path, delta, unchecked_base)
    patcher = build_model(state, weight_dtype=weight_dtype, head_tile=tile, disable_dynamic=disable_dynamic)
    patcher.model.untrained = delta is None and open_checkpoint(path).metadata.get(KIND) == PIXEL_INIT
    # The host uses this to load the model again when it compiles, trains, or runs on several GPUs.
    patcher.cached_patcher_init = (load_model, (path, delta, weight_dtype, head_tile, unchecked_base))
    return patcher


def read_state(path: str, delta: str | None, unchecked_base: bool = False) -> dict[str, Tensor]:
    """The weights in ComfyUI layout without prefix (memory-mapped if the host does so).

    Raises:
        ValueError: as `load_model`.
    """
    if delta is not None:
        return _read_merged(path, delta, unchecked_base)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config()
    if not isinstance(config, PixelConfig):
        if Path(path) == SOURCE_PATH:
            raise ValueError(
                "The tiny source is a latent model: choose a delta that Train L2P trained on it, choose an L2P "
                "model as the file, or use L2P Demo, which has the bundled pixel model."
            )
        raise ValueError(
            f"{Path(path).name} is a latent {source_of(config).title} model, which has no Detailer Head: convert it "
            "with Convert to L2P, or choose the delta that was trained on it."
        )
    check_exact(checkpoint, key_shapes(config))
    state = read_weights(path)
    mark_layers(state, checkpoint.layer_settings)
    return state


def _read_merged(base: str, delta: str, unchecked_base: bool) -> dict[str, Tensor]:
    """The weights that merging the two would write, without writing them; layers that the base holds in fewer bits
    stay so."""
    merged = open_merged(delta, base, unchecked_base)
    _verify_once(merged)
    of_base = read_weights(base)
    state = {name: tensor for name, tensor in read_weights(delta).items() if not is_adapter(name)}
    for name, entry in merged.unchanged.items():
        state[name] = of_base[name] if merged.is_quantised else of_base[name].to(TORCH_DTYPES[entry.dtype])
    state |= {key: of_base[key] for key in of_base if layer_of(key) in merged.kept_layers and leaf_of(key) in LEAVES}
    mark_layers(state, merged.kept_layers)
    for layer, adapter in merged.adapters.items():
        key, settings = f"{layer}.weight", merged.kept_layers.get(layer)
        if settings is None:
            state[key] = adapter.added_to(state[key])
        else:
            eight_bits = adaptable(base, layer, settings)
            weight = dequantised(state[key], state[f"{layer}.weight_scale"], torch.float32)
            state |= eight_bits.tensors(key, adapter.added_to(weight))
    return state


def _verify_once(merged: Merged) -> None:
    """Check the base's content, with the host's progress bar, unless these files have passed before."""
    verified = Verified(files.private("verified.json"))
    if merged.is_quantised or merged in verified:
        return
    verify(merged, progress_bar())
    try:
        verified.add(merged)
    except CheckpointError as error:
        logging.warning("L2P: the next start has to check the delta's base again: %s", error)


def read_weights(path: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file in files_of(Path(path)):
        state |= comfy.utils.load_torch_file(str(file))
    plan = comfy_sources(_inside(state))
    # Popping releases q, k and v as soon as they are stacked.
    return {name: _joined([state.pop(key) for key in keys]) for name, keys in plan.items() if is_for_the_host(name)}


def parse_head_tile(text: str) -> int | None:
    """The head's tile: None for "auto", 0 for "whole", else pixels.

    Raises:
        ValueError: for anything else, or a tile that is too small.
    """
    if text in HEAD_TILES:
        return HEAD_TILES[text]
    if not text.isdecimal() or int(text) < LEAST_TILE:
        raise ValueError(f"The head tile is {text!r}: choose auto, whole, or {LEAST_TILE} pixels or more.")
    return int(text)


def _inside(keys: Iterable[str]) -> list[str]:
    """The diffusion model's keys, if a file contains more than that."""
    keys = list(keys)
    return [key for key in keys if key.startswith(COMFY_PREFIX)] or keys


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
