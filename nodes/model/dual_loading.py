"""Loads a latent source and the L2P model that was made from it as two MODELs on one set of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...l2p_core.checkpoint import Checkpoint, check_exact, open_checkpoint
from ...l2p_core.config import PixelConfig
from ...l2p_core.deltas.delta_on_base import open_merged
from ...l2p_core.files.metadata import KIND, PIXEL_INIT
from ...l2p_core.model import key_shapes
from ..messages.jobs import progress_bar
from ..messages.sentences import by_listed_names
from ..options import WEIGHT_DTYPES
from .dual import STACKS, build_faces, own_units, unit_of
from .loading import parse_head_tile, read_state, read_weights


@by_listed_names()
def load_dual(
    source: str,
    trained: str,
    weight_dtype: str = "default",
    head_tile: str = "auto",
    disable_dynamic: bool = False,
) -> tuple[Any, Any]:
    """The latent MODEL and the pixel MODEL.

    Args:
        source: a latent model.
        trained: a delta on it, or an L2P file whose frozen blocks are the source's.
        weight_dtype, head_tile, disable_dynamic: as for `load_model`.

    Raises:
        ValueError: for files of another kind or that do not belong together, with what to do instead.
    """
    tile = parse_head_tile(head_tile)
    latent, pixels = open_checkpoint(source), open_checkpoint(trained)
    config = latent.plain_config()
    if isinstance(config, PixelConfig):
        raise ValueError(f"{Path(source).name} is an L2P model: choose the latent model it was made from as source.")
    check_exact(latent, key_shapes(config))
    _refuse_quantised(latent)
    if pixels.is_delta:
        merged = open_merged(trained, source)
        of_pixels, of_source = read_state(source, trained), read_weights(source)
        shared = set(merged.untouched)
    else:
        _refuse_quantised(pixels)
        of_pixels, of_source = read_state(trained, None), read_weights(source)
        shared = equal_weights(of_pixels, of_source, weight_dtype)
    share = _share(of_pixels, of_source, shared)
    if not share:
        raise ValueError(
            f"{Path(source).name} and {Path(trained).name} have no block in common, so there is nothing to share: load "
            "them separately, with Load Diffusion Model and L2P Loader."
        )
    latent_model, pixel_model = build_faces(
        of_pixels,
        of_source,
        config,
        shared,
        weight_dtype=weight_dtype,
        head_tile=tile,
        disable_dynamic=disable_dynamic,
    )
    pixel_model.model.untrained = not pixels.is_delta and pixels.metadata.get(KIND) == PIXEL_INIT
    pixel_model.model.share = share
    arguments = (source, trained, weight_dtype, head_tile)
    latent_model.cached_patcher_init = (load_face, (0, *arguments))
    pixel_model.cached_patcher_init = (load_face, (1, *arguments))
    return latent_model, pixel_model


def load_face(number: int, *arguments: Any, **more: Any) -> Any:
    """The latent (0) or pixel MODEL (1) of a pair, for a host that loads it again; arguments as for `load_dual`."""
    return load_dual(*arguments, **more)[number]


def equal_weights(pixels: dict[str, Tensor], source: dict[str, Tensor], weight_dtype: str) -> set[str]:
    """The names of weights that are equal in both once they are cast; units that differ are the source's own.

    Files of one model come in float32 and in bfloat16; they are equal as far as the coarser one tells.
    """
    names = [name for name, weight in source.items() if name in pixels and pixels[name].shape == weight.shape]
    total, done, report = sum(source[name].nbytes for name in names), 0, progress_bar()
    found = set()
    for name in names:
        kind = WEIGHT_DTYPES[weight_dtype]
        exact = (
            kind if kind is torch.float32 else min((pixels[name].dtype, source[name].dtype), key=lambda d: d.itemsize)
        )
        if torch.equal(pixels[name].to(exact), source[name].to(exact)):
            found.add(name)
        done += source[name].nbytes
        report(done, total)
    return found


def _share(pixels: dict[str, Tensor], source: dict[str, Tensor], shared: set[str]) -> float:
    """The share of the source's parameters in blocks that both have, in [0, 1]."""
    own = own_units(pixels, source, shared)
    counted = {name: weight.numel() for name, weight in source.items()}
    in_shared_blocks = (n for name, n in counted.items() if unit_of(name) not in own and name.split(".")[0] in STACKS)
    return sum(in_shared_blocks) / sum(counted.values())


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    if checkpoint.layer_settings:
        raise ValueError(
            f"{checkpoint.path.name} is quantised, and weights can be shared only as they were trained: choose the "
            "unquantised file, with weight_dtype fp8_e4m3fn for little memory."
        )
