"""`l2p sample`: images from an L2P model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ..l2p_core.dataset import picture_files
from ..l2p_core.ops.head_tiles import LEAST_TILE
from ..l2p_core.ranges import SIDE
from .pictures import load_mask, load_picture, picture_size, reading_notes, refuse_existing, save_picture
from .sample_captions import caption_reader
from .sampler import Sampler, noise_of

_MULTIPLE = 16
"""Multiple in pixels to which derived sides are rounded, and minimum of the shorter side."""
_CUT = 0.05
"""Share of another image that may be cropped to reach such multiples; for strips it would be half."""


def sample_command(args: argparse.Namespace) -> None:
    """Generate one image for each seed.

    Raises:
        MemoryRanOut: when less memory was there than was free at the start.
        ValueError: for a file that is not an L2P model, captions that do not fit it, images that exist already, a
            device that does not exist, has too little memory, or has no compiler.
    """
    writer = picture_files.writer(args.output.name, args.depth)
    targets = _targets(args.output, args.seed)
    for target in targets.values():
        refuse_existing(target, args.overwrite)
    sampler = Sampler(args)
    if not args.init and args.denoise != 1:
        raise ValueError("--denoise starts from an image: give one with --init, or remove --denoise.")
    if args.mask and not args.init:
        raise ValueError("--mask repaints a part of an image: give the image with --init, or remove --mask.")
    read_captions = caption_reader(args, sampler.base, sampler.config, sampler.settings.cfg)
    for note in _notes(args, sampler.settings.cfg):
        print(note, file=sys.stderr)
    width, height = _size(args, sampler.side)
    device = sampler.place(width, height)
    init = load_picture(args.init, width, height) if args.init else None
    mask = load_mask(args.mask, width, height) if args.mask else None
    positive, negative = read_captions(device)
    sampler.load(max(len(positive), 0 if negative is None else len(negative)))
    for seed, target in targets.items():
        pixels = sampler.image(positive, negative, noise_of(seed, width, height), f"seed {seed}", init, mask)
        about = {"seed": seed, "prompt": args.prompt, "width": width, "height": height, **sampler.settings._asdict()}
        save_picture(pixels, target, writer, {"l2p": json.dumps(about)}, args.overwrite)
        print(f"{target} written.")


def _targets(output: Path, seeds: list[int]) -> dict[int, Path]:
    if len(seeds) == 1:
        return {seeds[0]: output}
    return {seed: output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds}


def _notes(args: argparse.Namespace, cfg: float) -> list[str]:
    """Sentences about options that have no effect or are adjusted, and levels that are lost."""
    notes = []
    if args.negative is not None and cfg == 1:
        notes.append("--negative has no effect with --cfg 1, which disables guidance: raise --cfg above 1.")
    if args.tile and args.tile < LEAST_TILE:
        notes.append(f"Tiles of {args.tile} pixels are raised to {LEAST_TILE}: smaller ones are much slower.")
    return notes + (reading_notes(args.init) if args.init else [])


def _size(args: argparse.Namespace, side: int) -> tuple[int, int]:
    """(width, height) of the images; `side` is that of the model's own squares."""
    if args.mask:
        size = picture_size(args.init)
        if (args.width or size[0], args.height or size[1]) != size:
            raise ValueError("--mask repaints an image in its own size: remove --width and --height.")
        if min(size) < SIDE.least or max(size) > SIDE.most:
            raise ValueError(
                f"{args.init} is {size[0]} x {size[1]}: its sides must be from {SIDE.least} to {SIDE.most}."
            )
        return size
    if args.init:
        return size_like(picture_size(args.init), side, args.width, args.height)
    return args.width or side, args.height or side


def size_like(shape: tuple[int, int], side: int, width: int | None, height: int | None) -> tuple[int, int]:
    """(width, height) in the shape of another image, with a square's area; a given side determines the other.

    Raises:
        ValueError: if no size in whole pixels has that shape, as for a strip.
    """
    if width and height:
        return width, height
    aspect = shape[0] / shape[1]
    if width:
        size = width, round(width / aspect)
    elif height:
        size = round(height * aspect), height
    else:
        # A strip becomes longer than its area would give, rather than being cropped.
        scale = max(1.0, _MULTIPLE / (side * min(aspect, 1 / aspect) ** 0.5))
        size = _rounded(scale * side * aspect**0.5, scale * side / aspect**0.5)
    if min(size) < SIDE.least or max(size) > SIDE.most:
        raise ValueError(
            f"The image to start from is {shape[0]} x {shape[1]}, which would make {size[0]} x {size[1]} here: give "
            "both --width and --height to crop it to their shape."
        )
    return size


def _rounded(width: float, height: float) -> tuple[int, int]:
    """Round to multiples if they preserve the shape, else to pixels."""
    size = round(width / _MULTIPLE) * _MULTIPLE, round(height / _MULTIPLE) * _MULTIPLE
    change = size[0] / size[1] * height / width
    return size if 1 - _CUT <= change <= 1 / (1 - _CUT) else (round(width), round(height))
