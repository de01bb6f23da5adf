"""`l2p benchmark hybrid`: latents, pixels, hand-over between them and growth, at equal numbers of evaluations.

Every method is scored with several seeds on the bundled models; each (method, seed) is computed once and kept in the
output folder, so the benchmark can be stopped and started again. A second table counts what one evaluation of the 6B
model costs at real sizes, by the shapes of its operations.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...l2p_core import hybrid
from ...l2p_core.config import ModelConfig, PixelConfig
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.model import L2PModel, LatentModel
from ...l2p_core.sources import SOURCES
from .. import figure
from ..console import table
from ..own_folder import OwnFolder
from .hybrid_rows import Method, methods_in
from .hybrid_worlds import World, open_world

BATCH = 48
SEED_DISTANCE = 1_000_000
"""Between the first seeds of two passes; the images of a pass have consecutive seeds."""
SHOWN = 8
RESULTS = ("results.json", "results.md", "results.png")
CAPTION_TOKENS = 128
COMPARED = "pixels only, 6 steps"
"""The method with which all others of its size and number of evaluations are compared."""

MEASURED = ("whole", "distance", "seconds", "kept", "kept_layout")
"""What each pass of a method measures: whole captions right, distance to clean renderings, seconds an image, and the
shares of attributes and of the layout's attributes that growth kept (NaN for a method that does not grow, and where
the judge sees none without growth)."""

MethodScores = dict[str, list[float]]
"""One method's values for each pass, by the names in `MEASURED`."""


def benchmark_hybrid(
    output: Path,
    captions: int = 96,
    seeds: int = 3,
    world: str = "shapes",
    pixels: Path | None = None,
    large: Path | None = None,
) -> None:
    """Measure what is missing, then write results.json, results.md and results.png, and print the tables.

    Args:
        output: the folder of all results.
        captions: of each pass.
        seeds: passes with other noise.
        world, pixels, large: as for `open_world`.

    Raises:
        ValueError: if the folder has results of something else, or is in use by another process.
    """
    FOLDER.check(output)
    opened = open_world(world, pixels, large)
    with FOLDER.held(output):
        methods, texts = methods_in(opened), opened.captions(captions)
        found: dict[str, MethodScores] = {method.name: {} for method in methods}
        for seed in range(seeds):
            for method in methods:
                path = output / f"{opened.identity}-{_file_name(method.name)}-{captions}-{seed}.json"
                if not _is_measured(path):
                    print(f"{method.name}, seed {seed}", flush=True)
                    write_bytes(path, json.dumps(_measure(method, opened, texts, seed)).encode())
                for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                    found[method.name].setdefault(key, []).append(value)
        shown = {method.name: _images(method, opened, texts[:SHOWN], 0) for method in methods if method.shift == 1}
        _report(output, methods, found, shown, texts)


def _has_rows(output: Path) -> bool:
    """Whether this benchmark of an earlier version created the folder: results always include pixels only."""
    return any(output.glob("*pixels-only--*.json"))


def _is_measured(path: Path) -> bool:
    """Whether the file has all of today's values; an earlier version's has fewer."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8")).keys() == set(MEASURED)


def _measure(method: Method, world: World, texts: Sequence[str], seed: int) -> dict[str, float]:
    began = time.perf_counter()
    images = _images(method, world, texts, seed)
    seconds = (time.perf_counter() - began) / len(texts)
    judged = world.judged(images, texts)
    kept, layout, small = math.nan, math.nan, method.without_growth()
    if small is not None:
        before = world.judged(_images(small, world, texts, seed), texts)
        kept, layout = _kept(judged.attributes, before.attributes), _kept(judged.layout, before.layout)
    return dict(zip(MEASURED, (judged.whole, judged.distance, seconds, kept, layout), strict=True))


def _kept(images: Sequence[tuple[str, ...]], others: Sequence[tuple[str, ...]]) -> float:
    """The share of the others' attributes that the same images show; "" is one that the judge cannot see."""
    pairs = zip(images, others, strict=True)
    same = [one == two for image, other in pairs for one, two in zip(image, other, strict=True) if two]
    return mean(map(float, same)) if same else math.nan


