"""`l2p benchmark hybrid`: latents, pixels, hand-over between them and growth, at equal numbers of evaluations.

Every row is scored with several seeds on the bundled models; each (row, seed) is computed once and kept in the output
folder, so the benchmark can be stopped and started again. A second table counts what one evaluation of the 6B model
costs at real sizes, by the shapes of its operations.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...l2p_core import delta, hybrid
from ...l2p_core.config import ModelConfig, PixelConfig
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.flow import FlowModel
from ...l2p_core.growth import Space, safe_sigma
from ...l2p_core.hybrid import Stage
from ...l2p_core.model import L2PModel, LatentModel
from ...l2p_core.sources import SOURCES
from ...l2p_core.tiny import bundled, judge
from ...l2p_core.tiny.shapes import IMAGE_SIZE, evaluation_captions
from .. import figure
from ..console import table

CFG = 2.0
BATCH = 48
SEED_DISTANCE = 1_000_000
"""Between the seeds of two passes, whose images have the seeds that follow."""
SHOWN = 8
CAPTION_TOKENS = 128


@dataclass(frozen=True)
class Row:
    """A way of sampling: its name, its stages, and the shift between the spaces."""

    name: str
    stages: list[Stage]
    shift: float = 1.0

    @property
    def evaluations(self) -> int:
        return sum(stage.steps * (1 if stage.cfg == 1 else 2) for stage in self.stages)


@dataclass(frozen=True)
class Measured:
    """Scores of a row's passes: whole captions right, distance to a clean rendering, seconds an image."""

    whole: list[float]
    distance: list[float]
    seconds: list[float]


def benchmark_hybrid(output: Path, captions: int = 96, seeds: int = 3) -> None:
    """Measure what is missing, then write results.json, results.md and results.png, and print the tables.

    Args:
        output: the folder of all results.
        captions: of each pass.
        seeds: passes with other noise.
    """
    output.mkdir(parents=True, exist_ok=True)
    source = bundled.TinySource()
    pixels = delta.load_model(bundled.DELTA, bundled.SOURCE, dtype=torch.float32).eval()
    assert isinstance(pixels, L2PModel)
    ways = rows(source.model, pixels)
    texts = evaluation_captions(captions)
    found: dict[str, dict[str, list[float]]] = {row.name: {} for row in ways}
    shown: dict[str, Tensor] = {}
    for seed in range(seeds):
        for row in ways:
            path = output / f"{_file_name(row.name)}-{captions}-{seed}.json"
            if not path.exists():
                print(f"{row.name}, seed {seed}")
                write_bytes(path, json.dumps(_measure(row, source, texts, seed)).encode())
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                found[row.name].setdefault(key, []).append(value)
    for row in ways:
        if row.shift == 1 and row.evaluations == ways[0].evaluations:
            shown[row.name] = _images(row, source, texts[:SHOWN], 0)
    _report(output, ways, found, shown, texts)


