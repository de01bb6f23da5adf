"""The rule-based judge: determines what an image of the tiny set shows, and whether it fits its caption.

It compares an image with clean renderings of every attribute combination, over a grid of positions and sizes, and
takes the nearest. A rendering is m c + (1 - m) b for a mask m, a colour c and a background b, so with x the image

    |x - (b + m (c - b))|^2 = |x - b|^2 - 2 (c - b) . sum(m (x - b)) + |c - b|^2 sum(m^2)

and all combinations together cost one matrix product of the masks with the images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import shapes
from .shapes import Attributes, Scene

_OFFSETS = (-3.0, -1.5, 0.0, 1.5, 3.0)  # pixels
_SIZES = (10.0, 11.0, 12.0, 13.0, 14.0)  # pixels
_CHUNK = 32  # images at a time: bounds the table of distances to some 30 MB


class Score(NamedTuple):
    """Shares of images that show what their caption says, each in [0, 1]; ``whole`` needs all four attributes.

    ``residual`` is the root mean square distance to the nearest clean rendering, in units of the pixel range
    [-1, 1]: it distinguishes a clean image from one that is right but rough.
    """

    shape: float
    colour: float
    place: float
    background: float
    whole: float
    residual: float


@functools.cache
def _candidates() -> tuple[list[tuple[str, str]], Tensor, Tensor]:
    """The (shape, place) pair and the mask of each candidate: names, masks (K, 64*64), pair index of each mask."""
    pairs = list(itertools.product(shapes.SHAPES, shapes.PLACES))
    jitters = list(itertools.product(_OFFSETS, _OFFSETS, _SIZES))
    colour, background = next(iter(shapes.COLOURS)), next(iter(shapes.BACKGROUNDS))
    scenes = [
        Scene(Attributes(shape, colour, place, background), *jitter)
        for (shape, place), jitter in itertools.product(pairs, jitters)
    ]
    index = torch.arange(len(pairs)).repeat_interleave(len(jitters))
    return pairs, shapes.masks(scenes).flatten(1), index


def recognise(images: Tensor) -> tuple[list[Attributes], Tensor]:
    """The attributes that each image shows, and its distance from a clean rendering of them.

    images (B, 3, 64, 64) in [-1, 1] -> B attributes, and the root mean square distances (B,).
    """
    expected = (3, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE)
    if images.shape[1:] != expected:
        raise ValueError(f"The judge reads images of shape {expected}, not {tuple(images.shape[1:])}.")
    found: list[Attributes] = []
    distances = []
    for chunk in images.detach().float().cpu().split(_CHUNK):
        names, distance = _recognise_chunk(chunk)
        found += names
        distances.append(distance)
    return found, torch.cat(distances) if distances else torch.empty(0)


def _recognise_chunk(images: Tensor) -> tuple[list[Attributes], Tensor]:
    pairs, masks, pair_of_mask = _candidates()
    colours, backgrounds = shapes.palette(shapes.COLOURS), shapes.palette(shapes.BACKGROUNDS)
    x = images.flatten(2)  # (B, 3, pixels)

    outside = (x[:, None] - backgrounds[None, :, :, None]).square().sum((2, 3))  # (B, backgrounds): |x - b|^2
    inside = torch.einsum("bcp,kp->bkc", x, masks)  # (B, masks, 3): sum(m x)
    covered, squared = masks.sum(1), masks.square().sum(1)  # (masks,)
    contrast = colours[:, None] - backgrounds[None]  # (colours, backgrounds, 3)

    cross = torch.einsum("bkc,uvc->bkuv", inside, contrast)
    cross -= covered[:, None, None] * (backgrounds[None] * contrast).sum(-1)
    sse = outside[:, None, None, :] - 2 * cross + squared[:, None, None] * contrast.square().sum(-1)

    best, at = sse.flatten(1).min(1)
    mask, colour, background = torch.unravel_index(at, sse.shape[1:])
    names = [
        Attributes(pairs[pair][0], list(shapes.COLOURS)[u], pairs[pair][1], list(shapes.BACKGROUNDS)[v])
        for pair, u, v in zip(pair_of_mask[mask].tolist(), colour.tolist(), background.tolist(), strict=True)
    ]
    return names, (best.clamp(min=0) / x[0].numel()).sqrt()


def score(images: Tensor, captions: Sequence[str]) -> Score:
    """How well images (B, 3, 64, 64) in [-1, 1] show what their B captions say."""
    if not len(images) == len(captions) > 0:
        raise ValueError(f"{len(images)} images came with {len(captions)} captions; give one caption per image.")
    found, residual = recognise(images)
    wanted = [shapes.parse_caption(text) for text in captions]
    names = ("shape", "colour", "place", "background")
    right = torch.tensor([[getattr(f, n) == getattr(w, n) for n in names] for f, w in zip(found, wanted, strict=True)])
    each = dict(zip(names, right.double().mean(0).tolist(), strict=True))
    return Score(**each, whole=right.all(1).double().mean().item(), residual=residual.mean().item())
