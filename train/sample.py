"""`l2p sample`: PNG images from an L2P model."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..l2p_core import flow
from ..l2p_core.checkpoint import Checkpoint, open_checkpoint
from ..l2p_core.config import ModelConfig, variant_row
from ..l2p_core.deltas.delta_on_base import Merged, open_merged, verify
from ..l2p_core.device import accelerator
from ..l2p_core.files.tensor_io import TORCH_DTYPES
from ..l2p_core.memory import sampling_model
from ..l2p_core.memory.compiled import check_compiler, compile_blocks
from ..l2p_core.model import L2PModel
from ..l2p_core.ops.head_tiles import LEAST_TILE
from ..l2p_core.ranges import SIDE
from ..l2p_core.run.memory_plan import MemoryRanOut
from ..l2p_core.tiny import bundled
from ..l2p_core.tiny.bundled import is_tiny
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from .console import bar, byte_progress
from .pictures import load_picture, picture_size, refuse_existing, save_png
from .sample_captions import caption_reader
from .sample_memory import Choice, Need, free_bytes, place

_MULTIPLE = 16
"""Multiple in pixels to which derived sides are rounded, and minimum of the shorter side."""
_CUT = 0.05
"""Share of another image that may be cropped to reach such multiples; for strips it would be half."""


class SamplingSettings(NamedTuple):
    """Of sampling."""

    steps: int
    cfg: float
    shift: float
    denoise: float


def sample_command(args: argparse.Namespace) -> None:
    """Generate one image for each seed.

    Raises:
        MemoryRanOut: when less memory was there than was free at the start.
        ValueError: for a file that is not an L2P model, captions that do not fit it, images that exist already, a
            device that does not exist, has too little memory, or has no compiler.
    """
    targets = _targets(args.output, args.seed)
    for target in targets.values():
        refuse_existing(target, args.overwrite)
    base, trained = _files(args.model, args.delta)
    # From the header, so that other errors are reported before gigabytes are read.
    opened = open_merged(trained, base) if trained else Merged(open_checkpoint(base), {}, {})
    checkpoint = opened.checkpoint
    config = checkpoint.pixel_config()
    settings = _settings(args, config)
    read_captions = caption_reader(args, base, config, settings.cfg)
    for note in _notes(args, settings.cfg):
        print(note, file=sys.stderr)
    width, height = _size(args, config)
    need = Need(config, height, width, _dtype(base, checkpoint))
    choice = place(args.device, need, args.weights)
    device = choice.device
    if args.compile:
        check_compiler(device)
    init = load_picture(args.init, width, height) if args.init else None
    positive, negative = read_captions(device)
    model = _load(opened, choice)
    caption = max(len(positive), 0 if negative is None else len(negative))
    model.tile = max(args.tile, LEAST_TILE) if args.tile else need.tile(choice.form, caption, free_bytes(device))
    if args.compile:
        compile_blocks(model)
    for seed, target in targets.items():
        try:
            pixels = _generate(model, positive, negative, settings, (height, width), seed, init, device)
        except RuntimeError as error:
            if not accelerator.is_out_of_memory(error):
                raise
            raise _ran_out(choice, width, height, model.tile) from None
        about = {"seed": seed, "prompt": args.prompt, "width": width, "height": height, **settings._asdict()}
        save_png(pixels, target, {"l2p": json.dumps(about)}, args.overwrite)
        print(f"{target} written.")


def _ran_out(choice: Choice, width: int, height: int, tile: int | None) -> MemoryRanOut:
    """What to do when memory ran out although there was room by our estimate."""
    where = "The GPU's memory" if accelerator.has_own_memory(choice.device.type) else "RAM"
    half = max(LEAST_TILE, (tile or max(width, height)) // 2)
    lighter = "" if choice.form.streamed else f"--weights {'streamed' if choice.form.float8 else 'fp8'}, "
    return MemoryRanOut(
        f"{where} ran out while sampling {width} x {height} pixels, though there was room when it began: close other "
        f"programs, or choose {lighter}--tile {half} or a smaller size."
    )


def _targets(output: Path, seeds: list[int]) -> dict[int, Path]:
    if output.suffix.lower() != ".png":  # other programs trust the suffix
        raise ValueError(f"{output.name} is not the name of a PNG image, which is what is written: end it in .png.")
    if len(seeds) == 1:
        return {seeds[0]: output}
    return {seed: output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds}


def _files(path: Path, delta_path: Path | None) -> tuple[Path, Path | None]:
    """The model's file, and the delta to merge into it; the tiny source uses its own by default."""
    base = bundled.resolve(path)
    return base, bundled.DELTA if base == bundled.SOURCE and delta_path is None else delta_path


