"""`l2p benchmark head`: the Detailer Head on this machine's CPU, in float32.

Three questions: what channels-last order gains over contiguous order, what tiles cost in time and exactness, and how
much memory a 10240-pixel image needs in tiles and whole. Memory is the peak resident set of a separate process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...l2p_core.config import VARIANTS, ModelConfig
from ...l2p_core.detailer import DetailerHead, nearest_resized
from ...l2p_core.device.process_memory import peak_memory
from ...l2p_core.files.atomic import write_bytes
from ...l2p_core.files.units import bytes_text
from ...l2p_core.ops.region import Region
from ..console import table
from .process import run_module

DIM = ModelConfig.dim
ROUNDS = 5
TILE = 1024  # pixels


def benchmark_head(quick: bool = False, json_file: Path | None = None) -> None:
    """Measure, print tables, and write the results to `json_file` if one is given."""
    torch.manual_seed(0)
    size, tiled_size, large = (128, 640, 1280) if quick else (1024, 2560, 10240)
    results = {
        "quick": quick,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "layout": compare_layouts(size, rounds=2 if quick else ROUNDS),
        "tiles": compare_tiles(tiled_size, tile=tiled_size // 5 + 7, rounds=2 if quick else 3),
        "memory": compare_memory(large, tile=large // 4 if quick else TILE, whole_sizes=(large // 4, large // 2)),
    }
    print(report(results))
    if json_file:
        write_bytes(json_file, (json.dumps(results, indent=1) + "\n").encode())


@torch.no_grad()
def compare_layouts(size: int, rounds: int) -> dict[str, Any]:
    """The 1k head whole at size x size: ours (channels-last) against plain contiguous."""
    head, pixels, features = _inputs("1k", size)
    ours, plain = _alternating(
        lambda: head(pixels, features), lambda: contiguous_forward(head, pixels, features), rounds
    )
    error = _relative_error(head(pixels, features), contiguous_forward(head, pixels, features))
    return {"size": size, "ours_s": ours, "contiguous_s": plain, "speedup": plain / ours, "relative_error": error}


@torch.no_grad()
def compare_tiles(size: int, tile: int, rounds: int) -> dict[str, Any]:
    """The 10k head at size x size: in tiles that do not divide the image, and in the usual ones, against whole."""
    head, pixels, features = _inputs("10k", size)
    usual = min(TILE, size // 2)
    whole, tiled = _alternating(lambda: head(pixels, features), lambda: head(pixels, features, tile=usual), rounds)
    error = max(_relative_error(head(pixels, features, tile=side), head(pixels, features)) for side in (usual, tile))
    return {
        "size": size,
        "tile": usual,
        "odd_tile": tile,
        "whole_s": whole,
        "tiled_s": tiled,
        "time_ratio": tiled / whole,
        "relative_error": error,
    }


def compare_memory(size: int, tile: int, whole_sizes: tuple[int, int]) -> dict[str, Any]:
    """The 10k head at size x size in tiles, against what the whole image would need.

    Whole passes run at two smaller sizes; memory is linear in the pixels, so the line through them gives the rest.
    """
    tiled = run_module(__name__, str(size), "--tile", str(tile))
    small, middle = (run_module(__name__, str(side)) for side in whole_sizes)
    per_pixel = (middle["peak"] - small["peak"]) / (whole_sizes[1] ** 2 - whole_sizes[0] ** 2)
    whole = middle["peak"] + per_pixel * (size**2 - whole_sizes[1] ** 2)
    return {
        "size": size,
        "tile": tile,
        "tiled_peak": tiled["peak"],
        "tiled_s": tiled["seconds"],
        "whole_sizes": list(whole_sizes),
        "whole_peaks": [small["peak"], middle["peak"]],
        "whole_peak_extrapolated": round(whole),
        "share": tiled["peak"] / whole,
    }


def contiguous_forward(head: DetailerHead, pixels: Tensor, features: Tensor) -> Tensor:
    """The head as described in the paper, in torch's default memory order; arguments as for the head."""
    x, skips = pixels.contiguous(), []
    for stage in head.stages:
        x = head.get_submodule(f"enc{stage.name}")(x)
        skips.append(x)
        x = F.max_pool2d(x, 2)
    grid = x.shape[-2], x.shape[-1]
    x = head.bottleneck(torch.cat([x, nearest_resized(features, grid, Region(0, grid[0], 0, grid[1]))], dim=1))
    for stage in reversed(head.stages):
        x = head.get_submodule(f"up{stage.name}")(x)
        x = head.get_submodule(f"dec{stage.name}")(torch.cat([x, skips.pop()], dim=1))
    return head.out_conv(x)


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    layout, tiles, memory = results["layout"], results["tiles"], results["memory"]
    size = memory["size"]
    parts = [
        f"Detailer Head, float32, {results['threads']} threads, torch {results['torch']}"
        + (" (quick check, small sizes)" if results["quick"] else ""),
        table(
            [f"1k head, {layout['size']} px", "time", "speed"],
            [
                ["contiguous", f"{layout['contiguous_s']:.2f} s", "1.00"],
                ["channels-last (ours)", f"{layout['ours_s']:.2f} s", f"{layout['speedup']:.2f}"],
            ],
        ),
        table(
            [f"10k head, {tiles['size']} px", "time", "ratio", "relative error"],
            [
                ["whole", f"{tiles['whole_s']:.2f} s", "1.00", ""],
                [
                    f"tiles of {tiles['tile']}",
                    f"{tiles['tiled_s']:.2f} s",
                    f"{tiles['time_ratio']:.2f}",
                    f"{tiles['relative_error']:.1e}",
                ],
            ],
        ),
        table(
            [f"10k head, {size} px", "peak memory", "share"],
            [
                ["whole (extrapolated)", bytes_text(memory["whole_peak_extrapolated"]), "100%"],
                [f"tiles of {memory['tile']}", bytes_text(memory["tiled_peak"]), f"{memory['share']:.0%}"],
            ],
        ),
        f"The tiled pass took {memory['tiled_s']:.1f} s. Whole passes were measured at "
        + " and ".join(
            f"{side} px ({bytes_text(peak)})"
            for side, peak in zip(memory["whole_sizes"], memory["whole_peaks"], strict=True)
        )
        + f"; {size} px is extrapolated linearly in the number of pixels.",
    ]
    return "\n\n".join(parts)


def _inputs(variant: str, size: int) -> tuple[DetailerHead, Tensor, Tensor]:
    """A randomly initialised head of the published width, and random inputs."""
    grid = size // VARIANTS[variant].patch_size
    return DetailerHead(variant, DIM).eval(), torch.randn(1, 3, size, size), torch.randn(1, DIM, grid, grid)


def _alternating(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median seconds of two functions, called alternately so that a change of the machine's speed affects both."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 1):
        for function, kept in zip((first, second), times, strict=True):
            started = time.perf_counter()
            function()
            # The first round warms up caches and the memory allocator.
            if round_:
                kept.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def main() -> None:
    """One pass of the 10k head in this process; prints seconds and peak memory as JSON."""
    parser = argparse.ArgumentParser(description="One pass of the 10k head, for its peak memory.")
    parser.add_argument("size", type=int, help="side of the image in pixels")
    parser.add_argument("--tile", type=int, default=None, help="side of a tile in pixels")
    args = parser.parse_args()
    head, pixels, features = _inputs("10k", args.size)
    started = time.perf_counter()
    with torch.no_grad():
        head(pixels, features, tile=args.tile)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak_memory()}))


if __name__ == "__main__":
    main()