def rows(latent: LatentModel, pixels: L2PModel) -> list[Row]:
    """All ways: one space alone, hand-over at several levels and maps, a finished image sampled again, growth."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    half = (IMAGE_SIZE // 2, IMAGE_SIZE // 2)
    alone: list[tuple[str, FlowModel, Space]] = [("latents", latent, "latent"), ("pixels", pixels, "pixels")]
    found = [
        Row(f"{name} only, {steps} steps", [Stage(model, space, size, steps, cfg=CFG)])
        for steps in (6, 12)
        for name, model, space in alone
    ]
    for switch in (0.8, 0.65, 0.5, 0.35):
        first = max(1, min(5, round(6 * (1 - _even(switch)))))
        for shift in (1.0, 3.0):
            stages = [
                Stage(latent, "latent", size, first, end=switch, cfg=CFG),
                Stage(pixels, "pixels", size, 6 - first, cfg=CFG),
            ]
            found.append(Row(f"latents to {switch:g}, then pixels, shift {shift:g}, 6 steps", stages, shift))
    safe = safe_sigma(half, size)
    found.append(
        Row(
            "pixels growing from half the size, 4 + 2 steps",
            [
                Stage(pixels, "pixels", half, 4, end=safe, cfg=CFG),
                Stage(pixels, "pixels", size, 2, cfg=CFG),
            ],
        )
    )
    return found


def _measure(row: Row, source: bundled.TinySource, texts: Sequence[str], seed: int) -> dict[str, float]:
    began = time.perf_counter()
    images = _images(row, source, texts, seed)
    seconds = (time.perf_counter() - began) / len(texts)
    score = judge.score(images, texts)
    return {"whole": score.whole, "distance": score.residual, "seconds": seconds}


def _images(row: Row, source: bundled.TinySource, texts: Sequence[str], seed: int) -> Tensor:
    found = []
    for start in range(0, len(texts), BATCH):
        captions = [source.words.encode(text) for text in texts[start : start + BATCH]]
        found.append(
            hybrid.sample(
                row.stages,
                captions,
                seed=seed * SEED_DISTANCE + start,
                negative=[source.words.encode("")] * len(captions),
                codec=source.autoencoder,
                space_shift=row.shift,
            )
        )
    return torch.cat(found)


def _report(
    output: Path,
    ways: Sequence[Row],
    found: dict[str, dict[str, list[float]]],
    shown: dict[str, Tensor],
    texts: Sequence[str],
) -> None:
    lines = [
        [
            row.name,
            _with_error(found[row.name]["whole"], 100, "%"),
            _with_error(found[row.name]["distance"], 1, ""),
            str(row.evaluations),
            f"{mean(found[row.name]['seconds']) * 1000:.0f} ms",
        ]
        for row in ways
    ]
    seeds = len(found[ways[0].name]["whole"])
    text = f"{len(texts)} captions, {seeds} seeds; mean and standard error of the mean over seeds.\n\n"
    text += table(["way", "whole captions", "distance", "evaluations", "an image"], lines)
    text += "\n\nOne evaluation of the 6B model, by shapes:\n\n" + table(
        ["space and size", "operations", "read and written at least"], _real_costs()
    )
    write_bytes(output / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    write_bytes(output / "results.md", (text + "\n").encode())
    figure.draw(
        output / "results.png",
        list(texts[:SHOWN]),
        [figure.Row(name, images) for name, images in shown.items()],
        [],
        {name: mean(found[name]["whole"]) for name in shown},
    )
    print(text)
    print(f"{output / 'results.png'}, results.json and results.md written.")


def _with_error(values: Sequence[float], factor: float, unit: str) -> str:
    digits = 1 if unit else 4
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{mean(values) * factor:.{digits}f}{unit} ± {error * factor:.{digits}f}"


def _real_costs() -> list[list[str]]:
    """Operations and least traffic of one evaluation of the published source and its 1k and 4k models."""
    config = SOURCES["z-image"].config()
    found = [_cost("latents", config, 1024, 8)]
    for variant, sizes in (("1k", (1024, 2048, 4096)), ("4k", (4096,))):
        pixel = config.with_head(variant)
        found += [_cost(f"pixels, {variant} model", pixel, size, 1) for size in sizes]
    return found


def _cost(name: str, config: ModelConfig, side: int, downscale: int) -> list[str]:
    """Counted on tensors without data; attention as the multiplications that it needs, in whatever kernel."""
    with torch.device("meta"), torch.no_grad():
        model = (L2PModel(config) if isinstance(config, PixelConfig) else LatentModel(config)).bfloat16()
        image = torch.empty(1, config.in_channels, side // downscale, side // downscale, dtype=torch.bfloat16)
        caption = torch.empty(CAPTION_TOKENS, config.caption_dim, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            model(image, torch.empty(1), [caption])
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    traffic = weights + 2 * image.numel() * image.itemsize
    return [f"{name}, {side} x {side}", f"{counter.get_total_flops() / 1e12:.1f} TFLOP", f"{traffic / 1e9:.1f} GB"]


def _even(sigma: float, shift: float = 3.0) -> float:
    """u of the published schedule at a noise level."""
    return sigma / (shift - (shift - 1) * sigma)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)
