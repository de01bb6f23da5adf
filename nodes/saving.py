"""Images as TIFF files in the host's output folder, named and numbered as the host does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from torch import Tensor

from ..l2p_core.deep_images import tiff
from ..l2p_core.deep_images.common import BrokenImage, to_levels
from ..l2p_core.files.atomic import write_bytes
from ..l2p_core.ops.finite import check_finite
from .options import TIFF_DEPTHS


def save_tiff(
    images: Tensor, prefix: str, depth: str, prompt: Any, extra: Mapping[str, Any] | None
) -> list[dict[str, str]]:
    """Write each image of an IMAGE (B, H, W, C) as a file of its own.

    Args:
        images: values in [0, 1]; of one channel, or three and perhaps more, which are dropped.
        prefix: of the names, as for the host's Save Image.
        depth: of TIFF_DEPTHS.
        prompt, extra: the workflow, for the files' descriptions, unless the host was told to write no metadata.

    Returns:
        The files as the host lists them.

    Raises:
        ValueError: if the prefix leads out of the output folder, a value is not finite, tifffile is missing, or a file
            cannot be written.
    """
    check_finite(images)
    root = folder_paths.get_output_directory()
    folder, name, counter, subfolder = _target(prefix, root, images.shape[2], images.shape[1])
    text = {} if args.disable_metadata else _text(prompt, extra)
    saved = []
    for number, image in enumerate(images):
        file = f"{name.replace('%batch_num%', str(number))}_{counter + number:05}_.tif"
        try:
            write_bytes(Path(folder) / file, _content(image, depth, text))
        except BrokenImage as error:
            raise ValueError(f"{error} into ComfyUI's Python, or use Save Image.") from error
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(os.path.join(root, ""), "output/")) from error
        saved.append({"filename": file, "subfolder": subfolder, "type": "output"})
    return saved


def saved_paths(saved: Iterable[Mapping[str, str]]) -> list[Path]:
    """Where `save_tiff` wrote the files that it returned."""
    root = Path(folder_paths.get_output_directory())
    return [root / file["subfolder"] / file["filename"] for file in saved]


def _content(image: Tensor, depth: str, text: Mapping[str, str]) -> bytes:
    colours = image[..., :3] if image.shape[-1] > 2 else image[..., :1].expand(-1, -1, 3)
    colours = colours.detach().cpu().float()
    if depth == TIFF_DEPTHS[0]:
        return tiff.encode(to_levels(colours.movedim(-1, 0) * 2 - 1), text)
    return tiff.encode(colours.contiguous().numpy(), text)


def _target(prefix: str, root: str, width: int, height: int) -> tuple[str, str, int, str]:
    """The folder, the beginning of a file's name, the next free number, and the folder below the output folder."""
    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, root, width, height)
    except Exception as error:
        if type(error) is not Exception:  # the host's class for names that lead elsewhere
            raise
        raise ValueError(
            f"The file name {prefix!r} leads out of the output folder: write it without .. and without a drive."
        ) from error
    return folder, name, counter, subfolder


def _text(prompt: Any, extra: Mapping[str, Any] | None) -> dict[str, str]:
    """What the host's Save Image writes into a PNG."""
    parts = {} if prompt is None else {"prompt": prompt}
    return {name: json.dumps(value) for name, value in {**parts, **(extra or {})}.items()}
