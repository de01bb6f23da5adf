"""`l2p sample`: PNG images from an L2P model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from ..l2p_core import delta, flow, tiny
from ..l2p_core.checkpoint import load_model, load_tensors, open_checkpoint
from ..l2p_core.config import ModelConfig, variant_row
from ..l2p_core.merged import open_merged
from ..l2p_core.model import L2PModel
from ..l2p_core.tiny import bundled
from ..l2p_core.tiny.shapes import IMAGE_SIZE
from ..l2p_core.tiny.words import CAPTION_DIM
from .console import bar, byte_progress
from .pictures import load_picture, refuse_existing, save_png


def sample_command(args: argparse.Namespace) -> None:
    """Generate one image for each seed.

    Raises:
        ValueError: for a file that is no L2P model, captions that do not fit it, or images that exist already.
    """
    targets = _targets(args.output, args.seed)
    for target in targets.values():
        refuse_existing(target, args.overwrite)
    base, trained = _files(args.model, args.delta)
    # From the header: what is wrong with the rest shall be said before gigabytes are read.
    config = (open_merged(trained, base).checkpoint if trained else open_checkpoint(base)).pixel_config()
    positive, negative = _captions(config, args.prompt, args.caption_features)
    row = variant_row(str(config.variant))
    default_side = IMAGE_SIZE if is_tiny(config) else row.pixels
    width, height = args.width or default_side, args.height or default_side
    settings = {
        "steps": args.steps or row.steps,
        "cfg": row.cfg if args.cfg is None else args.cfg,
        "shift": row.shift if args.shift is None else args.shift,
        "denoise": args.denoise,
    }
    init = load_picture(args.init, width, height) if args.init else None
    if init is None and args.denoise != 1:
        raise ValueError("--denoise starts from an image: give one with --init, or leave it out.")
    if settings["cfg"] != 1 and negative is None:
        raise ValueError("Guidance needs a tensor 'negative' in the caption features, or --cfg 1 for none.")
    model = _load(base, trained, args.device)
    model.tile = args.tile
    for seed, target in targets.items():
        pixels = _generate(model, positive, negative, settings, (height, width), seed, init, args.device)
        text = {"l2p": json.dumps({"seed": seed, "prompt": args.prompt, "width": width, "height": height, **settings})}
        save_png(pixels, target, text, args.overwrite)
        print(f"{target} written.")


def is_tiny(config: ModelConfig) -> bool:
    """Whether a model takes the captions of the bundled tiny one."""
    return config.caption_dim == CAPTION_DIM


def _targets(output: Path, seeds: list[int]) -> dict[int, Path]:
    if len(seeds) == 1:
        return {seeds[0]: output}
    return {seed: output.with_name(f"{output.stem}-{seed}{output.suffix}") for seed in seeds}


def _files(path: Path, delta_path: Path | None) -> tuple[Path, Path | None]:
    """The model's file, and the delta to put onto it; the tiny source takes its own where none is given."""
    base = bundled.resolve(path)
    return base, bundled.DELTA if base == bundled.SOURCE and delta_path is None else delta_path


def _load(base: Path, delta_path: Path | None, device: str) -> L2PModel:
    # The tiny model is stored in bfloat16, in which a CPU is slower and no more exact.
    dtype = torch.float32 if base == bundled.SOURCE else None
    if delta_path is None:
        with byte_progress("loading") as progress:
            return load_model(base, dtype, device, progress).eval()
    with byte_progress("checking the base") as checking, byte_progress("loading") as progress:
        return delta.load_model(delta_path, base, dtype, device, progress, checking).eval()


def _captions(config: ModelConfig, prompt: str | None, features: Path | None) -> tuple[Tensor, Tensor | None]:
    """The caption's features (L, C) and those to guide away from."""
    if (prompt is None) == (features is None):
        raise ValueError("Give the caption as --prompt (tiny model) or as --caption-features FILE, one of the two.")
    if prompt is not None:
        if not is_tiny(config):
            raise ValueError(
                f"This model reads captions of {config.caption_dim} numbers a token, which its text encoder makes: "
                "give them with --caption-features; --prompt is for the tiny model."
            )
        words = tiny.load_words()
        return words.encode(prompt), words.encode("")
    assert features is not None
    tensors, _ = load_tensors(features)
    if "positive" not in tensors:
        raise ValueError(f"{features} has no tensor 'positive' with the caption's features.")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != config.caption_dim:
            raise ValueError(
                f"{features}: '{name}' has the shape {tuple(tensor.shape)}, but this model takes "
                f"(tokens, {config.caption_dim})."
            )
    return tensors["positive"], tensors.get("negative")


def _generate(
    model: L2PModel,
    positive: Tensor,
    negative: Tensor | None,
    settings: dict[str, float],
    size: tuple[int, int],
    seed: int,
    init: Tensor | None,
    device: str,
) -> Tensor:
    """One image (3, H, W) in [-1, 1] on the CPU."""
    # On the CPU, so that a seed means the same image on every machine.
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)
    with bar(f"seed {seed}", unit="step", total=int(settings["steps"])) as shown:
        return flow.sample(
            model,
            noise,
            [positive.to(device)],
            sigmas=flow.sigmas(int(settings["steps"]), settings["shift"], settings["denoise"]),
            cfg=settings["cfg"],
            negative=None if negative is None else [negative.to(device)],
            init=None if init is None else init.to(device),
            progress=lambda *_: shown.update(),
        )[0].cpu()
