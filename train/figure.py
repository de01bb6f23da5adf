"""The figures of demo and benchmark: rows of images for the same captions, loss curves and scores."""

from __future__ import annotations

import os
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from ..l2p_core.dataset.pictures import picture

_CAPTION_WIDTH = 17  # characters per line
_PLOT_WIDTH = 2.6  # inches, at least


@dataclass(frozen=True)
class ImageRow:
    """One model's name and images (B, 3, H, W) in [-1, 1]."""

    name: str
    images: Tensor


@dataclass(frozen=True)
class Curves:
    """Lines over training steps: {name: values}, the steps of the values, and the label of the axis."""

    steps: Sequence[int]
    lines: Mapping[str, Sequence[float]]
    label: str
    percent: bool = False


def draw(
    path: Path,
    captions: Sequence[str],
    rows: Sequence[ImageRow],
    curves: Sequence[Curves],
    scores: Mapping[str, float],
    errors: Mapping[str, float] | None = None,
) -> None:
    """Write the figure as PNG, atomically.

    Args:
        path: the file.
        captions: of the images, one column each.
        rows: one row of images for each model, top to bottom.
        curves: one plot each, left to right.
        scores: {model: share of whole captions right}, as bars in the last plot.
        errors: their standard errors, of every model, or None.
    """
    columns = len(captions)
    heights = 1.3 * len(rows) + 0.5, max(2.9, 0.22 * len(scores) + 0.7)
    width = max(1.25 * columns + 0.8, _PLOT_WIDTH * (len(curves) + 1))
    figure = Figure(figsize=(width, sum(heights) + 0.2), layout="constrained", dpi=130)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_images(above.subplots(len(rows), columns, squeeze=False), captions, rows)
    plots = below.subplots(1, len(curves) + 1, squeeze=False)[0]
    for axes, curve in zip(plots, curves, strict=False):
        _draw_curves(axes, curve)
    _draw_scores(plots[-1], scores, errors, 16 if curves else 60)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        figure.savefig(part, format="png")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _draw_images(grid: Sequence[Sequence[Axes]], captions: Sequence[str], rows: Sequence[ImageRow]) -> None:
    for line, row in zip(grid, rows, strict=True):
        for axes, image in zip(line, row.images, strict=True):
            axes.imshow(picture(image), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(textwrap.fill(row.name, 14), fontsize=8)
    for axes, caption in zip(grid[0], captions, strict=True):
        axes.set_title(textwrap.fill(caption, _CAPTION_WIDTH), fontsize=6.5)


def _draw_curves(axes: Axes, curves: Curves) -> None:
    for name, values in curves.lines.items():
        axes.plot(curves.steps, values, label=name, linewidth=1.4, marker="." if len(curves.steps) < 20 else None)
    axes.set_xlabel("training step", fontsize=8)
    axes.set_ylabel(curves.label, fontsize=8)
    axes.tick_params(labelsize=7)
    if curves.percent:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_yscale("log")
    axes.legend(fontsize=6.5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_scores(axes: Axes, scores: Mapping[str, float], errors: Mapping[str, float] | None, width: int) -> None:
    names = [textwrap.fill(name, width) for name in scores]
    widths = None if errors is None else [errors[name] for name in scores]
    bars = axes.barh(names, list(scores.values()), xerr=widths, color="tab:blue", ecolor="tab:gray", height=0.6)
    axes.bar_label(bars, [f"{value:.0%}" for value in scores.values()], fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("whole captions right", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