def _settings(args: argparse.Namespace, config: ModelConfig) -> SamplingSettings:
    if not args.init and args.denoise != 1:
        raise ValueError("--denoise starts from an image: give one with --init, or remove --denoise.")
    row = variant_row(str(config.variant))
    return SamplingSettings(
        steps=args.steps or row.steps,
        cfg=row.cfg if args.cfg is None else args.cfg,
        shift=row.shift if args.shift is None else args.shift,
        denoise=args.denoise,
    )


def _notes(args: argparse.Namespace, cfg: float) -> list[str]:
    """Sentences about options that have no effect or are adjusted."""
    notes = []
    if args.negative is not None and cfg == 1:
        notes.append("--negative has no effect with --cfg 1, which is no guidance: raise --cfg above 1.")
    if args.tile and args.tile < LEAST_TILE:
        notes.append(f"Tiles of {args.tile} pixels are raised to {LEAST_TILE}: smaller ones are much slower.")
    return notes


def _size(args: argparse.Namespace, config: ModelConfig) -> tuple[int, int]:
    """(width, height) of the images."""
    side = IMAGE_SIZE if is_tiny(config) else variant_row(str(config.variant)).pixels
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
            "both --width and --height, to whose shape it is cut."
        )
    return size


def _rounded(width: float, height: float) -> tuple[int, int]:
    """Round to multiples if they preserve the shape, else to pixels."""
    size = round(width / _MULTIPLE) * _MULTIPLE, round(height / _MULTIPLE) * _MULTIPLE
    change = size[0] / size[1] * height / width
    return size if 1 - _CUT <= change <= 1 / (1 - _CUT) else (round(width), round(height))


def _dtype(base: Path, checkpoint: Checkpoint) -> torch.dtype:
    """The compute dtype: that of the stored patch embedder."""
    # The tiny model is stored in bfloat16, in which a CPU is slower and no more accurate.
    return torch.float32 if base == bundled.SOURCE else TORCH_DTYPES[checkpoint.input_dtype]


def _load(opened: Merged, choice: Choice) -> L2PModel:
    if opened.kept:
        with byte_progress("checking the base") as checking:
            verify(opened, checking)
    with byte_progress("loading") as progress:
        return sampling_model.load(opened.checkpoint, choice.form, choice.device, progress, opened.adapters)


def _generate(
    model: L2PModel,
    positive: Tensor,
    negative: Tensor | None,
    settings: SamplingSettings,
    size: tuple[int, int],
    seed: int,
    init: Tensor | None,
    device: torch.device,
) -> Tensor:
    """One image (3, H, W) in [-1, 1] on the CPU."""
    # On the CPU, so that a seed produces the same image on every machine.
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    with bar(f"seed {seed}", unit="step", total=settings.steps) as shown:
        return flow.sample(
            model,
            noise,
            [positive.to(device)],
            sigmas=flow.sigmas(settings.steps, settings.shift, settings.denoise),
            cfg=settings.cfg,
            negative=None if negative is None else [negative.to(device)],
            init=None if init is None else init.to(device),
            progress=lambda *_: shown.update(),
        )[0].cpu()