def _images(method: Method, world: World, texts: Sequence[str], seed: int) -> Tensor:
    found = []
    for start in range(0, len(texts), BATCH):
        captions = [world.words.encode(text) for text in texts[start : start + BATCH]]
        found.append(
            hybrid.sample(
                method.stages,
                captions,
                seed=seed * SEED_DISTANCE + start,
                negative=[world.words.encode("")] * len(captions),
                codec=world.codec,
                space_shift=method.shift,
            )
        )
    return torch.cat(found)


def _report(
    output: Path,
    methods: Sequence[Method],
    found: Mapping[str, MethodScores],
    shown: Mapping[str, Tensor],
    texts: Sequence[str],
) -> None:
    lines = [
        [
            method.name,
            f"{method.size[1]} x {method.size[0]}",
            _with_error(found[method.name]["whole"], 100, "%"),
            _with_error(found[method.name]["distance"], 1, ""),
            _cleaner(method, methods, found),
            _with_error(found[method.name]["kept_layout"], 100, "%"),
            _with_error(found[method.name]["kept"], 100, "%"),
            str(method.evaluations),
            f"{mean(found[method.name]['seconds']) * 1000:.0f} ms",
        ]
        for method in methods
    ]
    seeds = len(found[methods[0].name]["whole"])
    text = f"{len(texts)} captions, {seeds} seeds; mean and standard error of the mean over seeds.\n\n"
    header = [
        *("way", "size", "whole captions", "distance", "cleaner by"),
        *("layout kept", "all kept", "evaluations", "an image"),
    ]
    text += table(header, lines)
    text += "\n\nOne evaluation of the 6B model, by shapes:\n\n" + table(
        ["space and size", "operations", "read and written at least"], _real_costs()
    )
    write_bytes(output / "results.json", (json.dumps(found, indent=1) + "\n").encode())
    write_bytes(output / "results.md", (text + "\n").encode())
    figure.draw(
        output / "results.png",
        list(texts[:SHOWN]),
        [figure.ImageRow(name, images) for name, images in shown.items()],
        [],
        {name: mean(found[name]["whole"]) for name in shown},
    )
    print(text)
    print(f"{output / 'results.png'}, results.json and results.md written.")


def _cleaner(method: Method, methods: Sequence[Method], found: Mapping[str, MethodScores]) -> str:
    """The number of standard errors by which a method's distance is below that of pixels alone, at its size and
    evaluations."""
    other = next((other for other in methods if other.name == COMPARED), None)
    if other is None or method is other or (method.size, method.evaluations) != (other.size, other.evaluations):
        return ""
    mine, others = found[method.name]["distance"], found[other.name]["distance"]
    if len(mine) < 2:
        return ""
    error = math.hypot(_error(mine), _error(others))
    return f"{(mean(others) - mean(mine)) / error:.1f} errors" if error > 0 else ""


def _with_error(values: Sequence[float], factor: float, unit: str) -> str:
    if any(math.isnan(value) for value in values):
        return ""
    digits = 1 if unit else 4
    return f"{mean(values) * factor:.{digits}f}{unit} ± {_error(values) * factor:.{digits}f}"


def _error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _real_costs() -> list[list[str]]:
    """Operations and least traffic of one evaluation of the published source and its 1k and 4k models."""
    config = SOURCES["z-image"].config()
    found = [_cost("latents", config, 1024, 8)]
    for variant, sizes in (("1k", (1024, 2048, 4096)), ("4k", (4096,))):
        pixel = config.with_head(variant)
        found += [_cost(f"pixels, {variant} model", pixel, size, 1) for size in sizes]
    return found


def _cost(name: str, config: ModelConfig, side: int, downscale: int) -> list[str]:
    """Counted on tensors without data; attention counts as its multiplications, whatever the kernel."""
    with torch.device("meta"), torch.no_grad():
        model = (L2PModel(config) if isinstance(config, PixelConfig) else LatentModel(config)).bfloat16()
        image = torch.empty(1, config.in_channels, side // downscale, side // downscale, dtype=torch.bfloat16)
        caption = torch.empty(CAPTION_TOKENS, config.caption_dim, dtype=torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            model(image, torch.empty(1), [caption])
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    traffic = weights + 2 * image.numel() * image.itemsize
    return [f"{name}, {side} x {side}", f"{counter.get_total_flops() / 1e12:.1f} TFLOP", f"{traffic / 1e9:.1f} GB"]


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name)


FOLDER = OwnFolder("l2p benchmark hybrid", "benchmark-hybrid.txt", _has_rows, RESULTS)
