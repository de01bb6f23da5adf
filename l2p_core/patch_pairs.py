"""The informed start: a patch embedder for pixels that is fitted to the source's own token embeddings.

Making training images yields the same places twice, as latent patches z and as pixel patches x. The source embeds z as
h = W z + b. Ridge regression gives the pixel embedder that comes closest to h, with as much ridge as makes its
Frobenius norm that of W: white noise then has the same energy in both embeddings, E|W eps|^2 = |W|^2. All it needs are
sums over pairs, some 5 MB whatever the number of images. (The fit is that of Iris-3B's conversion, made concrete here.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files.safetensors_header import CheckpointError, read_header
from .files.tensor_file import load_tensors, save
from .model import PIXEL_ORDER
from .ops.finite import is_finite
from .patch import patchify

FILE = "patch-pairs.safetensors"
"""Its name in the folder of a data set."""
ENOUGH = 1 << 22
"""Pairs after which more change nothing: those of 1,024 images of 1024 pixels."""
FEW = 4096
"""Pairs below which no fit is made: a patch of 16 pixels has 768 values."""

_KIND = "patch pairs"
_FLOOR = 1e-6
"""The least ridge, as a share of the largest variance: below it is the rounding of sums in float32."""
_HALVINGS = 200


def _shapes(side: int, channels: int, cells: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the sums."""
    width, depth = side * side * 3, cells * cells * channels
    return {"x": (width,), "z": (depth,), "xx": (width, width), "zx": (depth, width), "zz": (depth, depth)}


