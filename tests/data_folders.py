"""Small data folders to test with: images that tell their number."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfyui_l2p.l2p_core.dataset.pictures import picture
from comfyui_l2p.l2p_core.tiny import image_set

SIZES = ((64, 64), (96, 64), (64, 96))


def grey(path: Path, value: int = 0, width: int = 8, height: int = 8) -> Path:
    """A PNG file of one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(path)
    return path


def write_csv(
    path: Path, rows: Iterable[Sequence[object]], header: Sequence[str] = ("image", "prompt", "seed")
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def numbered(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = SIZES) -> Path:
    """Images of their number's grey, captioned "image <number>", seed 1000 + number, their sizes in turn."""
    for number in range(count):
        grey(folder / f"{number:03d}.png", number, *sizes[number % len(sizes)])
    write_csv(folder / "metadata.csv", [(f"{n:03d}.png", f"image {n}", 1000 + n) for n in range(count)])
    return folder


def features(caption: str) -> Tensor:
    """The number in a caption, as its only feature."""
    return torch.tensor([[float(caption.split()[1])]])


def truncate(path: Path) -> None:
    """Cut an image file short, its header staying whole."""
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) - 30])


def tiny_set(folder: Path, count: int) -> Path:
    """The first images of the tiny training set as clean renderings, with metadata.csv."""
    captions = [image_set.caption_of(number) for number in range(count)]
    seeds = [image_set.seed_of(number) for number in range(count)]
    folder.mkdir(parents=True)
    for number, pixels in enumerate(image_set.rendered(captions, seeds)):
        picture(pixels).save(folder / f"{number:03d}.png")
    rows = [(f"{n:03d}.png", caption, seed) for n, (caption, seed) in enumerate(zip(captions, seeds, strict=True))]
    write_csv(folder / "metadata.csv", rows)
    return folder
