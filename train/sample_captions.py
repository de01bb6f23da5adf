"""The caption features of `l2p sample`: from the tiny model's words, a file, or a prompt through the text encoder."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..l2p_core import tiny
from ..l2p_core.checkpoint import load_tensors
from ..l2p_core.config import ModelConfig
from ..l2p_core.device import accelerator
from ..l2p_core.memory.plan import gigabytes
from ..l2p_core.sources import source_of
from ..l2p_core.tiny.bundled import is_tiny
from . import text_encoder
from .text_encoder import EncoderFiles

GuidedCaptions = tuple[Tensor, Tensor | None]
"""Features (L, caption_dim) of the caption, and of the negative caption."""

_ENCODER_SPARE = 10**9
"""Bytes of GPU memory that a text encoder uses beside its weights: activations of two captions, and the context."""


def caption_reader(
    args: argparse.Namespace, base: Path, config: ModelConfig, cfg: float
) -> Callable[[torch.device], GuidedCaptions]:
    """A function that computes the captions on a device; all checks are done before it is called.

    Args:
        args: of `l2p sample`: prompt, negative, encoder, tokenizer and caption_features.
        base: the model's file, beside which a text encoder may lie.
        config: of the model.
        cfg: guidance; 1 needs no negative caption.

    Raises:
        ValueError: for captions that are missing, too many, or do not fit the model, with what to pass instead.
    """
    if (args.prompt is None) == (args.caption_features is None):
        raise ValueError("Give the caption either as --prompt or as --caption-features FILE.")
    _refuse_unused_encoder(args, config)
    if args.prompt is None:
        if args.negative is not None:
            raise ValueError(
                "--negative goes with --prompt: put a tensor 'negative' into the caption features instead."
            )
        features = _from_file(args.caption_features, config, cfg)
        return lambda device: features
    if is_tiny(config):
        words = tiny.load_words()
        features = words.encode(args.prompt), words.encode(args.negative or "")
        return lambda device: features
    files = encoder_files(args, base, config)
    negative = None if cfg == 1 else args.negative or ""
    return lambda device: _encoded(files, args.prompt, negative, device)


def _refuse_unused_encoder(args: argparse.Namespace, config: ModelConfig) -> None:
    for option in ("encoder", "tokenizer"):
        if getattr(args, option) is None:
            continue
        if args.prompt is None:
            raise ValueError(f"--{option} goes with --prompt: --caption-features are encoded already. Remove it.")
        if is_tiny(config):
            raise ValueError(f"The tiny model has its own text encoder: remove --{option}.")


def _from_file(path: Path, config: ModelConfig, cfg: float) -> GuidedCaptions:
    tensors, _ = load_tensors(path)
    if "positive" not in tensors:
        raise ValueError(f"{path} has no tensor 'positive' with the caption's features.")
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != config.caption_dim or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: '{name}' is {str(tensor.dtype).removeprefix('torch.')} of the shape {tuple(tensor.shape)}, "
                f"but this model takes floating-point features (tokens, {config.caption_dim})."
            )
    if cfg != 1 and "negative" not in tensors:
        raise ValueError("Guidance needs a tensor 'negative' in the caption features: add it, or give --cfg 1.")
    return tensors["positive"], tensors.get("negative")


def encoder_files(args: argparse.Namespace, base: Path, config: ModelConfig) -> EncoderFiles:
    """The text encoder of a large model: the one given, else the one beside the model.

    Raises:
        ValueError: if there is none, or it is another model's.
    """
    folder, published = args.encoder or _beside(base), source_of(config).encoder
    if folder is None:
        raise ValueError(
            f"--prompt needs this model's text encoder, {published.title}: give its folder or file with --encoder (and "
            "with --tokenizer its tokenizer, if that is elsewhere), or give --caption-features."
        )
    files = text_encoder.find(folder, args.tokenizer, published)
    width = text_encoder.caption_dim(files)
    if width != config.caption_dim:
        raise ValueError(
            f"The text encoder {folder} gives features of width {width}, but this model takes {config.caption_dim}: "
            f"use the one that it was made with, {published.title}."
        )
    return files


def _beside(base: Path) -> Path | None:
    """The published folder that contains a model, `transformer` beside `text_encoder`; None if it is not."""
    folders = (base.parent, base.parent.parent)
    return next((folder for folder in folders if (folder / "text_encoder").is_dir()), None)


def _encoded(files: EncoderFiles, prompt: str, negative: str | None, device: torch.device) -> GuidedCaptions:
    """The captions' features on the CPU; the encoder is unloaded."""
    device = encoder_device(files, device)
    encoder = text_encoder.TransformersEncoder(files, device)
    positive = encoder.encode([prompt])[0]
    features = positive, None if negative is None else encoder.encode([negative], negative=True)[0]
    del encoder
    gc.collect()
    accelerator.empty_cache(device)
    return features


def encoder_device(files: EncoderFiles, device: torch.device) -> torch.device:
    """The device, or the CPU (reported on stderr) if a text encoder does not fit into the device's free memory."""
    needed = text_encoder.weight_bytes(files) + _ENCODER_SPARE
    if accelerator.has_own_memory(device.type) and accelerator.free_bytes(device) < needed:
        print(
            f"The text encoder needs {gigabytes(needed)} GB, which {device} does not have free: it runs on the CPU.",
            file=sys.stderr,
        )
        return accelerator.CPU
    return device