class PatchPairs:
    """Sums over pairs of a pixel patch x (P*P*3, in a pixel model's order) and a latent patch z, in float64.

    Args:
        side: P, pixels of a patch's side.
        channels: of the latents.
        cells: of a latent patch's side.
        order: of a latent patch's elements, see `patch.patchify`.
    """

    def __init__(self, side: int, channels: int, cells: int = 2, order: str = "p q c"):
        self.side, self.channels, self.cells, self.order = side, channels, cells, order
        self.count = 0
        self.sums = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in _shapes(side, channels, cells).items()
        }

    @property
    def space(self) -> tuple[object, ...]:
        """What both patches are of."""
        return self.side, self.channels, self.cells, self.order

    def add(self, pixels: Tensor, latents: Tensor) -> None:
        """Add the patches of some images; patches that are not whole in both are skipped.

        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            latents: (B, C, h, w) of the same images, scaled as the source reads them.

        Raises:
            ValueError: if they are not the same images in this latent space.
        """
        sides = [
            (whole // self.side, cell // self.cells, whole * self.cells, cell * self.side)
            for whole, cell in zip(pixels.shape[-2:], latents.shape[-2:], strict=True)
        ]
        # Hosts crop an image whose sides the latent cells do not divide.
        alike = all(crop <= full < crop + self.side * self.cells for _, _, crop, full in sides)
        if latents.shape[1] != self.channels or len(pixels) != len(latents) or not alike:
            raise ValueError(
                f"Images of the shape {tuple(pixels.shape)} are not those of latents of the shape "
                f"{tuple(latents.shape)}: {self.channels} channels and cells of {self.side // self.cells} pixels are "
                "expected."
            )
        rows, columns = (min(whole, cell) for whole, cell, _, _ in sides)
        x = patchify(pixels[..., : rows * self.side, : columns * self.side], self.side, PIXEL_ORDER)
        z = patchify(latents[..., : rows * self.cells, : columns * self.cells], self.cells, self.order)
        # In float32 an image's own sums are exact enough, and fast where float64 is not.
        x, z = x.detach().float().flatten(0, 1), z.detach().float().flatten(0, 1)
        for name, value in {"x": x.sum(0), "z": z.sum(0), "xx": x.T @ x, "zx": z.T @ x, "zz": z.T @ z}.items():
            self.sums[name] += value.cpu().double()
        self.count += len(x)

    def save(self, path: Path) -> None:
        """Write the sums, replacing an older file when complete.

        Raises:
            ValueError: if the disk is full or the system refuses to write.
        """
        about = {name: getattr(self, name) for name in ("side", "channels", "cells", "order", "count")}
        save(dict(self.sums), path, {"l2p.kind": _KIND, "l2p.pairs": json.dumps(about)}, overwrite=True)

    @classmethod
    def load(cls, path: Path) -> PatchPairs:
        """Read a file written by `save`.

        Raises:
            CheckpointError: if it is not such a file, or is damaged.
        """
        refusal = CheckpointError(
            f"{path} does not hold sums over patches: use the {FILE} that Synthesize L2P Dataset leaves in its folder."
        )
        header = read_header(path)
        try:
            about = json.loads(header.metadata["l2p.pairs"])
            side, channels, cells, count = (int(about[name]) for name in ("side", "channels", "cells", "count"))
            order = str(about["order"])
        except (KeyError, TypeError, ValueError):
            raise refusal from None
        # Before anything is read or made: a model's file, and made-up sizes, would take all memory.
        held = {name: entry.shape for name, entry in header.tensors.items()}
        if header.metadata.get("l2p.kind") != _KIND or count < 1 or held != _shapes(side, channels, cells):
            raise refusal
        pairs = cls(side, channels, cells, order)
        pairs.count, pairs.sums = count, {name: value.double() for name, value in load_tensors(path)[0].items()}
        if not all(is_finite(value) for value in pairs.sums.values()):
            raise refusal
        return pairs


def file_in(folder: Path) -> Path:
    """The file of pairs in a data set's folder, there or not; a path that is not a folder is the file itself."""
    return folder / FILE if folder.is_dir() else folder


def in_folder(folder: Path) -> PatchPairs:
    """The pairs that making a data set left in its folder, or those of the file itself.

    Raises:
        ValueError: if there are none.
        CheckpointError: if the file is damaged.
    """
    path = file_in(folder)
    if not path.is_file():
        raise ValueError(
            f"A fitted start needs the file {FILE} that Synthesize L2P Dataset leaves beside its images, and {folder} "
            "has none: choose a data set that it made, or start without a fit."
        )
    return PatchPairs.load(path)


@dataclass(frozen=True)
class EmbedderFit:
    """A patch embedder for pixels.

    Attributes:
        weight: (dim, P*P*3), float32.
        bias: (dim,), float32.
        pairs: number of patches it is fitted to.
        explained: share of the variance of the source's token embeddings that it explains, up to 1.
        noise_gain: energy of white noise in its embedding over that in the source's; below 1 only if a fit without
            ridge has a smaller norm than the source's embedder.
    """

    weight: Tensor
    bias: Tensor
    pairs: int
    explained: float
    noise_gain: float

    def summary(self) -> str:
        """One clause."""
        return (
            f"fitted to {self.pairs} patches, explains {self.explained:.1%} of the source's token embeddings, noise "
            f"gain {self.noise_gain:.2f}"
        )


def fit_embedder(pairs: PatchPairs, weight: Tensor, bias: Tensor) -> EmbedderFit:
    """The pixel embedder closest to the source's on these pairs.

    Args:
        pairs: at least `FEW`.
        weight: (dim, patch elements) of the source's embedder, of the pairs' latent space.
        bias: (dim,).

    Raises:
        ValueError: for too few pairs, or an embedder of another latent space.
    """
    if pairs.count < FEW:
        raise ValueError(
            f"{pairs.count} patches are too few for a fitted start, which needs {FEW}: make more or larger images, or "
            "start without a fit."
        )
    weight, bias = weight.double(), bias.double()
    if weight.shape[1] != len(pairs.sums["z"]):
        raise ValueError(
            f"The patches are of latents with {len(pairs.sums['z'])} values each, but this source reads "
            f"{weight.shape[1]}: use the data set that this source made."
        )
    mean = {name: pairs.sums[name] / pairs.count for name in ("x", "z")}
    xx, zx, zz = (
        pairs.sums[a + b] / pairs.count - mean[a][:, None] * mean[b] for a, b in (("x", "x"), ("z", "x"), ("z", "z"))
    )
    hx = weight @ zx
    variance, axes = torch.linalg.eigh(xx)
    along = hx @ axes
    variance = variance.clamp(min=0)
    ridge = _ridge(along.square().sum(0), variance, float(weight.square().sum()))
    fitted = (along / (variance + ridge)) @ axes.T
    whole = float((weight @ zz * weight).sum())
    missed = whole - 2 * float((fitted * hx).sum()) + float((fitted @ xx * fitted).sum())
    return EmbedderFit(
        fitted.float(),
        (weight @ mean["z"] + bias - fitted @ mean["x"]).float(),
        pairs.count,
        1 - missed / max(whole, 1e-30),
        float(fitted.square().sum() / weight.square().sum()),
    )


def _ridge(energy: Tensor, variance: Tensor, wanted: float) -> float:
    """The ridge at which the fit's squared norm, sum of energy / (variance + ridge)^2, is as wanted.

    The norm falls with the ridge; where even the least ridge has less, that is taken.
    """

    def norm(ridge: float) -> float:
        return float((energy / (variance + ridge).square()).sum())

    low = _FLOOR * float(variance.max()) or _FLOOR
    if norm(low) <= wanted:
        return low
    high = low
    while norm(high) > wanted:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if norm(middle) > wanted else (low, middle)
    return high
